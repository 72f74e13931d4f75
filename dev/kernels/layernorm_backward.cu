// LayerNorm, backward. With n = (inp - mean) * rstd and g = dnorm * weight, for each row of C channels:
//
//   dstream += (g - mean(g) - n * mean(g * n)) * rstd         sums along a row
//   dweight  = sum of dnorm * n,   dbias = sum of dnorm       sums down the columns, over all 16384 rows
//
// It is hard because the sums go in two directions. It reads 37.7 MB and writes 12.6 MB, and computes next to nothing:
// the floor is the copy of these bytes, 17 us. The model's kernel also makes the branch's gradient, with dropout; we
// leave that out here.
//
//   1  a thread has a row, or a      Two kernels. In the first, neighbouring threads read addresses a whole row apart.
//      channel                       In the second, a thread for each channel goes down all rows: 384 threads, on a
//                                    card with room for 270 000.
//   2  partial sums                  A block adds up the columns of 64 rows only, and writes its sums to memory.
//                                    add_partials adds these up (column_sums.cu). Now the rows' kernel is the slow one.
//   3  a warp has a row              Neighbouring lanes read neighbouring chunks of 16 bytes, and keep them in
//                                    registers from the sums to the result. inp and dnorm are still read twice, by
//                                    two kernels.
//   4  one kernel                    for rows and columns; add_partials is still behind it. A warp takes 16 of the
//                                    block's 64 rows in turn, and its lanes keep their channels' sums in registers
//                                    meanwhile. Each byte moves once. But while a warp works on a row, none of its
//                                    loads is under way, and 256 blocks are only eight warps for a multiprocessor, too
//                                    few to hide that.
//   5  the shipped kernel            Half a warp has a row, and the next row is on its way to shared memory while this
//                                    one is in use.
#include "../../kernels/layernorm.cuh"
#include "../../kernels/layernorm.h"
#include "lab.cuh"

namespace {

// The rows' part, launched with ceil(rows / 128) blocks of 128 threads: a thread has a row.
//   dstream (rows, C) +=;  dnorm, inp (rows, C), mean, rstd (rows), weight (C)
__global__ void __launch_bounds__(128)
    layernorm_backward_1(bf16* dstream, const bf16* dnorm, const bf16* inp, const float* mean, const float* rstd,
                         const float* weight, int rows, int C) {
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= rows) return;
  const bf16 *const x = inp + size_t(row) * C, *const d = dnorm + size_t(row) * C;
  bf16* const dx = dstream + size_t(row) * C;
  const float m = mean[row], s = rstd[row];
  float sum_g = 0, sum_gn = 0;
  for (int c = 0; c < C; c++) {
    const float g = float(d[c]) * weight[c];
    sum_g += g;
    sum_gn += g * (float(x[c]) - m) * s;
  }
  for (int c = 0; c < C; c++) {
    const float n = (float(x[c]) - m) * s;
    dx[c] = bf16(float(dx[c]) + (float(d[c]) * weight[c] - sum_g / C - n * (sum_gn / C)) * s);
  }
}

// The columns' part, launched with (ceil(C / 128), blocks) blocks of 128 threads: a thread has a channel, and the block
// has block_rows of the rows, the last block maybe fewer. Version 1 has one block for all rows, and the sums are the
// gradients; version 2 has a block for each 64 rows.
//   sums (blocks, 2, C) = the sums for dweight, then those for dbias;  dnorm, inp (rows, C), mean, rstd (rows)
__global__ void __launch_bounds__(128)
    layernorm_backward_1_columns(float* sums, const bf16* dnorm, const bf16* inp, const float* mean, const float* rstd,
                                 int block_rows, int rows, int C) {
  const int c = blockIdx.x * 128 + threadIdx.x, first = blockIdx.y * block_rows;
  if (c >= C) return;
  float dweight = 0, dbias = 0;
  for (int row = first; row < min(rows, first + block_rows); row++) {
    const size_t at = size_t(row) * C + c;
    const float d = float(dnorm[at]);
    dweight += d * (float(inp[at]) - mean[row]) * rstd[row];
    dbias += d;
  }
  sums[size_t(blockIdx.y) * 2 * C + c] = dweight;
  sums[(size_t(blockIdx.y) * 2 + 1) * C + c] = dbias;
}

// A lane's part of a row: chunks lane, lane + 32, ... of eight channels, at most EACH of them. Chunks behind the end of
// the row are 0, so they add nothing to any sum.
template <int EACH>
struct RowPart {
  Float8 x[EACH], d[EACH], dx[EACH];  // of inp, dnorm, dstream

  __device__ void load(const bf16* inp, const bf16* dnorm, const bf16* dstream, size_t at, int C) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int c = (threadIdx.x % 32 + j * 32) * 8;
      x[j] = c < C ? load8(inp + at + c) : Float8{};
      d[j] = c < C ? load8(dnorm + at + c) : Float8{};
      dx[j] = c < C ? load8(dstream + at + c) : Float8{};
    }
  }
  // Turns x into n, adds the gradient through the normalisation to dx, and stores dx. All lanes of the warp must call
  // together.
  __device__ void finish(bf16* dstream, size_t at, float m, float s, const float* weight, int C) {
    float sum_g = 0, sum_gn = 0;
    Float8 g[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int c = (threadIdx.x % 32 + j * 32) * 8;
      const Float8 w = c < C ? load8(weight + c) : Float8{};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        x[j][i] = (x[j][i] - m) * s;
        g[j][i] = d[j][i] * w[i];
        sum_g += g[j][i];
        sum_gn += g[j][i] * x[j][i];
      }
    }
    const float mean_g = lane_sum(sum_g) / C, mean_gn = lane_sum(sum_gn) / C;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int c = (threadIdx.x % 32 + j * 32) * 8;
      if (c >= C) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) dx[j][i] += (g[j][i] - mean_g - x[j][i] * mean_gn) * s;
      store8(dstream + at + c, dx[j]);
    }
  }
};

// The rows' part, launched with ceil(rows / 4) blocks of 128 threads: a warp has a row. The arrays are version 1's.
template <int EACH>
__global__ void __launch_bounds__(128)
    layernorm_backward_3(bf16* dstream, const bf16* dnorm, const bf16* inp, const float* mean, const float* rstd,
                         const float* weight, int rows, int C) {
  const int row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp returns
  RowPart<EACH> part;
  part.load(inp, dnorm, dstream, size_t(row) * C, C);
  part.finish(dstream, size_t(row) * C, mean[row], rstd[row], weight, C);
}

// Both parts, launched with ceil(rows / 64) blocks of 128 threads: the block's four warps take turns at its 64 rows.
//   dstream (rows, C) +=, partials (blocks, 2, C) = the block's sums for dweight, then those for dbias
//   dnorm, inp (rows, C), mean, rstd (rows), weight (C)
template <int EACH>
__global__ void __launch_bounds__(128)
    layernorm_backward_4(bf16* dstream, float* partials, const bf16* dnorm, const bf16* inp, const float* mean,
                         const float* rstd, const float* weight, int rows, int C) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * sums_block_rows, end = min(rows, first + sums_block_rows);
  // 1. Go through the warp's rows. The lane keeps its channels' sums.
  Float8 dweight[EACH] = {}, dbias[EACH] = {};
  for (int row = first + warp; row < end; row += 4) {
    RowPart<EACH> part;
    part.load(inp, dnorm, dstream, size_t(row) * C, C);
    part.finish(dstream, size_t(row) * C, mean[row], rstd[row], weight, C);
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        dweight[j][i] += part.d[j][i] * part.x[j][i];
        dbias[j][i] += part.d[j][i];
      }
  }
  // 2. Add the warps' sums, in order, by way of shared memory: a thread has channels threadIdx.x, + 128, ...
  __shared__ __align__(16) float warp_sums[4][2][EACH * 256];
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    store8(&warp_sums[warp][0][(lane + j * 32) * 8], dweight[j]);
    store8(&warp_sums[warp][1][(lane + j * 32) * 8], dbias[j]);
  }
  __syncthreads();
  for (int kind = 0; kind < 2; kind++)
    for (int c = threadIdx.x; c < C; c += 128) {
      float total = 0;
      for (int w = 0; w < 4; w++) total += warp_sums[w][kind][c];
      partials[(size_t(blockIdx.x) * 2 + kind) * C + c] = total;
    }
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), C = s.C;
  const size_t count = size_t(rows) * C;
  const lab::Array<bf16> dnorm = lab.noise<bf16>(count, 1, 1, true), inp = lab.noise<bf16>(count, 2),
                         dstream = lab.updated<bf16>(count, 3);
  const lab::Array<float> weight = lab.noise<float>(C, 4), partials = lab.output<float>(layernorm_partials(rows, C)),
                          gradients = lab.output<float>(2 * size_t(C));  // (2, C): dweight, dbias
  std::vector<float> means, rstds;                                       // forward's; times do not depend on them
  if (lab.checks()) {
    const std::vector<double> x = inp.values(), w = weight.values();
    std::vector<double> norm(count), m(rows), r(rows), want = dstream.values(), sums(2 * size_t(C));
    ::layernorm_forward(norm.data(), m.data(), r.data(), x.data(), w.data(), w.data(), rows, C);
    means.assign(m.begin(), m.end()), rstds.assign(r.begin(), r.end());
    m.assign(means.begin(), means.end()), r.assign(rstds.begin(), rstds.end());
    ::layernorm_backward(want.data(), sums.data(), sums.data() + C, dnorm.values().data(), x.data(), m.data(), r.data(),
                         w.data(), rows, C);
    const double row_sums = 4 * std::sqrt(C) * 0x1p-24, column_sums = 4 * std::sqrt(rows) * 0x1p-24;
    dstream.expect(want, rounding_of<bf16> + row_sums);
    gradients.expect(sums, row_sums + column_sums);  // mean and rstd, in each term, carry the rounding of a row's sums
  } else {
    means.assign(rows, 0), rstds.assign(rows, 1);
  }
  const lab::Array<float> mean = lab.input(means), rstd = lab.input(rstds);
  lab.needs(4.0 * double(count) * sizeof(bf16) + 8.0 * rows + 12.0 * C, 0);

  const int blocks = ceil_div(rows, sums_block_rows);
  const unsigned strips = unsigned(ceil_div(C, 128));
  const auto row_kernel_1 = [=](int set, cudaStream_t stream) {
    launch(layernorm_backward_1, {unsigned(ceil_div(rows, 128)), 128, 0, stream}, dstream[set], dnorm[set], inp[set],
           mean[set], rstd[set], weight[set], rows, C);
  };
  const auto add = [=](int set, cudaStream_t stream) {
    add_partials({Sums{blocks, C, 1, 2, partials[set], 0, {gradients[set], gradients[set] + C}, {}}}, stream);
  };
  const auto partial_columns = [=](int set, cudaStream_t stream) {
    launch(layernorm_backward_1_columns, {{strips, unsigned(blocks)}, 128, 0, stream}, partials[set], dnorm[set],
           inp[set], mean[set], rstd[set], sums_block_rows, rows, C);
    add(set, stream);
  };
  lab.version({1, "a thread has a row, or a channel", 3200}, [=](int set, cudaStream_t stream) {
    row_kernel_1(set, stream);
    launch(layernorm_backward_1_columns, {{strips, 1}, 128, 0, stream}, gradients[set], dnorm[set], inp[set], mean[set],
           rstd[set], rows, rows, C);
  });
  lab.version({2, "partial sums of 64 rows", 300}, [=](int set, cudaStream_t stream) {
    row_kernel_1(set, stream);
    partial_columns(set, stream);
  });
  lab.version({3, "a warp has a row", 45}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
      launch(kernel, {unsigned(ceil_div(rows, 4)), 128, 0, stream}, dstream[set], dnorm[set], inp[set], mean[set],
             rstd[set], weight[set], rows, C);
    };
    C <= 256 ? run(layernorm_backward_3<1>) : run(layernorm_backward_3<2>);
    partial_columns(set, stream);
  });
  lab.version({4, "one kernel: a warp has 16 rows", 32}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
      launch(kernel, {unsigned(blocks), 128, 0, stream}, dstream[set], partials[set], dnorm[set], inp[set], mean[set],
             rstd[set], weight[set], rows, C);
    };
    C <= 256 ? run(layernorm_backward_4<1>) : run(layernorm_backward_4<2>);
    add(set, stream);
  });
  lab.version({5, "shipped: the next row is on its way", 26}, [=](int set, cudaStream_t stream) {
    residual_layernorm_backward<bf16>(dstream[set], nullptr, partials[set], dnorm[set], inp[set], mean[set], rstd[set],
                                      weight[set], false, {}, s.B, s.T, C, stream);
    add_partials({layernorm_sums(gradients[set], gradients[set] + C, nullptr, partials[set], rows, C)}, stream);
  });
}
// Sizes: one row; a last block of rows that is not full; rows of one chunk, of six, and of more chunks than lanes.
const lab::Listed listed({"layernorm_backward", describe, {{1, 1, 384}, {3, 31, 48}, {2, 33, 384}, {5, 7, 8}}});

}  // namespace
