// defines: add, round_to
#pragma once
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"

// Launched with ceil(count / 2048) blocks of 256 threads, each of which has eight neighbouring elements.
//   sum (count) +=;  x (count);  loss_sum (1) +=;  loss (1)
static __global__ void __launch_bounds__(256)
    add_kernel(float* sum, const float* x, size_t count, double* loss_sum, const double* loss) {
  wait_for_inputs();
  const size_t i = 8 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i == 0) *loss_sum += *loss;
  if (i >= count) return;
  Float8 total = load8(sum + i);
  const Float8 other = load8(x + i);
#pragma unroll
  for (int j = 0; j < 8; j++) total[j] += other[j];
  store8(sum + i, total);
}

// Adds gradients and a loss to others, those of a second half of batches to those of the first (host/tree.h):
// sum (count) += x (count), where count is a multiple of 8; loss_sum (1) += loss (1).
inline void add(float* sum, const float* x, size_t count, double* loss_sum, const double* loss, cudaStream_t stream) {
  require(count % 8 == 0, "add: count = ", count, " is not a multiple of 8");
  const unsigned blocks = std::max(1u, unsigned(ceil_div(count / 8, 256)));
  launch(add_kernel, {blocks, 256, 0, stream}, sum, x, count, loss_sum, loss);
}

// Launched with ceil(count / 2048) blocks of 256 threads.
template <class Real>
__global__ void __launch_bounds__(256) round_to_kernel(Real* to, const float* from, size_t count) {
  wait_for_inputs();
  const size_t i = 8 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i < count) store8(to + i, load8(from + i));
}

// to (count) = from (count), rounded to Real; count is a multiple of 8.
template <class Real>
void round_to(Real* to, const float* from, size_t count, cudaStream_t stream) {
  require(count > 0 && count % 8 == 0, "round_to: count = ", count, " is not a multiple of 8");
  launch(round_to_kernel<Real>, {unsigned(ceil_div(count / 8, 256)), 256, 0, stream}, to, from, count);
}
