// AdamW: m and v are running means of the gradient g and of its square, and move the parameter p. The matrix products
// read a copy of p, rounded to bf16. The equations are in adamw.h.
//
// There are 10.8 million parameters, and each moves 30 bytes: p, m, v and g are read; p, m, v and the copy are written.
// These 324 MB take 108 us. There is little arithmetic, so the versions differ only in how they ask for the bytes.
// Expect small differences: every version has enough threads to keep the memory busy.
//
//   1  a thread has an element       It has four loads of 4 bytes under way, and then waits.
//   2  a thread has four             All 16 loads come before the first number is used: four times as many are under
//                                    way in each thread. A warp still reads 128 bytes a load.
//   3  the shipped kernel            A thread's four elements are neighbours, so a load has 16 bytes: the same bytes
//                                    with a quarter of the instructions.
#include "../../kernels/adamw.cuh"
#include "../../kernels/adamw.h"
#include "lab.cuh"

namespace {

// One element's update: p, m, v change.
__device__ inline void update(float& p, float& m, float& v, float grad, const AdamWConstants& c, const AdamWStep& step,
                              float scale) {
  const float g = grad * scale;
  m = c.beta1 * m + c.rest1 * g;
  v = c.beta2 * v + c.rest2 * g * g;
  p = p * step.decay - step.step_size * m / (sqrtf(v) * step.root_correction + c.eps);
}

// Launched with ceil(count / 256) blocks of 256 threads.
//   params, m, v (count): updated;  working (count) = the copy;  grads (count)
//   ring (ring_size): numbers that depend on the iteration;  state (1): which iteration it is, adamw.cuh
__global__ void __launch_bounds__(256)
    adamw_1(float* params, float* m, float* v, bf16* working, const float* grads, size_t count, AdamWConstants c,
            const AdamWStep* ring, int ring_size, const TrainState* state) {
  const size_t i = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count || state->overflow) return;
  update(params[i], m[i], v[i], grads[i], c, ring[state->step % ring_size], state->gradient_scale);
  working[i] = bf16(params[i]);
}

// Launched with ceil(count / 1024) blocks of 256 threads. A thread has elements i, i + 256, i + 512, i + 768, so that
// neighbouring threads still read neighbouring elements. The shapes are version 1's.
__global__ void __launch_bounds__(256)
    adamw_2(float* params, float* m, float* v, bf16* working, const float* grads, size_t count, AdamWConstants c,
            const AdamWStep* ring, int ring_size, const TrainState* state) {
  const size_t first = size_t(blockIdx.x) * 1024 + threadIdx.x;
  if (state->overflow) return;
  const AdamWStep step = ring[state->step % ring_size];
  const float scale = state->gradient_scale;
  // 1. All loads. Past the end there is nothing to load.
  float ps[4], ms[4], vs[4], gs[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const size_t i = first + j * 256;
    const bool there = i < count;
    ps[j] = there ? params[i] : 0, ms[j] = there ? m[i] : 0, vs[j] = there ? v[i] : 0, gs[j] = there ? grads[i] : 0;
  }
  // 2. Compute and store.
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const size_t i = first + j * 256;
    if (i >= count) continue;
    update(ps[j], ms[j], vs[j], gs[j], c, step, scale);
    params[i] = ps[j], m[i] = ms[j], v[i] = vs[j];
    working[i] = bf16(ps[j]);
  }
}

// Larger than in training, so that an update is about as large as the parameter, and an error in any term shows.
constexpr double beta1 = 0.9, beta2 = 0.99, eps = 1e-2, weight_decay = 0.3, learning_rate = 0.5;
constexpr int layers = 6, iteration = 3, ring_size = 8;

void describe(lab::Lab& lab, const lab::Sizes& s) {
  // The number of the model's parameters, without the gaps between tensors, rounded up to a multiple of 4.
  const size_t count = ceil_div(parameter_layout({s.V, s.T, s.C, layers, s.NH}).count(), 4) * 4;
  std::vector<float> squares = noise(count, 3);
  for (float& v : squares) v = std::fabs(v);
  std::vector<AdamWStep> steps(ring_size);  // other iterations' rows are zeros
  steps[iteration % ring_size] = adamw_step(learning_rate, beta1, beta2, weight_decay, iteration + 1);
  const lab::Array<float> params = lab.updated<float>(count, 1), m = lab.updated<float>(count, 2),
                          v = lab.updated(squares), grads = lab.noise<float>(count, 4);
  const lab::Array<bf16> working = lab.output<bf16>(count);
  const lab::Array<AdamWStep> ring = lab.input(steps);
  const lab::Array<TrainState> state = lab.input(std::vector<TrainState>{{.step = iteration, .gradient_scale = 0.75f}});
  if (lab.checks()) {
    std::vector<double> p = params.values(), want_m = m.values(), want_v = v.values();
    ::adamw_update(p.data(), want_m.data(), want_v.data(), grads.values().data(), count,
                   {learning_rate, beta1, beta2, eps, weight_decay, iteration + 1, 0.75});
    const double tolerance = 8 * 0x1p-24;  // each number is rounded a few times
    params.expect(p, tolerance);
    m.expect(want_m, tolerance);
    v.expect(want_v, tolerance);
    working.expect(p, rounding_of<bf16> + tolerance);
  }
  lab.needs(30.0 * double(count), 0);

  const AdamWConstants c = {float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps)};
  const auto version = [&](const lab::Version& number, auto kernel, int elements_of_block) {
    lab.version(number, [=](int set, cudaStream_t stream) {
      launch(kernel, {unsigned(ceil_div(count, elements_of_block)), 256, 0, stream}, params[set], m[set], v[set],
             working[set], grads[set], count, c, ring[set], ring_size, state[set]);
    });
  };
  version({1, "a thread has an element", 125}, adamw_1, 256);
  version({2, "a thread has four, 256 apart", 118}, adamw_2, 1024);
  lab.version({3, "shipped: four neighbours, 16 bytes a load", 112}, [=](int set, cudaStream_t stream) {
    adamw_update(params[set], m[set], v[set], working[set], grads[set], count, beta1, beta2, eps, ring[set], ring_size,
                 state[set], stream);
  });
}
const lab::Listed listed({"adamw", describe, {{1, 31, 8, 1, 65}, {1, 1, 8, 1, 7}}});

}  // namespace
