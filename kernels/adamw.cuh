// AdamW (adamw.h), and the state that a training step keeps on the device. Because the state is there, the launches of
// a step have the same arguments every time, and a step can be recorded once and replayed.
//
// With float16 the loss is multiplied by a scale that keeps small gradients from vanishing: Micikevicius et al., "Mixed
// Precision Training", 2018, section 3.2. The scale follows the gradients: an update whose gradients are not finite is
// left out and the scale halved; after many good ones it is doubled.
// defines: TrainState, AdamWStep, adamw_step, adamw_update, gradient_norm_partials, norm_unit, gradient_norm,
//          prepare_update, initial_state, end_step, loss_scale_start, save_loss_scale, load_loss_scale, Optimizer
#pragma once
#include <cmath>
#include <iomanip>
#include <map>
#include <stdexcept>
#include <string>

#include "../host/error.h"
#include "../host/tree.h"
#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"

struct TrainState {
  double loss_sum[32] = {};      // of all rows of a step, and at each level of the tree of its batches (host/tree.h)
  int step = 0;                  // the iteration, counted from 0
  float loss_scale = 1;          // a power of two, so that scaling rounds nothing; 1 without loss scaling
  int steps_since_overflow = 0;  // or since the scale was doubled
  int overflow = 0;              // 1 if a gradient of this step is not finite: then there is no update
  float gradient_scale = 1;      // what the update multiplies every gradient by, for clipping and for 1 / loss_scale
};

// ---------------------------------------------------------------------------------------------------------------------
// The update. The numbers that depend on the iteration come from a ring of rows, which the host computes as adamw.h
// does.

struct AdamWStep {
  float decay, step_size, root_correction;
  float learning_rate;  // Muon's step size, which has no bias to correct
};

// step is counted from 1, as in AdamW: iteration i is step i + 1.
inline AdamWStep adamw_step(double learning_rate, double beta1, double beta2, double weight_decay, int step) {
  return {float(1 - learning_rate * weight_decay), float(learning_rate / (1 - std::pow(beta1, step))),
          float(1 / std::sqrt(1 - std::pow(beta2, step))), float(learning_rate)};
}

struct AdamWConstants {
  float beta1, rest1, beta2, rest2, eps;
};

template <class Real>
struct __align__(4 * sizeof(Real)) Four {
  Real v[4];
};
template <class Real>
__device__ inline Four<Real> load4(const Real* from) {
  return *reinterpret_cast<const Four<Real>*>(from);
}
template <class Real>
__device__ inline void store4(Real* to, const Four<Real>& x) {
  *reinterpret_cast<Four<Real>*>(to) = x;
}

// Launched with ceil(count / 1024) blocks of 256 threads. A thread has four neighbouring elements, so that each access
// of a warp is one contiguous piece of memory. Threads need few registers, so many are resident, and their loads keep
// the memory busy.
//   params, m, v (count): updated;  working (count) = or null;  grads (count);  ring (ring_size)
template <class Real>
__global__ void __launch_bounds__(256)
    adamw_update_kernel(float* params, float* m, float* v, Real* working, const float* grads, size_t count,
                        AdamWConstants c, const AdamWStep* ring, int ring_size, const TrainState* state) {
  wait_for_inputs();
  const size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i >= count || state->overflow) return;
  const AdamWStep step = ring[state->step % ring_size];
  const float scale = state->gradient_scale;
  const Four<float> gs = load4(grads + i);
  Four<float> ps = load4(params + i), ms = load4(m + i), vs = load4(v + i);
  Four<Real> rounded;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float g = gs.v[j] * scale;
    ms.v[j] = c.beta1 * ms.v[j] + c.rest1 * g;
    vs.v[j] = c.beta2 * vs.v[j] + c.rest2 * g * g;
    ps.v[j] = ps.v[j] * step.decay - step.step_size * ms.v[j] / (sqrtf(vs.v[j]) * step.root_correction + c.eps);
    rounded.v[j] = Real(ps.v[j]);
  }
  store4(params + i, ps);
  store4(m + i, ms);
  store4(v + i, vs);
  if (working) store4(working + i, rounded);
}

// Updates params (count), m (count) and v (count) from grads (count) * state->gradient_scale. working (count) = params
// rounded to Real, which the matrix products read; it is null if they read params. Nothing is written if
// state->overflow.
// ring (ring_size): iteration i's row is i % ring_size.
// Elements do not depend on each other, so the gaps between a buffer's tensors do no harm.
template <class Real>
void adamw_update(float* params, float* m, float* v, Real* working, const float* grads, size_t count, double beta1,
                  double beta2, double eps, const AdamWStep* ring, int ring_size, const TrainState* state,
                  cudaStream_t stream) {
  require(count > 0 && count % 4 == 0, "adamw_update: count = ", count, " is not a multiple of 4");
  require(ring_size > 0, "adamw_update: ring_size = ", ring_size);
  // We subtract before we round, as adamw.h does: 1 - float(0.9) differs from float(1 - 0.9) by 2e-7 of its value.
  const AdamWConstants c = {float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps)};
  launch(adamw_update_kernel<Real>, {unsigned(ceil_div(count / 4, 256)), 256, 0, stream}, params, m, v, working, grads,
         count, c, ring, ring_size, state);
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient's norm, for clipping, and whether it is finite, for loss scaling. A trainer that does neither skips
// this, and gradient_scale stays 1. The squares are summed in double, in an order that does not depend on the device.

// So many partial sums, at most: about four thread blocks for each multiprocessor of an H100. Each is of the same number of
// neighbouring elements, a multiple of 1024. Where ranks share the gradients, each has some of the partials.
constexpr int gradient_norm_partials = 512;
constexpr size_t norm_unit(size_t count) { return ceil_div(ceil_div(count, 1024), gradient_norm_partials) * 1024; }

// Launched with 256 threads and a block for each partial sum, the first of which has the number first_unit.
//   partials (ceil(count / unit)) = at the blocks' numbers, the sums of squares of `unit` elements of grads (count)
static __global__ void __launch_bounds__(256)
    gradient_norm_kernel(double* partials, const float* grads, size_t count, size_t unit, size_t first_unit) {
  wait_for_inputs();
  const size_t number = first_unit + blockIdx.x, begin = number * unit, end = min(begin + unit, count);
  double squares = 0;
#pragma unroll 4
  for (size_t i = begin + 4 * threadIdx.x; i < end; i += 4 * 256) {
    const Four<float> g = load4(grads + i);
#pragma unroll
    for (int j = 0; j < 4; j++) squares += double(g.v[j]) * double(g.v[j]);
  }
  squares = block_sum<256>(squares);
  if (threadIdx.x == 0) partials[number] = squares;
}

// Launched with one block of 256 threads: adds partials (n), and thread 0 writes the state.
static __global__ void __launch_bounds__(256)
    prepare_update_kernel(TrainState* state, const double* partials, int n, double grad_clip, bool loss_scaling) {
  wait_for_inputs();
  double squares = 0;
  for (int i = threadIdx.x; i < n; i += 256) squares += partials[i];
  squares = block_sum<256>(squares);
  if (threadIdx.x != 0) return;
  const double scale = state->loss_scale, norm = sqrt(squares) / scale;
  state->gradient_scale = float((grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1) / scale);
  // The squares of floats, summed in double, are finite if and only if the floats are; a comparison with NaN is false.
  state->overflow = loss_scaling && !(squares < INFINITY);
}

// partials (ceil(count / norm_unit(count))) = the sums of squares of grads (count), which prepare_update adds up; of these
// only the units units.first ... units.first + units.count - 1. Gaps between tensors have to be 0.
inline void gradient_norm(double* partials, const float* grads, size_t count, const Part& units, cudaStream_t stream) {
  require(count % 4 == 0, "gradient_norm: count = ", count, " is not a multiple of 4");
  if (units.count == 0) return;
  launch(gradient_norm_kernel, {unsigned(units.count), 256, 0, stream}, partials, grads, count, norm_unit(count),
         units.first);
}

// state->gradient_scale = 1 / loss_scale, or less if the norm of the gradients / loss_scale exceeds grad_clip.
// grad_clip 0 does not clip.
// state->overflow = whether a gradient is not finite, with loss scaling. Without it overflow stays 0: a gradient that
// is not finite then means that training has failed, and the parameters should show it, as they do on the CPU.
// partials: of the gradients (count), from gradient_norm
inline void prepare_update(TrainState* state, const double* partials, size_t count, double grad_clip, bool loss_scaling,
                           cudaStream_t stream) {
  launch(prepare_update_kernel, {1, 256, 0, stream}, state, partials, int(ceil_div(count, norm_unit(count))), grad_clip,
         loss_scaling);
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of a step.

// With this scale, the gradient of the logits of one of 16384 rows is 2 * (softmax - onehot). It is rather too large
// than too small: a scale that is too large is halved at once, one that is too small is doubled only after
// loss_scale_interval steps.
constexpr float loss_scale_start = 0x1p15f;
inline TrainState initial_state(bool loss_scaling) {
  TrainState state;
  if (loss_scaling) state.loss_scale = loss_scale_start;
  return state;
}
// To and from a checkpoint's metadata.
inline void save_loss_scale(std::map<std::string, std::string>& saved, const TrainState& state) {
  saved["loss_scale"] = text(std::setprecision(9), state.loss_scale);  // digits that read back as the same number
  saved["steps_since_overflow"] = text(state.steps_since_overflow);
}
inline void load_loss_scale(TrainState& state, const std::map<std::string, std::string>& saved) {
  if (!saved.count("loss_scale")) return;
  try {
    state.loss_scale = std::stof(saved.at("loss_scale"));
    state.steps_since_overflow = std::stoi(saved.at("steps_since_overflow"));
  } catch (const std::logic_error&) { fail("the checkpoint's loss_scale or steps_since_overflow is no number"); }
}
constexpr int loss_scale_interval = 2000;  // good steps until the scale is doubled, as in PyTorch
// Gradients that never overflow, because they are all 0 for example, would double the scale to infinity. float16 spans
// 2^40 from its smallest number to its largest; a scale of 2^24 turns the smallest into 1.
constexpr float loss_scale_largest = 0x1p24f;

static __global__ void end_step_kernel(TrainState* state, float* loss_ring, int ring_size, double dloss,
                                       bool loss_scaling) {
  wait_for_inputs();
  if (threadIdx.x != 0) return;
  loss_ring[state->step % ring_size] = float(state->loss_sum[0] * dloss);
  // A step without an update counts too, in Adam's bias correction as well: everything that depends on the iteration
  // (batch, masks, learning rate) depends on it alone.
  state->step++;
  if (!loss_scaling) return;
  if (state->overflow) {
    state->loss_scale = fmaxf(state->loss_scale / 2, 1);
    state->steps_since_overflow = state->overflow = 0;
  } else if (++state->steps_since_overflow >= loss_scale_interval) {
    state->loss_scale = fminf(state->loss_scale * 2, loss_scale_largest);
    state->steps_since_overflow = 0;
  }
}

// loss_ring[step % ring_size] = loss_sum[0] * dloss, the step's mean loss; then the next step begins
inline void end_step(TrainState* state, float* loss_ring, int ring_size, double dloss, bool loss_scaling,
                     cudaStream_t stream) {
  require(ring_size > 0, "end_step: ring_size = ", ring_size);
  launch(end_step_kernel, {1, 32, 0, stream}, state, loss_ring, ring_size, dloss, loss_scaling);
}

// What the trainer's update asks for.
struct Optimizer {
  double beta1, beta2, eps, grad_clip;
  bool loss_scaling;      // float16: the loss scale follows the gradients' size
  const AdamWStep* ring;  // (ring_size) on the device: what depends on the iteration
  int ring_size;
  double* norm_partials;  // (gradient_norm_partials) scratch on the device
};
