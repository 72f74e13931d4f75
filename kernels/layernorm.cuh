// Layer normalisation: Ba, Kiros, Hinton, "Layer Normalization", 2016, equation 4. layernorm.h has the equations and
// the CPU twin. The kernel also does the step before: it adds bias and dropout to a branch (the output of attention or
// of the MLP) and adds that to the residual stream. Backward is one kernel as well, for the gradients of the stream and
// of the branch.
// defines: layernorm_forward, residual_layernorm_forward, layernorm_partials, residual_layernorm_backward,
//          layernorm_sums
#pragma once
#include <algorithm>

#include "block.cuh"
#include "column_sums.cuh"
#include "device.cuh"
#include "dropout.cuh"
#include "launch.cuh"

constexpr int layernorm_threads = 128;
constexpr int layernorm_max_C = 2048;

// How rows are spread over threads. A group of `lanes` threads holds a row in its registers: lane l has its chunks l,
// l + lanes, ..., `each` of them, where a chunk is eight channels. A lane here is a thread's number in its group, and a
// group is half a warp or the whole block. A block has rows_at_once groups. The 384 channels of the lecture's model,
// for example, with lanes = 16 and each = 3:
//
//   chunk    0  1  2 ...  15 | 16 17 18 ...  31 | 32 33 34 ...  47
//   lane     0  1  2 ...  15 |  0  1  2 ...  15 |  0  1  2 ...  15
//
// One call of the random number generator gives a chunk's eight draws.
template <int LANES, int EACH>
struct RowShape {
  static constexpr int lanes = LANES, each = EACH, max_C = LANES * EACH * 8, rows_at_once = layernorm_threads / LANES;
};

// Calls f with the smallest RowShape in which C channels have room: half a warp for a row, or the whole block.
template <class F>
void with_row_shape(int C, F f) {
  require(C > 0 && C % 8 == 0 && C <= layernorm_max_C, "layernorm: C = ", C, " is not a multiple of 8 up to ",
          layernorm_max_C);
  if (C <= 128)
    f(RowShape<16, 1>{});
  else if (C <= 256)
    f(RowShape<16, 2>{});
  else if (C <= 384)
    f(RowShape<16, 3>{});
  else if (C <= 512)
    f(RowShape<16, 4>{});
  else if (C <= 1024)
    f(RowShape<layernorm_threads, 1>{});
  else
    f(RowShape<layernorm_threads, 2>{});
}

// The sum of x over a row's lanes, given to each of them. All threads of the block must call together.
template <class Shape>
__device__ inline float row_sum(float x) {
  if constexpr (Shape::lanes <= 32)
    return lane_sum<Shape::lanes>(x);
  else
    return block_sum<Shape::lanes>(x);
}

// ---------------------------------------------------------------------------------------------------------------------

// Launched with ceil(rows / rows_at_once) blocks of 128 threads: a group of `lanes` threads has one row.
//   stream_out (rows, C) =          inp + dropout(branch + branch_bias); HAS_BRANCH only, else null
//   norm       (rows, C) =          the normalised row
//   mean, rstd (rows) = or null     for backward
//   inp        (rows, C)            the residual stream
//   branch     (rows, C), branch_bias (C): HAS_BRANCH only, else null
//   weight, bias (C)
// Draws are numbered over the whole batch, of which these rows begin at drop.first_row * T. one_in_C = 1 / C.
template <class Shape, bool HAS_BRANCH, class Real>
__global__ void __launch_bounds__(layernorm_threads)
    residual_layernorm_forward_kernel(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                                      const Real* branch, const float* branch_bias, DeviceDropout drop,
                                      const float* weight, const float* bias, int rows, int T, int C, float one_in_C) {
  wait_for_inputs();
  constexpr int lanes = Shape::lanes, each = Shape::each;
  const int lane = threadIdx.x % lanes, row = blockIdx.x * Shape::rows_at_once + threadIdx.x / lanes;
  const int chunks = row < rows ? C / 8 : 0;  // a group behind the last row has none, but takes part in the sums
  const size_t at = size_t(row) * C;

  // 1. Load this lane's chunks, all before anything depends on them, so that the loads are under way together.
  Float8 x[each], added[HAS_BRANCH ? each : 1];
#pragma unroll
  for (int j = 0; j < each; j++) {
    const int chunk = lane + j * lanes;
    x[j] = chunk < chunks ? load8(inp + at + chunk * 8) : Float8{};
    if constexpr (HAS_BRANCH) added[j] = chunk < chunks ? load8(branch + at + chunk * 8) : Float8{};
  }
  // 2. x += dropout(branch + branch_bias). It is rounded as it is stored, and from here on x is the rounded number:
  //    backward reads what is stored, and must see the numbers that were normalised.
  if constexpr (HAS_BRANCH) {
    if (drop.active()) drop.read_step();
    const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 b = load8(branch_bias + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) added[j][i] += b[i];
      if (drop.active()) dropout8(added[j], drop, first_counter + chunk);
#pragma unroll
      for (int i = 0; i < 8; i++) x[j][i] = float(Real(x[j][i] + added[j][i]));
      store8(stream_out + at + chunk * 8, x[j]);
    }
  }

  // 3. Mean and rstd of the row: each lane adds up its chunks, row_sum adds up the lanes. We square x - mean in a
  //    second round: E[x^2] - E[x]^2 would lose digits.
  float sum = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < each; j++)
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[j][i];
  const float m = row_sum<Shape>(sum) * one_in_C;
#pragma unroll
  for (int j = 0; j < each; j++) {
    if (lane + j * lanes >= chunks) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += (x[j][i] - m) * (x[j][i] - m);
  }
  const float s = 1 / sqrtf(row_sum<Shape>(squares) * one_in_C + 1e-5f);
  if (mean && lane == 0 && row < rows) {
    mean[row] = m;
    rstd[row] = s;
  }
  // 4. Normalise, scale, shift, store.
#pragma unroll
  for (int j = 0; j < each; j++) {
    const int chunk = lane + j * lanes;
    if (chunk >= chunks) continue;
    const Float8 w = load8(weight + chunk * 8), b = load8(bias + chunk * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) x[j][i] = (x[j][i] - m) * s * w[i] + b[i];
    store8(norm + at + chunk * 8, x[j]);
  }
}

template <bool HAS_BRANCH, class Real>
void launch_layernorm_forward(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                              const Real* branch, const float* branch_bias, const DeviceDropout& drop,
                              const float* weight, const float* bias, int rows, int T, int C, cudaStream_t stream) {
  require(rows > 0, "layernorm: ", rows, " rows");
  require(!mean == !rstd, "layernorm: of mean and rstd, only one is wanted");
  with_row_shape(C, [&](auto shape) {
    using Shape = decltype(shape);
    const int blocks = ceil_div(rows, Shape::rows_at_once);
    launch(residual_layernorm_forward_kernel<Shape, HAS_BRANCH, Real>, {unsigned(blocks), layernorm_threads, 0, stream},
           stream_out, norm, mean, rstd, inp, branch, branch_bias, drop, weight, bias, rows, T, C, 1.0f / float(C));
  });
}

// out (rows, C) = layernorm of inp (rows, C), mean (rows) = ..., rstd (rows) = ...; weight (C), bias (C)
// mean and rstd may be null.
template <class Real>
void layernorm_forward(Real* out, float* mean, float* rstd, const Real* inp, const float* weight, const float* bias,
                       int rows, int C, cudaStream_t stream) {
  launch_layernorm_forward<false, Real>(nullptr, out, mean, rstd, inp, nullptr, nullptr, {}, weight, bias, rows, 1, C,
                                        stream);
}

// stream_out = inp + dropout(branch + branch_bias), norm = layernorm of stream_out. The kernel above has the shapes,
// with rows = B * T. stream_out may be inp; mean and rstd may be null.
template <class Real>
void residual_layernorm_forward(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                                const Real* branch, const float* branch_bias, const DeviceDropout& drop,
                                const float* weight, const float* bias, int B, int T, int C, cudaStream_t stream) {
  launch_layernorm_forward<true>(stream_out, norm, mean, rstd, inp, branch, branch_bias, drop, weight, bias, B * T, T,
                                 C, stream);
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int layernorm_block_rows = sums_block_rows;  // rows of a block of backward

// Fetches the rows of inp, dnorm and dstream that backward reads. Shared memory has two places for each group of lanes,
// so that the next row is on its way while the current one is in use. Where two would take more than 48 KB it has one,
// and advance() waits for the row. A thread reads only chunks that it has fetched itself, so no barrier is needed.
//
//   start(first row);
//   for each row of the group: { advance(row, the group's next row);  ... inp(j), dnorm(j), dstream(j) ... }
//
// Rows from `end` on are zeros. So is dstream with inputs = 2, for a caller who writes it for the first time.
template <class Shape, class Real>
struct RowsAhead {
  using Chunk = Eight<Real>;
  static constexpr int each = Shape::each;
  static constexpr size_t bytes = 3 * each * layernorm_threads * sizeof(Chunk);  // one row of each group
  static constexpr int places = 2 * bytes <= 48 << 10 ? 2 : 1;
  static constexpr size_t smem = places * bytes;

  const Real* from[3];  // inp, dnorm, dstream (rows, C)
  int inputs, lane, end, C;
  int place = 0;  // get() reads this place; the next fetch() overwrites it

  // This thread's chunk j of an input's row, in this place.
  __device__ Real* chunk_of(int input, int j) const {
    return dynamic_smem<Chunk>()[((place * 3 + input) * each + j) * layernorm_threads + threadIdx.x].v;
  }
  // Begins to copy this thread's chunks of a row. With two places, get() then reads the row that was fetched before it.
  __device__ void fetch(int row) {
#pragma unroll
    for (int a = 0; a < 3; a++)
#pragma unroll
      for (int j = 0; j < each; j++) {
        const int chunk = lane + j * Shape::lanes;
        const bool valid = row < end && chunk * 8 < C && a < inputs;
        const Real* const source = from[a] + size_t(row) * C + chunk * 8;
#pragma unroll
        for (int i = 0; i < 8; i += 16 / int(sizeof(Real))) copy_async_16(chunk_of(a, j) + i, source + i, valid);
      }
    copy_async_commit();
    if (places == 2) place ^= 1;
  }
  __device__ void start(int row) {
    if (places == 2) fetch(row);
  }
  // From now on inp(), dnorm() and dstream() return this row's chunks. With two places, the following row is on its
  // way.
  __device__ void advance(int row, int following) {
    fetch(places == 2 ? following : row);
    copy_async_wait<places - 1>();
  }
  __device__ Float8 get(int input, int j) const { return load8(chunk_of(input, j)); }
  __device__ Float8 inp(int j) const { return get(0, j); }
  __device__ Float8 dnorm(int j) const { return get(1, j); }
  __device__ Float8 dstream(int j) const { return get(2, j); }
};

// Launched with ceil(rows / 64) blocks of 128 threads: a block has 64 rows, its groups of lanes take turns at them.
//   dstream  (rows, C) += or, if `first`, =    the gradient of the residual stream
//   dbranch  (rows, C) = or null               dropout(dstream), with forward's mask
//   partials (blocks, 3, C) =                  the block's sums for dweight, dbias and dbranch_bias
//   dnorm    (rows, C)                         the gradient of forward's norm
//   inp      (rows, C)                         what forward normalised: its stream_out, if there was a branch
//   mean, rstd (rows), weight (C)              as in forward; drop, T and one_in_C, too
// Each lane keeps its channels' sums for dweight, dbias and dbranch_bias in registers, 24 of them for each chunk, until
// the block's rows are done. That leaves few registers, so long rows take a whole block, and the second pass over a row
// (step 3) reads it again from shared memory.
template <class Shape, class Real>
__global__ void __launch_bounds__(layernorm_threads, 2)
    residual_layernorm_backward_kernel(Real* dstream, Real* dbranch, float* partials, const Real* dnorm,
                                       const Real* inp, const float* mean, const float* rstd, const float* weight,
                                       bool first, DeviceDropout drop, int rows, int T, int C, float one_in_C) {
  wait_for_inputs();
  constexpr int lanes = Shape::lanes, each = Shape::each, rows_at_once = Shape::rows_at_once;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block_row = blockIdx.x * layernorm_block_rows, end = min(rows, block_row + layernorm_block_rows);

  // 1. Start to fetch the first row of each group. Read mean and rstd of the block's 64 rows.
  RowsAhead<Shape, Real> ahead = {{inp, dnorm, dstream}, first ? 2 : 3, lane, end, C};
  ahead.start(block_row + group);
  if (dbranch && drop.active()) drop.read_step();
  __shared__ float means[layernorm_block_rows], rstds[layernorm_block_rows];
  for (int r = threadIdx.x; r < layernorm_block_rows; r += layernorm_threads) {
    means[r] = block_row + r < end ? mean[block_row + r] : 0;
    rstds[r] = block_row + r < end ? rstd[block_row + r] : 0;
  }
  __syncthreads();

  Float8 dweight[each] = {}, dbias[each] = {}, dbranch_bias[each] = {};
#pragma unroll 1
  for (int r = group; r < layernorm_block_rows; r += rows_at_once) {
    const int row = block_row + r, chunks = row < end ? C / 8 : 0;
    const size_t at = size_t(row) * C;
    const float m = means[r], s = rstds[r];
    ahead.advance(row, row + rows_at_once);

    // 2. First pass over the row: its terms of dweight and dbias, and the sums over its channels of g = dnorm * weight
    //    and of g * n, where n is the normalised number. d is dnorm.
    float sum_g = 0, sum_gn = 0;
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 x = ahead.inp(j), w = load8(weight + chunk * 8), d = ahead.dnorm(j);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float n = (x[i] - m) * s;
        dweight[j][i] += d[i] * n;
        dbias[j][i] += d[i];
        const float g = d[i] * w[i];
        sum_g += g;
        sum_gn += g * n;
      }
    }
    const float mean_g = row_sum<Shape>(sum_g) * one_in_C, mean_gn = row_sum<Shape>(sum_gn) * one_in_C;

    // 3. Second pass: the gradient of the stream and, with forward's dropout mask, of the branch.
    asm volatile("" ::: "memory");  // so that the compiler reads again, and does not keep what the first pass has read
    const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 x = ahead.inp(j), d = ahead.dnorm(j), w = load8(weight + chunk * 8);
      Float8 dx = ahead.dstream(j);
#pragma unroll
      for (int i = 0; i < 8; i++) dx[i] += (d[i] * w[i] - mean_g - (x[i] - m) * s * mean_gn) * s;
      store8(dstream + at + chunk * 8, dx);
      if (!dbranch) continue;
      // dx as it was computed, not as it was stored: so the branch's gradient is rounded once, not twice.
      if (drop.active()) dropout8(dx, drop, first_counter + chunk);
      store8(dbranch + at + chunk * 8, dx);
#pragma unroll
      for (int i = 0; i < 8; i++) dbranch_bias[j][i] += dx[i];
    }
  }

  // 4. The groups' sums, added in order: registers -> shared, overwriting the fetched rows -> global.
  copy_async_wait<0>();  // the last fetch, of zeros, must not arrive later
  __syncthreads();
  float* const group_partials = dynamic_smem<float>();  // (3, rows_at_once, max_C)
  const int kinds = dbranch ? 3 : 2;
  const auto place = [&](int kind, int k, int c) {
    return group_partials + (kind * rows_at_once + k) * Shape::max_C + c;
  };
#pragma unroll
  for (int j = 0; j < each; j++) {
    const int c = (lane + j * lanes) * 8;
    store8(place(0, group, c), dweight[j]);
    store8(place(1, group, c), dbias[j]);
    store8(place(2, group, c), dbranch_bias[j]);
  }
  __syncthreads();
  for (int kind = 0; kind < kinds; kind++)
    for (int c = threadIdx.x; c < C; c += layernorm_threads) {
      float total = 0;
#pragma unroll
      for (int k = 0; k < rows_at_once; k++) total += *place(kind, k, c);
      partials[(size_t(blockIdx.x) * 3 + kind) * C + c] = total;
    }
}

// How many floats residual_layernorm_backward writes to `partials`.
inline size_t layernorm_partials(int rows, int C) { return partials_size(rows, 3 * C); }

// dstream += the gradient that comes through the normalisation from dnorm, or = if `first`: nothing has written it yet.
// The equation is in layernorm.h, the kernel above has the shapes, with rows = B * T.
// dbranch = dropout(dstream), with the mask of the branch that forward added just before it normalised. It is null if
// there was no branch, and may be dnorm.
// partials has layernorm_partials(B * T, C) floats; add_partials makes the gradients of them, see layernorm_sums.
template <class Real>
void residual_layernorm_backward(Real* dstream, Real* dbranch, float* partials, const Real* dnorm, const Real* inp,
                                 const float* mean, const float* rstd, const float* weight, bool first,
                                 const DeviceDropout& drop, int B, int T, int C, cudaStream_t stream) {
  require(B > 0 && T > 0, "residual_layernorm_backward: B = ", B, ", T = ", T);
  with_row_shape(C, [&](auto shape) {
    using Shape = decltype(shape);
    constexpr size_t partials_bytes = 3 * Shape::rows_at_once * Shape::max_C * sizeof(float);
    launch(residual_layernorm_backward_kernel<Shape, Real>,
           {unsigned(ceil_div(B * T, layernorm_block_rows)), layernorm_threads,
            std::max(partials_bytes, RowsAhead<Shape, Real>::smem), stream},
           dstream, dbranch, partials, dnorm, inp, mean, rstd, weight, first, drop, B * T, T, C, 1.0f / float(C));
  });
}

// ---------------------------------------------------------------------------------------------------------------------

// The job for add_partials after residual_layernorm_backward of `rows` rows: dweight (C), dbias (C) and dbranch_bias
// (C) = or += partials, summed over the blocks. dbranch_bias may be null.
inline Sums layernorm_sums(float* dweight, float* dbias, float* dbranch_bias, const float* partials, int rows, int C) {
  return {ceil_div(rows, layernorm_block_rows), C, 1, 3, partials, 0, {dweight, dbias, dbranch_bias}, {}};
}
// The same for several layers, or for none.
template <class Slices>
Sums layernorm_sums(const Slices& dweight, const Slices& dbias, const Slices& dbranch_bias, const Slices& partials,
                    int rows, int C, int layers) {
  return {ceil_div(rows, layernorm_block_rows),
          C,
          layers,
          3,
          partials.first,
          partials.stride,
          {dweight.first, dbias.first, dbranch_bias.first},
          {dweight.stride, dbias.stride, dbranch_bias.stride}};
}
