// Softmax and cross-entropy with its gradient: loss = log(sum_v exp(logits_v)) - logits_target and dlogits = (softmax -
// onehot) * dloss * loss_scale, for each row of V logits.
//
// A row has Vp elements, V = 65 rounded up to 72, so that each row begins on a multiple of 16 bytes. No version may use
// the padding (here it is NaN, so that we notice), and its gradient is 0. The kernel reads 2.4 MB and writes 2.4 MB,
// which takes the memory less than 2 us. Most of its time is waiting: for the first load, then for each shuffle of a
// sum.
//
//   1  a thread has a row            Three passes over it: the maximum, the sum, the gradient. The 32 threads of a warp
//                                    read 32 addresses that are a row apart, so one load touches 32 lines of memory.
//                                    There are 512 warps for 132 multiprocessors, too few to hide the waiting.
//   2  a warp has a row              The threads of a warp read neighbouring columns, and there are 32 times as many
//                                    warps. Maximum and sum go through shuffles.
//   3  a running softmax             One pass finds both maximum and sum: the sum so far is relative to the largest
//                                    logit so far, and shrinks when a larger one comes. A second pass writes the
//                                    gradient.
//   4  the shipped kernel            A lane has eight columns, 16 bytes, at a time, and half a warp has a row: all
//                                    loads of a row are under way at once, and a sum takes four shuffles, not five.
#include "../../kernels/crossentropy.cuh"
#include "../../kernels/crossentropy.h"
#include "lab.cuh"

namespace {

// Launched with ceil(rows / 128) blocks of 128 threads.
//   losses (rows) =, dlogits (rows, Vp) =;  logits (rows, Vp), targets (rows), loss_scale (1)
__global__ void __launch_bounds__(128)
    crossentropy_1(float* losses, bf16* dlogits, const bf16* logits, const int* targets, float dloss,
                   const float* loss_scale, int rows, int V, int Vp) {
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= rows) return;
  const bf16* const x = logits + size_t(row) * Vp;
  const int target = targets[row];
  float max = -FLT_MAX, sum = 0;
  for (int v = 0; v < V; v++) max = fmaxf(max, float(x[v]));
  for (int v = 0; v < V; v++) sum += expf(float(x[v]) - max);  // <= 1: nothing overflows
  const float inverse = 1 / sum, scale = dloss * *loss_scale;
  for (int v = 0; v < Vp; v++) {
    const float d = v < V ? (expf(float(x[v]) - max) * inverse - float(v == target)) * scale : 0;
    dlogits[size_t(row) * Vp + v] = bf16(d);
  }
  losses[row] = logf(sum) - (float(x[target]) - max);
}

// Launched with ceil(rows / 4) blocks of 128 threads: a warp has a row, a lane columns lane, lane + 32, ... The shapes
// are version 1's.
__global__ void __launch_bounds__(128)
    crossentropy_2(float* losses, bf16* dlogits, const bf16* logits, const int* targets, float dloss,
                   const float* loss_scale, int rows, int V, int Vp) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp returns
  const bf16* const x = logits + size_t(row) * Vp;
  const int target = targets[row];
  float max = -FLT_MAX, sum = 0;
  for (int v = lane; v < V; v += 32) max = fmaxf(max, float(x[v]));
  max = lane_max(max);
  for (int v = lane; v < V; v += 32) sum += expf(float(x[v]) - max);
  sum = lane_sum(sum);
  const float inverse = 1 / sum, scale = dloss * *loss_scale;
  for (int v = lane; v < Vp; v += 32) {
    const float d = v < V ? (expf(float(x[v]) - max) * inverse - float(v == target)) * scale : 0;
    dlogits[size_t(row) * Vp + v] = bf16(d);
  }
  if (lane == 0) losses[row] = logf(sum) - (float(x[target]) - max);
}

// Launched as version 2, with its shapes.
__global__ void __launch_bounds__(128)
    crossentropy_3(float* losses, bf16* dlogits, const bf16* logits, const int* targets, float dloss,
                   const float* loss_scale, int rows, int V, int Vp) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const bf16* const x = logits + size_t(row) * Vp;
  const int target = targets[row];
  // 1. The lane's own columns. A lane that has none is left with a sum of 0.
  float max = -FLT_MAX, sum = 0;
  for (int v = lane; v < V; v += 32) {
    const float logit = float(x[v]), larger = fmaxf(max, logit);
    sum = sum * expf(max - larger) + expf(logit - larger);
    max = larger;
  }
  // 2. Make the lanes' sums relative to the row's maximum, and add them.
  const float row_max = lane_max(max);
  sum = lane_sum(sum * expf(max - row_max));
  // 3. The gradient.
  const float inverse = 1 / sum, scale = dloss * *loss_scale;
  for (int v = lane; v < Vp; v += 32) {
    const float d = v < V ? (expf(float(x[v]) - row_max) * inverse - float(v == target)) * scale : 0;
    dlogits[size_t(row) * Vp + v] = bf16(d);
  }
  if (lane == 0) losses[row] = logf(sum) - (float(x[target]) - row_max);
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), V = s.V, Vp = padded_vocabulary(V);
  const float dloss = 1.f / float(rows), loss_scale = 64;
  const std::vector<double> wide = rounded<bf16>(noise(size_t(rows) * V, 1, 2));
  std::vector<bf16> values(size_t(rows) * Vp, bf16(NAN));
  std::vector<int> y(rows);
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < V; v++) values[size_t(r) * Vp + v] = bf16(float(wide[size_t(r) * V + v]));
    y[r] = int(random4(7, 0, 0, r).word[0] % V);
  }
  y[0] = V - 1;
  const lab::Array<bf16> logits = lab.input(values, true), dlogits = lab.output<bf16>(values.size());
  const lab::Array<int> targets = lab.input(y);
  const lab::Array<float> losses = lab.output<float>(rows), scale = lab.input(std::vector<float>{loss_scale});
  if (lab.checks()) {
    std::vector<double> want(rows), probs(wide.size()), d(wide.size()), padded(values.size(), 0);
    ::crossentropy_forward(want.data(), probs.data(), wide.data(), y.data(), rows, V);
    ::crossentropy_backward(d.data(), probs.data(), y.data(), double(dloss) * loss_scale, rows, V);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < V; v++) padded[size_t(r) * Vp + v] = d[size_t(r) * V + v];
    // A logit's distance from the largest is up to about 10, and is rounded once. Its exponential is then off by up to
    // 8 * 2^-24 of itself. A float sum of V exponentials adds an error of about sqrt(V) * 2^-24.
    const double sums = (8 + 2 * std::sqrt(V)) * 0x1p-24;
    losses.expect(want, sums);
    dlogits.expect(padded, rounding_of<bf16> + sums);
  }
  lab.needs(double(values.size()) * 2 * sizeof(bf16) + 8.0 * rows, 0);

  const auto version = [&](const lab::Version& v, auto kernel, int rows_of_block) {
    lab.version(v, [=](int set, cudaStream_t stream) {
      launch(kernel, {unsigned(ceil_div(rows, rows_of_block)), 128, 0, stream}, losses[set], dlogits[set], logits[set],
             targets[set], dloss, scale[set], rows, V, Vp);
    });
  };
  version({1, "a thread has a row, three passes", 40}, crossentropy_1, 128);
  version({2, "a warp has a row", 9}, crossentropy_2, 4);
  version({3, "a running softmax: two passes", 8}, crossentropy_3, 4);
  // In a step the gradient overwrites the logits (crossentropy_forward_backward). Here it does not, so that a version
  // finds the same logits every time.
  lab.version({4, "shipped: 16 bytes at a time, half a warp", 6.5}, [=](int set, cudaStream_t stream) {
    launch_crossentropy<bf16, true>(losses[set], logits[set], dlogits[set], targets[set], dloss, scale[set], rows, V,
                                    Vp, stream);
  });
}
const lab::Listed listed({"crossentropy",
                          describe,
                          {{3, 31, 8, 1, 65}, {1, 1, 8, 1, 65}, {1, 9, 8, 1, 7}, {1, 6, 8, 1, 300}}});

}  // namespace
