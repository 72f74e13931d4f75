// Bias and rectified linear unit, in place, as passes of their own over the result of a matrix product (matmul.cuh). A
// thread has eight neighbouring elements. Backward also adds up columns, so its kernel is column_sums.cuh's.
// defines: bias_forward, bias_relu_forward, relu_backward
#pragma once
#include <climits>

#include "column_sums.cuh"
#include "device.cuh"
#include "launch.cuh"

// Launched with blocks of 256 threads, one thread for each eight elements of a row.
//   x (rows, OC), a row of which is ld elements long: updated;  bias (OC)
template <class Real, bool RELU>
__global__ void __launch_bounds__(256) bias_forward_kernel(Real* x, const Real* bias, int rows, int OC, int ld) {
  wait_for_inputs();
  const unsigned groups = ceil_div(OC, 8), i = blockIdx.x * blockDim.x + threadIdx.x;
  const int r = int(i / groups), c = int(i % groups) * 8;
  if (r >= rows) return;
  Real* const at = x + size_t(r) * ld + c;
  const auto result = [](float v, float b) { return RELU && v + b < 0 ? 0 : v + b; };  // NaN stays, as in relu.h
  if (c + 8 <= OC) {
    Float8 v = load8(at);
    const Float8 b = load8(bias + c);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = result(v[j], b[j]);
    store8(at, v);
  } else {
    for (int j = 0; c + j < OC; j++) at[j] = Real(result(float(at[j]), float(bias[c + j])));
  }
}

template <class Real, bool RELU>
void launch_bias_forward(Real* x, const Real* bias, int rows, int OC, int ld, cudaStream_t stream) {
  require(ld >= OC && ld % 8 == 0, "bias_forward: rows of ", ld, " elements for OC = ", OC);
  const size_t threads = size_t(rows) * ceil_div(OC, 8);
  require(threads > 0 && threads < UINT_MAX - 256, "bias_forward: rows = ", rows, ", OC = ", OC);
  launch(bias_forward_kernel<Real, RELU>, {unsigned(ceil_div(threads, 256)), 256, 0, stream}, x, bias, rows, OC, ld);
}

// x (rows, OC) = x + bias (OC). A row of x is ld elements long.
template <class Real>
void bias_forward(Real* x, const Real* bias, int rows, int OC, int ld, cudaStream_t stream) {
  launch_bias_forward<Real, false>(x, bias, rows, OC, ld, stream);
}
// x (rows, OC) = max(x + bias (OC), 0). A row of x is ld elements long.
template <class Real>
void bias_relu_forward(Real* x, const Real* bias, int rows, int OC, int ld, cudaStream_t stream) {
  launch_bias_forward<Real, true>(x, bias, rows, OC, ld, stream);
}

// dx (rows, OC) becomes 0 where out (rows, OC), forward's result, is 0.
// partials (ceil(rows / 64), OC) = the sums of each 64 rows of the new dx. add_partials makes of them the gradient of
// the bias that was added before ReLU.
template <class Real>
void relu_backward(Real* dx, float* partials, const Real* out, int rows, int OC, cudaStream_t stream) {
  require(OC % 8 == 0, "relu_backward: OC = ", OC, " is not a multiple of 8");
  launch_column_partials<true>(partials, dx, out, rows, OC, OC, stream);
}
