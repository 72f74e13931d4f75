// Adds a branch, the output of attention or of the feed-forward layer, to the residual stream, and normalises the sum
// for the layer that comes next:
//
//   stream_out = inp + dropout(branch + branch_bias)
//   norm       = layernorm(stream_out)
//
// It reads 25.2 MB and writes 25.2 MB; the floor is the copy of these bytes, 17 us. Random numbers cost time, too: the
// mask is not stored, and one call of the generator, some 60 instructions (philox.cu), gives the draws of eight
// channels. All versions make the CPU's mask: dropout_law.h says which draw decides about which element.
//
//   1  a thread has an element       It calls the generator and uses one of the eight draws. LayerNorm is a kernel of
//                                    its own (the last version of layernorm_forward.cu).
//   2  a thread has eight elements   One call of the generator, 16 bytes at a time. stream_out is still written by one
//                                    kernel and read again by the next.
//   3  one kernel                    A warp has a row and keeps it in registers from the sum to the norm: stream_out is
//                                    written, and never read.
//   4  the shipped kernel            Half a warp has a row: a sum takes four shuffles, not five, and with 384 channels
//                                    every lane has three chunks, where half of version 3's lanes have two and the
//                                    others one.
#include "../../kernels/layernorm.cuh"
#include "../../kernels/layernorm.h"
#include "../../kernels/residual.h"
#include "lab.cuh"

namespace {

// Launched with ceil(rows * C / 256) blocks of 256 threads.
//   stream_out (rows, C) =;  inp, branch (rows, C), branch_bias (C). Draws are numbered over the whole batch, of which
//   these rows begin at drop.first_row * T.
__global__ void __launch_bounds__(256)
    residual_1(bf16* stream_out, const bf16* inp, const bf16* branch, const float* branch_bias, DeviceDropout drop,
               int rows, int T, int C) {
  const unsigned e = blockIdx.x * 256 + threadIdx.x, row = e / C, c = e % C;
  if (row >= unsigned(rows)) return;
  float x = float(branch[e]) + branch_bias[c];
  if (drop.active()) {
    drop.read_step();
    const Philox4 r = random4(drop.seed, drop.step, drop.site, (uint64_t(drop.first_row) * T + row) * (C / 8) + c / 8);
    x = draw_of(r, c % 8) < drop.threshold ? x * drop.keep_scale : 0;
  }
  stream_out[e] = bf16(float(inp[e]) + x);
}

// Stores the sum for one chunk, and returns it rounded as it is stored: LayerNorm must see the numbers that backward
// will read.
//   stream_out, inp, branch: the chunk's eight elements;  branch_bias (8);  counter: the chunk's number in the batch
__device__ inline Float8 residual_8(bf16* stream_out, const bf16* inp, const bf16* branch, const float* branch_bias,
                                    const DeviceDropout& drop, uint64_t counter) {
  Float8 x = load8(inp), added = load8(branch);
  const Float8 b = load8(branch_bias);
#pragma unroll
  for (int i = 0; i < 8; i++) added[i] += b[i];
  if (drop.active()) dropout8(added, drop, counter);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = float(bf16(x[i] + added[i]));
  store8(stream_out, x);
  return x;
}

// Launched with ceil(rows * C / 8 / 256) blocks of 256 threads. The arrays are version 1's.
__global__ void __launch_bounds__(256)
    residual_2(bf16* stream_out, const bf16* inp, const bf16* branch, const float* branch_bias, DeviceDropout drop,
               int rows, int T, int C) {
  const unsigned chunk = blockIdx.x * 256 + threadIdx.x, row_chunks = C / 8;
  if (chunk >= rows * row_chunks) return;
  const size_t at = size_t(chunk) * 8;
  if (drop.active()) drop.read_step();
  residual_8(stream_out + at, inp + at, branch + at, branch_bias + chunk % row_chunks * 8, drop,
             uint64_t(drop.first_row) * T * row_chunks + chunk);
}

// Launched with ceil(rows / 4) blocks of 128 threads: a warp has a row, and a lane its chunks lane, lane + 32, ..., at
// most EACH of them.
//   stream_out, norm (rows, C) =, mean, rstd (rows) =
//   inp, branch (rows, C), branch_bias, weight, bias (C);  drop as in version 1
template <int EACH>
__global__ void __launch_bounds__(128)
    residual_layernorm_3(bf16* stream_out, bf16* norm, float* mean, float* rstd, const bf16* inp, const bf16* branch,
                         const float* branch_bias, DeviceDropout drop, const float* weight, const float* bias, int rows,
                         int T, int C) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp returns
  const size_t at = size_t(row) * C;
  if (drop.active()) drop.read_step();
  const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
  // 1. Compute the row of stream_out: store it, and keep it.
  Float8 x[EACH];
  float sum = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const int chunk = lane + j * 32, c = chunk * 8;
    x[j] = c < C ? residual_8(stream_out + at + c, inp + at + c, branch + at + c, branch_bias + c, drop,
                              first_counter + chunk)
                 : Float8{};
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[j][i];
  }
  // 2. Mean and variance, from registers.
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

// When we check, dropout drops half of all elements and scales the others by 2, and branch_bias has no more digits than
// bfloat16, so the sums of stream_out are exact in float. Every version then rounds them as the CPU does. Otherwise a
// sum midway between two bfloat16 numbers could go up in one and down in the other.
void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), T = s.T, C = s.C;
  const size_t count = size_t(rows) * C;
  const lab::Array<bf16> inp = lab.noise<bf16>(count, 1), branch = lab.noise<bf16>(count, 2, 1, true),
                         stream_out = lab.output<bf16>(count), norm = lab.output<bf16>(count);
  const std::vector<double> exact = rounded<bf16>(noise(C, 3));
  const lab::Array<float> branch_bias = lab.input(std::vector<float>(exact.begin(), exact.end())),
                          weight = lab.noise<float>(C, 4), bias = lab.noise<float>(C, 5),
                          mean = lab.output<float>(rows), rstd = lab.output<float>(rows);
  const lab::Array<int> step = lab.input(std::vector<int>{4711});
  const Dropout drop = {0x123456789abc, 4711, site::fc_dropout + 3, dropout_threshold(lab.checks() ? 0.5 : 0.2), 5};
  if (lab.checks()) {
    std::vector<double> biased = branch.values(), want(count), normalised(count), m(rows), r(rows);
    for (size_t i = 0; i < count; i++) biased[i] += exact[i % C];
    ::residual_forward(want.data(), inp.values().data(), biased.data(), drop, s.B, T, C);
    for (double& x : want) x = double(float(bf16(float(x))));
    ::layernorm_forward(normalised.data(), m.data(), r.data(), want.data(), weight.values().data(),
                        bias.values().data(), rows, C);
    const double sums = 4 * std::sqrt(C) * 0x1p-24;  // how far float sums of C terms may be off
    stream_out.expect(want, 0x1p-24);                // only the correct 16 bits pass
    norm.expect(normalised, rounding_of<bf16> + sums);
    mean.expect(m, sums);
    rstd.expect(r, sums);
  }
  const auto dropout = [=](int set) { return lab::on_device(drop, step[set]); };
  lab.needs(4.0 * double(count) * sizeof(bf16) + 8.0 * rows + 12.0 * C, 0);

  const auto then_layernorm = [=](int set, cudaStream_t stream) {
    layernorm_forward(norm[set], mean[set], rstd[set], static_cast<const bf16*>(stream_out[set]), weight[set],
                      bias[set], rows, C, stream);
  };
  lab.version({1, "a thread has an element, then LayerNorm", 60}, [=](int set, cudaStream_t stream) {
    launch(residual_1, {unsigned(ceil_div(count, 256)), 256, 0, stream}, stream_out[set], inp[set], branch[set],
           branch_bias[set], dropout(set), rows, T, C);
    then_layernorm(set, stream);
  });
  lab.version({2, "a thread has eight, then LayerNorm", 27}, [=](int set, cudaStream_t stream) {
    launch(residual_2, {unsigned(ceil_div(count / 8, 256)), 256, 0, stream}, stream_out[set], inp[set], branch[set],
           branch_bias[set], dropout(set), rows, T, C);
    then_layernorm(set, stream);
  });
  lab.version({3, "one kernel: a warp has a row", 25}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
      launch(kernel, {unsigned(ceil_div(rows, 4)), 128, 0, stream}, stream_out[set], norm[set], mean[set], rstd[set],
             inp[set], branch[set], branch_bias[set], dropout(set), weight[set], bias[set], rows, T, C);
    };
    C <= 256 ? run(residual_layernorm_3<1>) : run(residual_layernorm_3<2>);
  });
  lab.version({4, "shipped: half a warp has a row", 22}, [=](int set, cudaStream_t stream) {
    residual_layernorm_forward(stream_out[set], norm[set], mean[set], rstd[set], static_cast<const bf16*>(inp[set]),
                               static_cast<const bf16*>(branch[set]), branch_bias[set], dropout(set), weight[set],
                               bias[set], s.B, T, C, stream);
  });
}
// Sizes: one row; blocks that are not full; rows of one chunk, of six, and of more chunks than a warp has lanes.
const lab::Listed listed({"residual_layernorm_forward", describe, {{1, 1, 384}, {3, 31, 48}, {2, 9, 384}, {5, 7, 8}}});

}  // namespace
