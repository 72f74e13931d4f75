// LayerNorm, forward: norm = (inp - mean) * rstd * weight + bias, for each row of C channels, with rstd = 1 /
// sqrt(variance + 1e-5). mean and rstd are kept for backward.
//
// It reads 12.6 MB and writes 12.6 MB, and computes next to nothing: the floor is the copy of these bytes. All versions
// do the same arithmetic; they differ in who reads what, and how often.
//
//   1  a thread has a row            Neighbouring threads read addresses that are a whole row apart. Memory delivers 32
//                                    bytes at a time, of which the thread uses two. And it goes through its row three
//                                    times.
//   2  a block has a row             Neighbouring threads read neighbouring channels. Sums go through shared memory.
//   3  a warp has a row              Sums go through shuffles: no barrier, no shared memory.
//   4  16 bytes at a time, once      A lane loads a chunk of eight channels at a time and keeps its chunks in
//                                    registers, so the row is read once.
//   5  the shipped kernel            Half a warp has a row: a sum takes four shuffles, not five, and each lane has
//                                    three of the row's 48 chunks, where version 4's lanes have one or two.
#include "../../kernels/layernorm.cuh"
#include "../../kernels/layernorm.h"
#include "lab.cuh"

namespace {

// Launched with ceil(rows / 128) blocks of 128 threads. Arrays with = are written, the others are read.
//   norm (rows, C) =, mean, rstd (rows) =;  inp (rows, C), weight, bias (C)
__global__ void layernorm_forward_1(bf16* norm, float* mean, float* rstd, const bf16* inp, const float* weight,
                                    const float* bias, int rows, int C) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const bf16* const x = inp + size_t(row) * C;
  float sum = 0, squares = 0;
  for (int c = 0; c < C; c++) sum += float(x[c]);
  const float m = sum / C;
  for (int c = 0; c < C; c++) squares += (float(x[c]) - m) * (float(x[c]) - m);
  const float s = 1 / sqrtf(squares / C + 1e-5f);
  for (int c = 0; c < C; c++) norm[size_t(row) * C + c] = bf16((float(x[c]) - m) * s * weight[c] + bias[c]);
  mean[row] = m;
  rstd[row] = s;
}

// Launched with a block of 128 threads for each row. A thread has channels threadIdx.x, threadIdx.x + 128, ...
__global__ void __launch_bounds__(128) layernorm_forward_2(bf16* norm, float* mean, float* rstd, const bf16* inp,
                                                           const float* weight, const float* bias, int C) {
  const int row = blockIdx.x;
  const bf16* const x = inp + size_t(row) * C;
  float sum = 0, squares = 0;
  for (int c = threadIdx.x; c < C; c += 128) sum += float(x[c]);
  const float m = block_sum<128>(sum) / C;
  for (int c = threadIdx.x; c < C; c += 128) squares += (float(x[c]) - m) * (float(x[c]) - m);
  const float s = 1 / sqrtf(block_sum<128>(squares) / C + 1e-5f);
  for (int c = threadIdx.x; c < C; c += 128)
    norm[size_t(row) * C + c] = bf16((float(x[c]) - m) * s * weight[c] + bias[c]);
  if (threadIdx.x == 0) mean[row] = m, rstd[row] = s;
}

// Launched with ceil(rows / 4) blocks of 128 threads: a warp has a row, a lane channels lane, lane + 32, ...
__global__ void __launch_bounds__(128) layernorm_forward_3(bf16* norm, float* mean, float* rstd, const bf16* inp,
                                                           const float* weight, const float* bias, int rows, int C) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp returns, as lane_sum needs all its lanes
  const bf16* const x = inp + size_t(row) * C;
  float sum = 0, squares = 0;
  for (int c = lane; c < C; c += 32) sum += float(x[c]);
  const float m = lane_sum(sum) / C;
  for (int c = lane; c < C; c += 32) squares += (float(x[c]) - m) * (float(x[c]) - m);
  const float s = 1 / sqrtf(lane_sum(squares) / C + 1e-5f);
  for (int c = lane; c < C; c += 32) norm[size_t(row) * C + c] = bf16((float(x[c]) - m) * s * weight[c] + bias[c]);
  if (lane == 0) mean[row] = m, rstd[row] = s;
}

// Launched as version 3. A lane has chunks lane, lane + 32, ... of eight channels, at most EACH of them, in registers.
template <int EACH>
__global__ void __launch_bounds__(128) layernorm_forward_4(bf16* norm, float* mean, float* rstd, const bf16* inp,
                                                           const float* weight, const float* bias, int rows, int C) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const size_t at = size_t(row) * C;
  // 1. Read the row, once. All loads come before anything depends on them.
  Float8 x[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) x[j] = (lane + j * 32) * 8 < C ? load8(inp + at + (lane + j * 32) * 8) : Float8{};
  // 2. Mean and variance, from registers.
  float sum = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++)
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[j][i];
  const float m = lane_sum(sum) / C;
#pragma unroll
  for (int j = 0; j < EACH; j++)
#pragma unroll
    for (int i = 0; i < 8; i++) squares += (lane + j * 32) * 8 < C ? (x[j][i] - m) * (x[j][i] - m) : 0;
  const float s = 1 / sqrtf(lane_sum(squares) / C + 1e-5f);
  // 3. Normalise and store.
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const int c = (lane + j * 32) * 8;
    if (c >= C) continue;
    const Float8 w = load8(weight + c), b = load8(bias + c);
#pragma unroll
    for (int i = 0; i < 8; i++) x[j][i] = (x[j][i] - m) * s * w[i] + b[i];
    store8(norm + at + c, x[j]);
  }
  if (lane == 0) mean[row] = m, rstd[row] = s;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), C = s.C;
  const size_t count = size_t(rows) * C;
  const lab::Array<bf16> inp = lab.noise<bf16>(count, 1, 1, true), norm = lab.output<bf16>(count);
  const lab::Array<float> weight = lab.noise<float>(C, 2), bias = lab.noise<float>(C, 3),
                          mean = lab.output<float>(rows), rstd = lab.output<float>(rows);
  if (lab.checks()) {
    std::vector<double> want(count), m(rows), r(rows);
    ::layernorm_forward(want.data(), m.data(), r.data(), inp.values().data(), weight.values().data(),
                        bias.values().data(), rows, C);
    const double sums = 4 * std::sqrt(C) * 0x1p-24;  // how far float sums of C terms may be off
    norm.expect(want, rounding_of<bf16> + sums);
    mean.expect(m, sums);
    rstd.expect(r, sums);
  }
  lab.needs(double(count) * 2 * sizeof(bf16) + 8.0 * rows, 0);

  lab.version({1, "a thread has a row", 400}, [=](int set, cudaStream_t stream) {
    launch(layernorm_forward_1, {unsigned(ceil_div(rows, 128)), 128, 0, stream}, norm[set], mean[set], rstd[set],
           inp[set], weight[set], bias[set], rows, C);
  });
  lab.version({2, "a block has a row", 40}, [=](int set, cudaStream_t stream) {
    launch(layernorm_forward_2, {unsigned(rows), 128, 0, stream}, norm[set], mean[set], rstd[set], inp[set],
           weight[set], bias[set], C);
  });
  lab.version({3, "a warp has a row", 22}, [=](int set, cudaStream_t stream) {
    launch(layernorm_forward_3, {unsigned(ceil_div(rows, 4)), 128, 0, stream}, norm[set], mean[set], rstd[set],
           inp[set], weight[set], bias[set], rows, C);
  });
  lab.version({4, "16 bytes at a time, and only once", 13}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
      launch(kernel, {unsigned(ceil_div(rows, 4)), 128, 0, stream}, norm[set], mean[set], rstd[set], inp[set],
             weight[set], bias[set], rows, C);
    };
    if (C <= 256)
      run(layernorm_forward_4<1>);
    else
      run(layernorm_forward_4<2>);
  });
  lab.version({5, "shipped: half a warp has a row", 12.5}, [=](int set, cudaStream_t stream) {
    layernorm_forward(norm[set], mean[set], rstd[set], inp[set], weight[set], bias[set], rows, C, stream);
  });
}
const lab::Listed listed({"layernorm_forward", describe, {{3, 31, 48}, {1, 1, 384}, {2, 33, 384}, {5, 7, 8}}});

}  // namespace
