// Layer normalisation (Ba, Kiros, Hinton, "Layer Normalization", 2016, equation 4; kernels/layernorm.h has it), in one
// pass over memory with what stands before it in the model: a branch's bias and dropout, and its addition to the
// residual stream. Going back, one pass gives the gradient of the stream and of the branch.
// defines: layernorm_forward, residual_layernorm_forward, layernorm_partials, residual_layernorm_backward,
//          layernorm_sums
#pragma once
#include <algorithm>

#include "block.cuh"
#include "column_sums.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "masks.h"

constexpr int layernorm_threads = 128;
constexpr int layernorm_max_C = 2048;

// A row lies in the registers of `lanes` threads: lane l holds its chunks of eight channels l, l + lanes, ..., `each` of
// them. The 384 channels of the lecture's model are three chunks for each of 16 lanes, and none is idle. One call of the
// random number generator is a chunk's eight draws.
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

// Dropout of one chunk. `scale` is computed on the host: devices divide doubles slowly.
__device__ inline void dropout8(Float8& x, const Dropout& drop, float scale, uint64_t counter) {
  const Philox4 r = random4(drop.seed, drop.step, drop.site, counter);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = draw_of(r, i) < drop.threshold ? x[i] * scale : 0.0f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Scaffolding until a race on a card has chosen (bench_gpu race): several kernels for the same work. All but `plain` keep
// the next rows on their way to the multiprocessor while they compute one.

enum LayerNormVariant { layernorm_plain, layernorm_registers, layernorm_ring2, layernorm_ring3, layernorm_wide };
constexpr const char* layernorm_variants[] = {"plain", "registers", "ring2", "ring3", "wide"};  // forward has no wide
inline int layernorm_forward_variant = layernorm_plain, layernorm_backward_variant = layernorm_plain;
inline const void* layernorm_kernel = nullptr;  // the one that was launched last

// To keep the compiler's time short, only the tests, which have canaries, race with rows other than the lecture's.
template <class Shape, class Real>
#ifdef CANARIES
constexpr bool layernorm_races = true;
#else
constexpr bool layernorm_races = Shape::max_C == 384 && sizeof(Real) == 2;
#endif

// A loader brings INPUTS tensors (rows, C) to a thread, chunk by chunk, `ahead` rows before they are used. A thread
// loads only what it uses itself, so there is no barrier. Only the first `loaded` tensors are loaded, and only
// rows before `end`; the others are zero.
//   fetch(row)  begins to load a row: called for the first `ahead` rows
//   next(row)   begins to load the row that is `ahead` rows further, and makes the oldest row the current one
//   get(a, j)   chunk j of the current row of tensor a
template <class Real, int INPUTS>
struct LoaderInputs {
  const Real* from[INPUTS];
  int loaded, lane, end, C;
};

// In registers, one row ahead.
template <class Shape, int THREADS, int INPUTS, int STAGES, class Real>
struct RegisterLoader {
  static constexpr int ahead = 1;
  static constexpr size_t smem = 0;
  LoaderInputs<Real, INPUTS> in;
  Eight<Real> now[INPUTS][Shape::each], coming[INPUTS][Shape::each];

  __device__ explicit RegisterLoader(const LoaderInputs<Real, INPUTS>& inputs) : in(inputs) {}
  __device__ void fetch(int row) {
#pragma unroll
    for (int a = 0; a < INPUTS; a++)
#pragma unroll
      for (int j = 0; j < Shape::each; j++) {
        const Real* from = in.from[a] + size_t(row) * in.C + in.lane * 8 + j * Shape::lanes * 8;
        const bool valid = row < in.end && (in.lane + j * Shape::lanes) * 8 < in.C && a < in.loaded;
        coming[a][j] = valid ? *reinterpret_cast<const Eight<Real>*>(from) : Eight<Real>{};
      }
  }
  __device__ void next(int row) {
#pragma unroll
    for (int a = 0; a < INPUTS; a++)
#pragma unroll
      for (int j = 0; j < Shape::each; j++) now[a][j] = coming[a][j];
    fetch(row);
  }
  __device__ Float8 get(int a, int j) const { return load8(now[a][j].v); }
  __device__ void finish() {}
};

// In shared memory, STAGES - 1 rows ahead, or as many as there is room for. A row that is wanted again is read again.
template <class Shape, int THREADS, int INPUTS, int STAGES, class Real>
struct RingLoader {
  static constexpr size_t room = THREADS <= 128 ? 60 << 10 : 80 << 10;
  static constexpr size_t stage = size_t(INPUTS) * Shape::each * THREADS * sizeof(Eight<Real>);  // bytes
  static constexpr int stages = STAGES * stage <= room ? STAGES : 2 * stage <= room ? 2 : 1;
  static constexpr int ahead = stages - 1;
  static constexpr size_t smem = stages * stage;
  LoaderInputs<Real, INPUTS> in;
  int into = 0, current = 0;  // stages

  __device__ explicit RingLoader(const LoaderInputs<Real, INPUTS>& inputs) : in(inputs), current(stages - 1) {}
  __device__ Real* place(int s, int a, int j) const {
    return dynamic_smem<Eight<Real>>()[((s * INPUTS + a) * Shape::each + j) * THREADS + threadIdx.x].v;
  }
  __device__ void fetch(int row) {
#pragma unroll
    for (int a = 0; a < INPUTS; a++)
#pragma unroll
      for (int j = 0; j < Shape::each; j++) {
        const Real* from = in.from[a] + size_t(row) * in.C + in.lane * 8 + j * Shape::lanes * 8;
        const bool valid = row < in.end && (in.lane + j * Shape::lanes) * 8 < in.C && a < in.loaded;
#pragma unroll
        for (int part = 0; part < int(sizeof(Eight<Real>) / 16); part++)
          copy_async_16(place(into, a, j) + part * 16 / sizeof(Real), from + part * 16 / sizeof(Real), valid);
      }
    copy_async_commit();
    into = into + 1 == stages ? 0 : into + 1;
  }
  __device__ void next(int row) {
    fetch(row);
    copy_async_wait<ahead>();
    current = current + 1 == stages ? 0 : current + 1;
  }
  __device__ Float8 get(int a, int j) const { return load8(place(current, a, j)); }
  __device__ void finish() { copy_async_wait<0>(); }
};

constexpr int layernorm_forward_rows = 32;  // of a block: at 128 registers, the lecture's 16384 are one wave on 132 SMs

// ---------------------------------------------------------------------------------------------------------------------

template <class Shape, bool HAS_BRANCH, class Real>
__global__ void __launch_bounds__(layernorm_threads)
    residual_layernorm_forward_kernel(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                                      const Real* branch, const float* branch_bias, Dropout drop, float scale,
                                      const int* step, const float* weight, const float* bias, int rows, int T, int C,
                                      float one_in_C) {
  constexpr int lanes = Shape::lanes, each = Shape::each;
  const int lane = threadIdx.x % lanes, row = blockIdx.x * Shape::rows_at_once + threadIdx.x / lanes;
  const int chunks = row < rows ? C / 8 : 0;  // chunks of the row: none behind the last row
  const size_t at = size_t(row) * C;

  Float8 x[each], added[HAS_BRANCH ? each : 1];
#pragma unroll
  for (int j = 0; j < each; j++) {  // before anything depends on them: all loads are under way together
    const int chunk = lane + j * lanes;
    x[j] = chunk < chunks ? load8(inp + at + chunk * 8) : Float8{};
    if constexpr (HAS_BRANCH) added[j] = chunk < chunks ? load8(branch + at + chunk * 8) : Float8{};
  }
  if constexpr (HAS_BRANCH) {
    // From here on x is what is stored, rounded: backward, which reads it, sees the numbers that were normalised.
    if (drop.active()) drop.step = uint32_t(*step);
    const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 b = load8(branch_bias + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) added[j][i] += b[i];
      if (drop.active()) dropout8(added[j], drop, scale, first_counter + chunk);
#pragma unroll
      for (int i = 0; i < 8; i++) x[j][i] = float(Real(x[j][i] + added[j][i]));
      store8(stream_out + at + chunk * 8, x[j]);
    }
  }

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
    for (int i = 0; i < 8; i++) squares += (x[j][i] - m) * (x[j][i] - m);  // not E[x^2] - E[x]^2, which cancels
  }
  const float s = 1 / sqrtf(row_sum<Shape>(squares) * one_in_C + 1e-5f);
  if (mean && lane == 0 && row < rows) {
    mean[row] = m;
    rstd[row] = s;
  }
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

// The same for `layernorm_forward_rows` rows a block, one after the other.
template <class Shape, bool HAS_BRANCH, template <class, int, int, int, class> class Loader, int STAGES, class Real>
__global__ void __launch_bounds__(layernorm_threads, 4)
    residual_layernorm_forward_ahead_kernel(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                                            const Real* branch, const float* branch_bias, Dropout drop, float scale,
                                            const int* step, const float* weight, const float* bias, int rows, int T,
                                            int C, float one_in_C) {
  constexpr int lanes = Shape::lanes, each = Shape::each, rows_at_once = Shape::rows_at_once;
  constexpr int inputs = HAS_BRANCH ? 2 : 1;
  using Rows = Loader<Shape, layernorm_threads, inputs, STAGES, Real>;
  const int lane = threadIdx.x % lanes, first_row = blockIdx.x * layernorm_forward_rows + threadIdx.x / lanes;
  const int end = min(rows, int(blockIdx.x + 1) * layernorm_forward_rows);
  LoaderInputs<Real, inputs> in = {{inp}, inputs, lane, end, C};
  if constexpr (HAS_BRANCH) in.from[1] = branch;
  Rows loader(in);
#pragma unroll
  for (int k = 0; k < Rows::ahead; k++) loader.fetch(first_row + k * rows_at_once);
  if (HAS_BRANCH && drop.active()) drop.step = uint32_t(*step);

#pragma unroll 1
  for (int r = 0; r < layernorm_forward_rows; r += rows_at_once) {
    const int row = first_row + r, chunks = row < end ? C / 8 : 0;
    const size_t at = size_t(row) * C;
    loader.next(row + Rows::ahead * rows_at_once);
    Float8 x[each];
#pragma unroll
    for (int j = 0; j < each; j++) x[j] = loader.get(0, j);
    if constexpr (HAS_BRANCH) {
      const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
      for (int j = 0; j < each; j++) {
        const int chunk = lane + j * lanes;
        if (chunk >= chunks) continue;
        Float8 added = loader.get(1, j);
        const Float8 b = load8(branch_bias + chunk * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) added[i] += b[i];
        if (drop.active()) dropout8(added, drop, scale, first_counter + chunk);
#pragma unroll
        for (int i = 0; i < 8; i++) x[j][i] = float(Real(x[j][i] + added[i]));
        store8(stream_out + at + chunk * 8, x[j]);
      }
    }
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
    if (mean && lane == 0 && row < end) {
      mean[row] = m;
      rstd[row] = s;
    }
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
}

template <bool HAS_BRANCH, class Real>
void launch_layernorm_forward(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                              const Real* branch, const float* branch_bias, const Dropout& drop, const int* step,
                              const float* weight, const float* bias, int rows, int T, int C, cudaStream_t stream) {
  require(rows > 0, "layernorm: ", rows, " rows");
  require(!mean == !rstd, "layernorm: of mean and rstd, only one is wanted");
  const float scale = float(dropout_scale(drop.threshold));
  with_row_shape(C, [&](auto shape) {
    using Shape = decltype(shape);
    const auto run = [&](auto kernel, int block_rows, size_t smem) {
      layernorm_kernel = reinterpret_cast<const void*>(kernel);
      launch(kernel, {unsigned(ceil_div(rows, block_rows)), layernorm_threads, smem, stream}, stream_out, norm, mean,
             rstd, inp, branch, branch_bias, drop, scale, step, weight, bias, rows, T, C, 1.0f / float(C));
    };
    constexpr int inputs = HAS_BRANCH ? 2 : 1;
    if constexpr (!layernorm_races<Shape, Real>)
      return run(residual_layernorm_forward_kernel<Shape, HAS_BRANCH, Real>, Shape::rows_at_once, 0);
    else
      switch (layernorm_forward_variant) {
        case layernorm_registers:
          return run(residual_layernorm_forward_ahead_kernel<Shape, HAS_BRANCH, RegisterLoader, 2, Real>,
                     layernorm_forward_rows, 0);
        case layernorm_ring2:
          return run(residual_layernorm_forward_ahead_kernel<Shape, HAS_BRANCH, RingLoader, 2, Real>,
                     layernorm_forward_rows, RingLoader<Shape, layernorm_threads, inputs, 2, Real>::smem);
        case layernorm_ring3:
          return run(residual_layernorm_forward_ahead_kernel<Shape, HAS_BRANCH, RingLoader, 3, Real>,
                     layernorm_forward_rows, RingLoader<Shape, layernorm_threads, inputs, 3, Real>::smem);
        default:
          return run(residual_layernorm_forward_kernel<Shape, HAS_BRANCH, Real>, Shape::rows_at_once, 0);
      }
  });
}

// out (rows, C) = ..., mean (rows) = ..., rstd (rows) = ... of inp (rows, C); weight (C), bias (C)
// mean and rstd may be null.
template <class Real>
void layernorm_forward(Real* out, float* mean, float* rstd, const Real* inp, const float* weight, const float* bias,
                       int rows, int C, cudaStream_t stream) {
  launch_layernorm_forward<false, Real>(nullptr, out, mean, rstd, inp, nullptr, nullptr, {}, nullptr, weight, bias,
                                        rows, 1, C, stream);
}

// stream_out (B, T, C) = inp (B, T, C) + dropout(branch (B, T, C) + branch_bias (C))
// norm (B, T, C) = layernorm of stream_out, mean (B, T) = ..., rstd (B, T) = ...; weight (C), bias (C)
// stream_out may be inp; mean and rstd may be null; step is not read if there is no dropout.
template <class Real>
void residual_layernorm_forward(Real* stream_out, Real* norm, float* mean, float* rstd, const Real* inp,
                                const Real* branch, const float* branch_bias, const Dropout& drop, const int* step,
                                const float* weight, const float* bias, int B, int T, int C, cudaStream_t stream) {
  launch_layernorm_forward<true>(stream_out, norm, mean, rstd, inp, branch, branch_bias, drop, step, weight, bias,
                                 B * T, T, C, stream);
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int layernorm_block_rows = sums_block_rows;  // whose shares of the parameters' gradients a block adds up

// The shares of the parameters' gradients stay in registers while a lane goes through its block's rows, 24 for each of
// its chunks: hence whole blocks for long rows.
template <class Shape, class Real>
__global__ void __launch_bounds__(layernorm_threads)
    residual_layernorm_backward_kernel(Real* dstream, Real* dbranch, float* partials, const Real* dnorm,
                                       const Real* inp, const float* mean, const float* rstd, const float* weight,
                                       bool first, Dropout drop, float scale, const int* step, int rows, int T, int C,
                                       float one_in_C) {
  constexpr int lanes = Shape::lanes, each = Shape::each, rows_at_once = Shape::rows_at_once;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  if (dbranch && drop.active()) drop.step = uint32_t(*step);

  Float8 dweight[each] = {}, dbias[each] = {}, dbranch_bias[each] = {};
  for (int r = 0; r < layernorm_block_rows; r += rows_at_once) {
    const int row = blockIdx.x * layernorm_block_rows + r + group;
    const int chunks = row < rows ? C / 8 : 0;
    const size_t at = size_t(row) * C;
    const float m = row < rows ? mean[row] : 0, s = row < rows ? rstd[row] : 0;

    Float8 n[each], g[each], dx[each];
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      n[j] = chunk < chunks ? load8(inp + at + chunk * 8) : Float8{};
      g[j] = chunk < chunks ? load8(dnorm + at + chunk * 8) : Float8{};
      dx[j] = chunk < chunks && !first ? load8(dstream + at + chunk * 8) : Float8{};
    }
    float sum_g = 0, sum_gn = 0;
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 w = load8(weight + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        n[j][i] = (n[j][i] - m) * s;
        dweight[j][i] += g[j][i] * n[j][i];
        dbias[j][i] += g[j][i];
        g[j][i] *= w[i];
        sum_g += g[j][i];
        sum_gn += g[j][i] * n[j][i];
      }
    }
    sum_g = row_sum<Shape>(sum_g) * one_in_C;
    sum_gn = row_sum<Shape>(sum_gn) * one_in_C;
    const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) dx[j][i] += (g[j][i] - sum_g - n[j][i] * sum_gn) * s;
      store8(dstream + at + chunk * 8, dx[j]);
      if (!dbranch) continue;
      // From the sum as it is, not as it was stored: the branch's gradient is rounded once, not twice.
      if (drop.active()) dropout8(dx[j], drop, scale, first_counter + chunk);
      store8(dbranch + at + chunk * 8, dx[j]);
#pragma unroll
      for (int i = 0; i < 8; i++) dbranch_bias[j][i] += dx[j][i];
    }
  }

  // Adds what the groups of lanes have, in order.
  __shared__ __align__(16) float shares[rows_at_once][Shape::max_C];
  const auto add_groups = [&](float* out, const Float8(&share)[each]) {
#pragma unroll
    for (int j = 0; j < each; j++) store8(&shares[group][(lane + j * lanes) * 8], share[j]);
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += layernorm_threads) {
      float total = 0;
#pragma unroll
      for (int k = 0; k < rows_at_once; k++) total += shares[k][c];
      out[c] = total;
    }
    __syncthreads();
  };
  float* out = partials + size_t(blockIdx.x) * 3 * C;
  add_groups(out, dweight);
  add_groups(out + C, dbias);
  if (dbranch) add_groups(out + 2 * C, dbranch_bias);
}

// The same with the next rows on their way. Between the two passes over a row nothing is kept that can be made again.
template <class Shape, int THREADS, template <class, int, int, int, class> class Loader, int STAGES, class Real>
__global__ void __launch_bounds__(THREADS, 2)
    residual_layernorm_backward_ahead_kernel(Real* dstream, Real* dbranch, float* partials, const Real* dnorm,
                                             const Real* inp, const float* mean, const float* rstd, const float* weight,
                                             bool first, Dropout drop, float scale, const int* step, int rows, int T,
                                             int C, float one_in_C) {
  constexpr int lanes = Shape::lanes, each = Shape::each, rows_at_once = THREADS / lanes;
  using Rows = Loader<Shape, THREADS, 3, STAGES, Real>;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block_row = blockIdx.x * layernorm_block_rows, end = min(rows, block_row + layernorm_block_rows);
  Rows loader({{inp, dnorm, dstream}, first ? 2 : 3, lane, end, C});
#pragma unroll
  for (int k = 0; k < Rows::ahead; k++) loader.fetch(block_row + group + k * rows_at_once);
  if (dbranch && drop.active()) drop.step = uint32_t(*step);
  __shared__ float means[layernorm_block_rows], rstds[layernorm_block_rows];
  for (int r = threadIdx.x; r < layernorm_block_rows; r += THREADS) {
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
    loader.next(row + Rows::ahead * rows_at_once);
    float sum_g = 0, sum_gn = 0;
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 x = loader.get(0, j), w = load8(weight + chunk * 8);
      Float8 g = loader.get(1, j);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float n = (x[i] - m) * s;
        dweight[j][i] += g[i] * n;
        dbias[j][i] += g[i];
        g[i] *= w[i];
        sum_g += g[i];
        sum_gn += g[i] * n;
      }
    }
    sum_g = row_sum<Shape>(sum_g) * one_in_C;
    sum_gn = row_sum<Shape>(sum_gn) * one_in_C;
    asm volatile("" ::: "memory");  // the compiler must not keep what the first pass has read
    const uint64_t first_counter = (uint64_t(drop.first_row) * T + row) * (C / 8);
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int chunk = lane + j * lanes;
      if (chunk >= chunks) continue;
      const Float8 x = loader.get(0, j), g = loader.get(1, j), w = load8(weight + chunk * 8);
      Float8 dx = loader.get(2, j);
      // __fmul_rn: the product is rounded, as in the first pass, and not drawn into the subtraction.
#pragma unroll
      for (int i = 0; i < 8; i++) dx[i] += (__fmul_rn(g[i], w[i]) - sum_g - (x[i] - m) * s * sum_gn) * s;
      store8(dstream + at + chunk * 8, dx);
      if (!dbranch) continue;
      if (drop.active()) dropout8(dx, drop, scale, first_counter + chunk);
      store8(dbranch + at + chunk * 8, dx);
#pragma unroll
      for (int i = 0; i < 8; i++) dbranch_bias[j][i] += dx[i];
    }
  }

  // Adds what the groups of lanes have, in order. The loader's shared memory is free now.
  loader.finish();
  __syncthreads();
  float* shares = dynamic_smem<float>();  // (rows_at_once, max_C)
  const auto add_groups = [&](float* out, const Float8(&share)[each]) {
#pragma unroll
    for (int j = 0; j < each; j++) store8(shares + group * Shape::max_C + (lane + j * lanes) * 8, share[j]);
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += THREADS) {
      float total = 0;
#pragma unroll
      for (int k = 0; k < rows_at_once; k++) total += shares[k * Shape::max_C + c];
      out[c] = total;
    }
    __syncthreads();
  };
  float* out = partials + size_t(blockIdx.x) * 3 * C;
  add_groups(out, dweight);
  add_groups(out + C, dbias);
  if (dbranch) add_groups(out + 2 * C, dbranch_bias);
}

// Floats that residual_layernorm_backward leaves as `partials`.
inline size_t layernorm_partials(int rows, int C) { return partials_size(rows, 3 * C); }

// dstream (B, T, C) = what comes through the normalisation from dnorm (B, T, C), added to what was there before, unless
// it is the first that comes to the stream; dbranch (B, T, C) = dropout(dstream), with the mask of the branch that was
// added to the stream just before it was normalised. The equation is in kernels/layernorm.h.
// partials (blocks, 3, C) = sums over each block's rows: of the gradients of weight and bias, and of dbranch, which is
// the gradient of branch_bias; layernorm_partials(B * T, C) floats for layernorm_sums
// inp (B, T, C), mean, rstd (B, T): what was normalised and how. dbranch is null if no branch came before; it may be
// dnorm.
template <class Real>
void residual_layernorm_backward(Real* dstream, Real* dbranch, float* partials, const Real* dnorm, const Real* inp,
                                 const float* mean, const float* rstd, const float* weight, bool first,
                                 const Dropout& drop, const int* step, int B, int T, int C, cudaStream_t stream) {
  require(B > 0 && T > 0, "residual_layernorm_backward: B = ", B, ", T = ", T);
  const float scale = float(dropout_scale(drop.threshold));
  with_row_shape(C, [&](auto shape) {
    using Shape = decltype(shape);
    const auto run = [&](auto kernel, int threads, size_t smem) {
      layernorm_kernel = reinterpret_cast<const void*>(kernel);
      launch(kernel, {unsigned(ceil_div(B * T, layernorm_block_rows)), unsigned(threads), smem, stream}, dstream,
             dbranch, partials, dnorm, inp, mean, rstd, weight, first, drop, scale, step, B * T, T, C, 1.0f / float(C));
    };
    constexpr int threads = layernorm_threads, wide = Shape::lanes <= 32 ? 256 : layernorm_threads;
    constexpr size_t shares = size_t(threads / Shape::lanes) * Shape::max_C * sizeof(float);
    if constexpr (!layernorm_races<Shape, Real>)
      return run(residual_layernorm_backward_kernel<Shape, Real>, threads, 0);
    else
      switch (layernorm_backward_variant) {
        case layernorm_registers:
          return run(residual_layernorm_backward_ahead_kernel<Shape, threads, RegisterLoader, 2, Real>, threads,
                     shares);
        case layernorm_ring2:
          return run(residual_layernorm_backward_ahead_kernel<Shape, threads, RingLoader, 2, Real>, threads,
                     std::max(shares, RingLoader<Shape, threads, 3, 2, Real>::smem));
        case layernorm_ring3:
          return run(residual_layernorm_backward_ahead_kernel<Shape, threads, RingLoader, 3, Real>, threads,
                     std::max(shares, RingLoader<Shape, threads, 3, 3, Real>::smem));
        case layernorm_wide:  // twice as many warps; sums the parameters' gradients in another order
          return run(residual_layernorm_backward_ahead_kernel<Shape, wide, RingLoader, 2, Real>, wide,
                     std::max(wide / threads * shares, RingLoader<Shape, wide, 3, 2, Real>::smem));
        default:
          return run(residual_layernorm_backward_kernel<Shape, Real>, threads, 0);
      }
  });
}

// ---------------------------------------------------------------------------------------------------------------------

// What add_partials has to do with what residual_layernorm_backward left in partials: it is summed into dweight (C),
// dbias (C) and dbranch_bias (C), which may be null.
inline Sums layernorm_sums(float* dweight, float* dbias, float* dbranch_bias, const float* partials, int C) {
  return {C, 1, 3, partials, 0, {dweight, dbias, dbranch_bias}, {}};
}
// The same for several layers, of which there may be none.
template <class Slices>
Sums layernorm_sums(const Slices& dweight, const Slices& dbias, const Slices& dbranch_bias, const Slices& partials,
                    int C, int layers) {
  return {C,
          layers,
          3,
          partials.first,
          partials.stride,
          {dweight.first, dbias.first, dbranch_bias.first},
          {dweight.stride, dbias.stride, dbranch_bias.stride}};
}
