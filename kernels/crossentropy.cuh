// Softmax and cross-entropy: loss = log(sum_v exp(logits_v)) - logits_target, in nats. The probabilities are never
// stored: when training, the same kernel writes the gradient over the logits.
// A row of logits has Vp elements, a multiple of 8, so that rows are aligned to 16 bytes: 72 for V = 65. Columns
// V ... Vp - 1 are padding. What they hold is never used, and their gradient is 0.
// One pass over the row finds both the largest logit and the sum: the sum so far is relative to the largest logit so
// far. Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.
// defines: crossentropy_forward, crossentropy_forward_backward, sum_losses
#pragma once
#include <cfloat>

#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"

// Eight logits of row (V), from column v on. Columns from V on become -infinity, so that they have no weight.
template <class Real>
__device__ inline Float8 load8_logits(const Real* row, int v, int V) {
  Float8 x = load8(row + v);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (v + i >= V) x[i] = -INFINITY;
  return x;
}

// Launched with blocks of 128 threads, as many as the rows need: LANES lanes have a row, eight columns each at a time.
// A lane reads and overwrites only its own columns, so no barrier is needed. The lane that has the target's column
// writes the loss.
//   losses (rows) =;  logits (rows, Vp);  dlogits (rows, Vp) =, may be logits, BACKWARD only;  targets (rows)
//   loss_scale (1): on the device, BACKWARD only
template <class Real, int LANES, bool BACKWARD>
__global__ void __launch_bounds__(128)
    crossentropy_kernel(float* losses, const Real* logits, Real* dlogits, const int* targets, float dloss,
                        const float* loss_scale, int rows, int V, int Vp) {
  wait_for_inputs();
  const int r = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, first = threadIdx.x % LANES * 8;
  const int columns = r < rows ? V : 0;  // lanes behind the last row have none, but take part in the sums
  const int target = r < rows ? targets[r] : -1;
  const Real* row = logits + size_t(r) * Vp;

  // 1. This lane's columns: their maximum and the sum of exp(x - max). max does not begin with -infinity, because
  //    -infinity - max has to be a number also for a row of -infinity.
  float max = -FLT_MAX, sum = 0, target_logit = 0;
  for (int v = first; v < columns; v += 8 * LANES) {
    const Float8 x = load8_logits(row, v, V);
    float new_max = max;
#pragma unroll
    for (int i = 0; i < 8; i++) new_max = fmaxf(new_max, x[i]);
    sum *= expf(max - new_max);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum += expf(x[i] - new_max);  // <= 1: nothing overflows
      if (v + i == target) target_logit = x[i];
    }
    max = new_max;
  }
  // 2. Combine the lanes' maxima and sums into the row's. Compute the loss.
  const float row_max = lane_max<LANES>(max);
  sum = lane_sum<LANES>(sum * expf(max - row_max));
  if (target >= 0 && target / 8 % LANES * 8 == first) losses[r] = logf(sum) - (target_logit - row_max);

  // 3. The gradient.
  if constexpr (BACKWARD) {
    const float inverse = 1 / sum, scale = dloss * *loss_scale;
    for (int v = first; v < (r < rows ? Vp : 0); v += 8 * LANES) {
      Float8 x = load8_logits(row, v, V);
#pragma unroll
      for (int i = 0; i < 8; i++)
        x[i] = v + i < V ? (expf(x[i] - row_max) * inverse - float(v + i == target)) * scale : 0;
      store8(dlogits + size_t(r) * Vp + v, x);
    }
  }
}

template <class Real, bool BACKWARD>
void launch_crossentropy(float* losses, const Real* logits, Real* dlogits, const int* targets, float dloss,
                         const float* loss_scale, int rows, int V, int Vp, cudaStream_t stream) {
  require(V > 0 && V <= Vp && Vp % 8 == 0, "crossentropy: rows of ", Vp, " elements for V = ", V);
  require(rows > 0, "crossentropy: rows = ", rows);
  constexpr int block = 128;
  const auto run = [&](auto kernel, int lanes) {
    launch(kernel, {unsigned(ceil_div(rows, block / lanes)), block, 0, stream}, losses, logits, dlogits, targets, dloss,
           loss_scale, rows, V, Vp);
  };
  if (Vp <= 8 * 16)  // half a warp takes the whole row at once
    run(crossentropy_kernel<Real, 16, BACKWARD>, 16);
  else
    run(crossentropy_kernel<Real, 32, BACKWARD>, 32);
}

// losses (rows) = the loss of each row of logits (rows, Vp), given targets (rows), which are in [0, V)
template <class Real>
void crossentropy_forward(float* losses, const Real* logits, const int* targets, int rows, int V, int Vp,
                          cudaStream_t stream) {
  launch_crossentropy<Real, false>(losses, logits, nullptr, targets, 0, nullptr, rows, V, Vp, stream);
}

// losses (rows) = ..., and the logits (rows, Vp) become dlogits = (softmax - onehot(targets)) * dloss * loss_scale.
// dloss is the gradient of one row's loss, 1 / rows for their mean. loss_scale (1) is on the device.
template <class Real>
void crossentropy_forward_backward(float* losses, Real* logits, const int* targets, float dloss,
                                   const float* loss_scale, int rows, int V, int Vp, cudaStream_t stream) {
  launch_crossentropy<Real, true>(losses, logits, logits, targets, dloss, loss_scale, rows, V, Vp, stream);
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int sum_losses_block = 1024;

static __global__ void __launch_bounds__(sum_losses_block)
    sum_losses_kernel(double* sum, const float* losses, int rows) {
  wait_for_inputs();
  double own = 0;
#pragma unroll 8
  for (int r = threadIdx.x; r < rows; r += sum_losses_block) own += losses[r];
  own = block_sum<sum_losses_block>(own);
  if (threadIdx.x == 0) *sum = own;
}

// sum (1) = the sum of losses (rows), in double. One block does it; 16384 rows take it a few microseconds.
inline void sum_losses(double* sum, const float* losses, int rows, cudaStream_t stream) {
  launch(sum_losses_kernel, {1, sum_losses_block, 0, stream}, sum, losses, rows);
}
