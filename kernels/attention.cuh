// Causal multi-head self-attention with dropout on the weights, on the GPU; the CPU twin with the equations is
// attention.h, the numbering of the random draws stands in masks.h. No (T, T) matrix is ever stored: forward goes
// through the keys in tiles with a running softmax (Dao et al., "FlashAttention", 2022, algorithm 1), a block of
// threads for each tile of queries (Dao, "FlashAttention-2", 2023, section 3); backward makes the weights again from
// the logarithm of the softmax's denominator. Backward is two kernels, one that owns queries and one that owns keys,
// and both make the weights: seven products where one kernel needs five, but every sum stays within a warp, in a fixed
// order, without atomics. bf16 and fp16 run on tensor cores, float on plain arithmetic.
// defines: attention_forward, attention_backward
#pragma once
#include <type_traits>

#include "attention_float.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "masks.h"

namespace attention {

// Of the thread blocks among which a multiprocessor's registers are divided: Turing's code needs more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int fewer_blocks = 1;
#else
constexpr int fewer_blocks = 0;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: matrices are made of blocks of 16 x 16, of which a lane holds eight elements (see mma_16x8x16). Element
// i of a block's lane is decided by draw i of the lane's eight. Blocks live in registers, so loops over them must be
// unrolled, which the compiler only needs to be told of the largest.

struct Block {
  float half[2][4];  // columns 0 ... 7 and 8 ... 15
  __device__ float& operator[](int i) { return half[i / 4][i % 4]; }
  __device__ const float& operator[](int i) const { return half[i / 4][i % 4]; }
};
__device__ inline int row_of(int i) { return lane() / 4 + i / 2 % 2 * 8; }
__device__ inline int column_of(int i) { return lane() % 4 * 2 + i / 4 * 8 + i % 2; }

// Columns of scores that a warp makes at a time, as many as its registers hold: keys, and queries where it owns keys.
constexpr int step_keys = 32;
template <int HS>
constexpr int step_queries = HS <= 32 ? 32 : 16;

// Shared memory is rows of HS elements: two stages of two tiles each, one stage being copied while the other is in use.
// The second is also where a block's own rows arrive before the first tile of it, and where the results leave.
template <int HS>
constexpr int tile_rows = HS <= 64 ? 64 : 32;
template <int HS>
constexpr int own_row = 2 * tile_rows<HS>;  // the first of them
template <int HS, int OWN_ROWS>
constexpr int smem_rows = own_row<HS> + (OWN_ROWS > 2 * tile_rows<HS> ? OWN_ROWS : 2 * tile_rows<HS>);

// Blocks of 16 queries of a warp in forward: every fragment of keys and values that it loads serves each of them. For
// two of 128 channels the registers do not suffice.
template <int HS>
constexpr int query_blocks = HS <= 64 ? 2 : 1;

// Where eight elements of a row begin in shared memory. 128 bytes are eight chunks of 16; ldmatrix reads one chunk of
// eight rows at a time, and the exclusive or puts them into eight different places. chunk_offset(row + 8, chunk) is 8 HS further,
// and chunk_offset(row, chunk ^ x) is chunk_offset(row, chunk) ^ 8 x: written so, addresses cost a register for each lane's place, not for
// each fragment.
template <int HS>
__device__ inline int chunk_offset(int row, int chunk) {
  constexpr int chunks = HS < 64 ? HS / 8 : 8;
  return row * HS + (chunk ^ row / (8 / chunks) % chunks) * 8;
}

// Begins to copy rows first ... first + ROWS - 1 of a (T, HS) matrix to shared memory; rows from T on become zeros.
template <int ROWS, int HS, class Real>
__device__ inline void copy_rows(Real* smem, int to, const Real* from, int stride, int first, int T) {
  constexpr int at_once = threads / (HS / 8);  // rows that the block copies at once
  static_assert(at_once % 8 == 0 && ROWS % at_once == 0);
  const int row = threadIdx.x / (HS / 8), chunk = threadIdx.x % (HS / 8), mine = chunk_offset<HS>(to + row, chunk);
  from += size_t(first + row) * stride + chunk * 8;
  for (int i = 0; i < ROWS; i += at_once) copy_async_16(smem + mine + i * HS, from + i * stride, first + row + i < T);
}

// Writes a warp's 16 rows of an output, each times its factor, through shared memory: whole chunks of a row at a time.
template <int HS, class Real>
__device__ inline void store_rows(Real* to, int stride, int rows, Real* smem, int smem_row, const Block (&x)[HS / 16],
                                  const float (&factor)[2]) {
  const int mine = chunk_offset<HS>(smem_row + lane() / 4, 0);
  for (int n = 0; n < HS / 16; n++)
    for (int i = 0; i < 8; i += 2)
      *reinterpret_cast<uint32_t*>(smem + (mine ^ (n * 16 + i / 4 * 8)) + i / 2 % 2 * 8 * HS + lane() % 4 * 2) =
          pack2<Real>(x[n][i] * factor[i / 2 % 2], x[n][i + 1] * factor[i / 2 % 2]);
  __syncwarp();
  for (int i = lane(); i < 2 * HS; i += 32) {
    const int row = i / (HS / 8), chunk = i % (HS / 8);
    if (row < rows)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(smem + chunk_offset<HS>(smem_row + row, chunk));
  }
}

// Rows 0 ... end - 1 of two matrices, keys and values or queries and dout, on their way through shared memory.
template <class Real, int HS>
struct TilePairs {
  Real* smem;
  const Real *x, *y;
  int x_stride, y_stride, end;
  static constexpr int tile = tile_rows<HS>;

  __device__ static int x_row(int i) { return i / tile % 2 * 2 * tile + i % tile; }  // where row i is in shared memory
  __device__ static int y_row(int i) { return x_row(i) + tile; }
  __device__ void copy(int i) const {
    copy_rows<tile, HS>(smem, x_row(i), x, x_stride, i, end);
    copy_rows<tile, HS>(smem, y_row(i), y, y_stride, i, end);
    copy_async_commit();
  }
  // All threads call it before the first use of each row i that begins a tile; copy(0) precedes.
  __device__ void advance(int i) const {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody needs the one before
    if (i + tile < end) copy(i + tile);
  }
};

// 16 R rows in shared memory as left sides of products
template <int HS, int R, class Real>
__device__ inline void load_a(uint32_t (&a)[R][HS / 16][4], const Real* smem, int row) {
  const int mine = chunk_offset<HS>(row + lane() % 16, lane() / 16);
  for (int r = 0; r < R; r++)
    for (int k = 0; k < HS / 16; k++) ldmatrix_x4(a[r][k], smem + r * 16 * HS + (mine ^ (16 * k)));
}

template <class Real>
__device__ inline void multiply(Block& d, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_16x8x16<Real>(d.half[0], a, {b[0], b[1]});
  mma_16x8x16<Real>(d.half[1], a, {b[2], b[3]});
}

// s (16 R, 16 N) = a (16 R, HS) @ rows (16 N, HS)^T, from row `row` of shared memory on
template <class Real, int HS, int R, int N>
__device__ inline void multiply_transposed(Block (&s)[R][N], const uint32_t (&a)[R][HS / 16][4], const Real* smem,
                                           int row) {
  const int mine = chunk_offset<HS>(row + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
  for (int n = 0; n < N; n++) {
    for (int r = 0; r < R; r++) s[r][n] = {};
    for (int k = 0; k < HS / 16; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, smem + n * 16 * HS + (mine ^ (16 * k)));
      for (int r = 0; r < R; r++) multiply<Real>(s[r][n], a[r][k], b);
    }
  }
}
// sum (16 R, HS) += p (16 R, 16 N), rounded to Real, @ rows (16 N, HS)
template <class Real, int HS, int R, int N>
__device__ inline void multiply_add(Block (&sum)[R][HS / 16], const Block (&p)[R][N], const Real* smem, int row) {
  const int mine = chunk_offset<HS>(row + lane() % 16, lane() / 16);
#pragma unroll
  for (int n = 0; n < N; n++) {
    uint32_t a[R][4];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4; i++) a[r][i] = pack2<Real>(p[r][n][2 * i], p[r][n][2 * i + 1]);
    for (int c = 0; c < HS / 16; c++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, smem + n * 16 * HS + (mine ^ (16 * c)));
      for (int r = 0; r < R; r++) multiply<Real>(sum[r][c], a[r], b);
    }
  }
}

// Which elements of a block of weights dropout keeps. TRANSPOSED: the block has keys as rows and queries as columns,
// but the draws are numbered the other way round, so the quarters' masks change lanes.
template <bool TRANSPOSED>
__device__ inline void mask(bool (&keep)[8], const Dropout& drop, uint64_t bh, int q, int kv, int T) {
  const Philox4 draws = random4(drop.seed, drop.step, drop.site, attention_counter(bh, q, kv, T) + lane());
  if constexpr (TRANSPOSED) {
    uint32_t quarter[4];
    for (int w = 0; w < 4; w++)
      quarter[w] = transpose_8x8((draw_of(draws, 2 * w) < drop.threshold ? 0xffffu : 0u) |
                                 (draw_of(draws, 2 * w + 1) < drop.threshold ? 0xffff0000u : 0u));
    for (int i = 0; i < 8; i++) keep[i] = quarter[i / 2 % 2 * 2 + i / 4] >> 16 * (i % 2) & 1;
  } else {
    for (int i = 0; i < 8; i++) keep[i] = draw_of(draws, i) < drop.threshold;
  }
}

// Scores of keys that come after the query become -infinity; a step of scores that has none is left alone.
template <bool TRANSPOSED, int R, int N>
__device__ inline void hide_later_keys(Block (&s)[R][N], int first_row, int first_column) {
  const int last_row = first_row + 16 * R - 1, last_column = first_column + 16 * N - 1;
  if (TRANSPOSED ? last_row <= first_column : last_column <= first_row) return;
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 8; i++) {
        const int row = first_row + r * 16 + row_of(i), column = first_column + n * 16 + column_of(i);
        if (TRANSPOSED ? row > column : column > row) s[r][n][i] = -INFINITY;
      }
}

// One step of the running softmax, for 16 queries: scores become exp(score - the largest so far), which sum and
// whatever else was summed before must be shrunk to. A query's first step has key 0, so the largest is finite from then
// on.
template <class Real, int N>
__device__ inline void softmax_step(Block (&s)[N], float (&max)[2], float (&sum)[2], float (&shrink)[2], float scale) {
  for (int r = 0; r < 2; r++) {  // the lane's rows: its elements 2r, 2r + 1 of every four
    const float before = max[r];
    float part = 0;
    for (int i = 0; i < 4 * N; i++) max[r] = fmaxf(max[r], s[i / 4].half[i / 2 % 2][2 * r + i % 2]);
    max[r] = lane_max<4>(max[r]);
    shrink[r] = power_of_two<Real>((before - max[r]) * scale);
    for (int i = 0; i < 4 * N; i++) {
      float& x = s[i / 4].half[i / 2 % 2][2 * r + i % 2];
      x = power_of_two<Real>(fmaf(x, scale, -max[r] * scale));
      part += x;
    }
    sum[r] = sum[r] * shrink[r] + part;
  }
}

}  // namespace attention

template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_forward_kernel(Real* out, float* lse, const Real* qkv, Dropout drop, const int* step, float keep_scale,
                             int T, int NH) {
  using namespace attention;
  constexpr int R = query_blocks<HS>, N = step_keys / 16, rows = warps * 16 * R;
  if (DROPOUT) drop.step = uint32_t(*step);
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16 * R;
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16 * R, T) : 0;  // they see

  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  tiles.copy(0);
  copy_async_wait<0>();
  __syncthreads();
  const int own = own_row<HS> + warp * 16 * R;
  uint32_t q[R][HS / 16][4];
  load_a<HS>(q, smem, own);

  const float scale = softmax_scale<HS>() * log2_e;
  Block o[R][HS / 16] = {};
  float max[R][2], sum[R][2] = {};
  for (int r = 0; r < R; r++) max[r][0] = max[r][1] = -INFINITY;
  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    Block s[R][N];
    multiply_transposed<Real, HS>(s, q, smem, tiles.x_row(k0));
    hide_later_keys<false>(s, first, k0);
#pragma unroll
    for (int r = 0; r < R; r++) {
      float shrink[2];
      softmax_step<Real>(s[r], max[r], sum[r], shrink, scale);
      for (int i = 0; i < HS / 2; i++) o[r][i / 8][i % 8] *= shrink[i / 2 % 2];
      if constexpr (DROPOUT) {  // after the sum: the denominator knows nothing of it
#pragma unroll
        for (int n = 0; n < N; n++) {
          bool keep[8];
          mask<false>(keep, drop, head.masks, first + r * 16, k0 + n * 16, T);
          for (int i = 0; i < 8; i++) s[r][n][i] = keep[i] ? s[r][n][i] : 0.0f;
        }
      }
    }
    multiply_add<Real, HS>(o, s, smem, tiles.y_row(k0));
  }

  __syncthreads();  // nobody needs the tiles: their memory takes the outputs
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int first_of_r = first + r * 16;
    float factor[2];
    for (int i = 0; i < 2; i++) {
      const float total = lane_sum<4>(sum[r][i]);
      const int query = first_of_r + row_of(2 * i);
      if (lse && lane() % 4 == 0 && query < T) lse[head.bh * T + query] = max[r][i] * softmax_scale<HS>() + logf(total);
      factor[i] = keep_scale / total;
    }
    store_rows<HS>(out + head.out + first_of_r * out_row, out_row, T - first_of_r, smem, own + r * 16, o[r], factor);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// D (B, NH, T) = rowsum(dout * out), and dq = dS @ k: a warp has 16 queries and goes through the keys that they see.

template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 4 - attention::fewer_blocks : 2)
    attention_backward_queries_kernel(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out,
                                      const float* lse, Dropout drop, const int* step, float keep_scale, int T,
                                      int NH) {
  using namespace attention;
  constexpr int N = step_keys / 16, rows = warps * 16, chunks = HS / 8;
  if (DROPOUT) drop.step = uint32_t(*step);
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16;
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16, T) : 0;

  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out, *O = out + head.out;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  copy_rows<rows, HS>(smem, own_row<HS> + rows, dO, out_row, first_of_block, T);
  tiles.copy(0);
  for (int i = lane(); i < 16 * chunks; i += 32) {
    const int query = first + i / chunks;
    float dot = 0;
    if (query < T) {
      const Float8 x = load8(dO + query * out_row + i % chunks * 8), y = load8(O + query * out_row + i % chunks * 8);
      for (int j = 0; j < 8; j++) dot += x[j] * y[j];
    }
    dot = lane_sum<chunks>(dot);
    if (query < T && i % chunks == 0) D[head.bh * T + query] = dot;
  }
  copy_async_wait<0>();
  __syncthreads();  // of the copies, and of D
  const int own = own_row<HS> + warp * 16;
  uint32_t q[1][HS / 16][4], dO_of_q[1][HS / 16][4];
  load_a<HS>(q, smem, own);
  load_a<HS>(dO_of_q, smem, own + rows);
  float lse_of_q[2], D_of_q[2];
  for (int r = 0; r < 2; r++) {
    const int query = first + row_of(2 * r);  // weights of rows from T on are exp(-infinity) = 0
    lse_of_q[r] = query < T ? lse[head.bh * T + query] * log2_e : INFINITY;
    D_of_q[r] = query < T ? D[head.bh * T + query] : 0.0f;
  }

  const float scale = softmax_scale<HS>() * log2_e;
  Block dq[1][HS / 16] = {};
  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    Block s[1][N], ds[1][N];
    multiply_transposed<Real, HS>(s, q, smem, tiles.x_row(k0));
    hide_later_keys<false>(s, first, k0);
    multiply_transposed<Real, HS>(ds, dO_of_q, smem, tiles.y_row(k0));
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) mask<false>(keep, drop, head.masks, first, k0 + n * 16, T);
      for (int i = 0; i < 8; i++)
        backward_weight<Real>(s[0][n][i], ds[0][n][i], scale, lse_of_q[i / 2 % 2], D_of_q[i / 2 % 2],
                              !DROPOUT || keep[i], keep_scale);
    }
    multiply_add<Real, HS>(dq, ds, smem, tiles.x_row(k0));
  }

  __syncthreads();
  store_rows<HS>(dqkv + head.qkv + first * row, row, T - first, smem, own, dq[0],
                 {softmax_scale<HS>(), softmax_scale<HS>()});
}

// dv = (m * P)^T @ dout, dk = dS^T @ q: a warp has 16 keys and goes through the queries that see them. Its scores are
// transposed, keys by queries, as the left side of these products needs them.
template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_backward_keys_kernel(Real* dqkv, const float* D, const Real* dout, const Real* qkv, const float* lse,
                                   Dropout drop, const int* step, float keep_scale, int T, int NH) {
  using namespace attention;
  constexpr int N = step_queries<HS> / 16, rows = warps * 16;
  if (DROPOUT) drop.step = uint32_t(*step);
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  const int first_of_block = int(blockIdx.z) * rows, first = first_of_block + warp * 16;

  Real* smem = dynamic_smem<Real>();
  float2* lse_and_D =
      reinterpret_cast<float2*>(smem + smem_rows<HS, 2 * rows> * HS);  // of two tiles' queries, by turns
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out;
  const TilePairs<Real, HS> tiles{smem,         Q + first_of_block * row, dO + first_of_block * out_row, int(row),
                                  int(out_row), T - first_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, K, row, first_of_block, T);
  copy_rows<rows, HS>(smem, own_row<HS> + rows, V, row, first_of_block, T);
  tiles.copy(0);
  copy_async_wait<0>();
  __syncthreads();
  const int own = own_row<HS> + warp * 16;
  uint32_t k[1][HS / 16][4], v[1][HS / 16][4];
  load_a<HS>(k, smem, own);
  load_a<HS>(v, smem, own + rows);
  static_assert(2 * tiles.tile <= threads);
  const auto load_lse_or_D = [&](int query) {
    if (threadIdx.x % 2 == 0) return query < T ? lse[head.bh * T + query] * log2_e : INFINITY;  // weights 0 from T on
    return query < T ? D[head.bh * T + query] : 0.0f;
  };

  const float scale = softmax_scale<HS>() * log2_e;
  Block dk[1][HS / 16] = {}, dv[1][HS / 16] = {};
  float next = load_lse_or_D(first_of_block + threadIdx.x / 2);
  for (int i = 0; i < tiles.end; i += step_queries<HS>) {  // queries, counted from first_of_block
    const int q0 = first_of_block + i;
    if (i % tiles.tile == 0) {
      if (threadIdx.x < 2 * tiles.tile) reinterpret_cast<float*>(lse_and_D + i % (2 * tiles.tile))[threadIdx.x] = next;
      tiles.advance(i);
      next = load_lse_or_D(q0 + tiles.tile + threadIdx.x / 2);
    }
    if (q0 + step_queries<HS> <= first) continue;  // they do not see the warp's keys
    Block p[1][N], ds[1][N];
    multiply_transposed<Real, HS>(p, k, smem, tiles.x_row(i));
    hide_later_keys<true>(p, first, q0);
    multiply_transposed<Real, HS>(ds, v, smem, tiles.y_row(i));
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) mask<true>(keep, drop, head.masks, q0 + n * 16, first, T);
      for (int j = 0; j < 8; j++) {
        const float2 of_q = lse_and_D[i % (2 * tiles.tile) + n * 16 + column_of(j)];
        backward_weight<Real>(p[0][n][j], ds[0][n][j], scale, of_q.x, of_q.y, !DROPOUT || keep[j], keep_scale);
      }
    }
    multiply_add<Real, HS>(dv, p, smem, tiles.y_row(i));
    multiply_add<Real, HS>(dk, ds, smem, tiles.x_row(i));
  }

  __syncthreads();
  Real *dK = dqkv + head.qkv + out_row + first * row, *dV = dK + out_row;
  store_rows<HS>(dK, row, T - first, smem, own, dk[0], {softmax_scale<HS>(), softmax_scale<HS>()});
  store_rows<HS>(dV, row, T - first, smem, own + rows, dv[0], {keep_scale, keep_scale});
}

// ---------------------------------------------------------------------------------------------------------------------

namespace attention {

inline void check(const char* who, const Dropout& drop, const int* step, int B, int T, int C, int NH) {
  require(B > 0 && T > 0 && NH > 0 && C % NH == 0, who, ": B = ", B, ", T = ", T, ", C = ", C, ", NH = ", NH);
  require(B <= 65535 && T <= 65535 * warps, who, ": B = ", B, " or T = ", T, " is too large for a grid");
  require(!drop.active() || step, who, ": dropout needs the step's number");
}

// body(head size, whether there is dropout), both known to the compiler
template <class Body>
void specialize(const char* who, int HS, bool dropout, Body body) {
  const auto with_head_size = [&](auto size) {
    if (dropout)
      body(size, std::true_type());
    else
      body(size, std::false_type());
  };
  require(HS == 16 || HS == 32 || HS == 64 || HS == 128, who, ": head size ", HS, " is not 16, 32, 64 or 128");
  if (HS == 16) with_head_size(std::integral_constant<int, 16>());
  if (HS == 32) with_head_size(std::integral_constant<int, 32>());
  if (HS == 64) with_head_size(std::integral_constant<int, 64>());
  if (HS == 128) with_head_size(std::integral_constant<int, 128>());
}

// Bytes of shared memory of a kernel whose blocks have OWN_ROWS rows of their own.
template <class Real, int HS, int OWN_ROWS>
constexpr size_t smem_bytes(int more = 0) {
  constexpr size_t bytes = smem_rows<HS, OWN_ROWS> * HS * sizeof(Real);
  static_assert(bytes + 4 * tile_rows<HS> * sizeof(float) <= 64 << 10, "Turing has no more");
  return bytes + more;
}

}  // namespace attention

// out (B, T, C) =, lse (B, NH, T) = or null; qkv (B, T, 3, NH, HS), step (1), which only dropout needs.
// A query's result does not depend on B. A score that overflows float makes its query's results NaN.
template <class Real>
void attention_forward(Real* out, float* lse, const Real* qkv, const Dropout& drop, const int* step, int B, int T,
                       int C, int NH, cudaStream_t stream) {
  using namespace attention;
  check("attention_forward", drop, step, B, T, C, NH);
  const float keep_scale = float(dropout_scale(drop.threshold));
  specialize("attention_forward", C / NH, drop.active(), [&](auto size, auto dropout) {
    constexpr int HS = size;
    if constexpr (std::is_same_v<Real, float>) {
      launch(attention_forward_float_kernel<HS, dropout>, {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream}, out,
             lse, qkv, drop, step, keep_scale, T, NH);
    } else {
      constexpr int rows = warps * 16 * query_blocks<HS>;
      launch(attention_forward_kernel<Real, HS, dropout>,
             {dim3(NH, B, ceil_div(T, rows)), threads, smem_bytes<Real, HS, rows>(), stream}, out, lse, qkv, drop, step,
             keep_scale, T, NH);
    }
  });
}

// dqkv (B, T, 3, NH, HS) =, D (B, NH, T) = is scratch; dout (B, T, C), qkv, out (B, T, C), lse (B, NH, T), step (1)
template <class Real>
void attention_backward(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                        const Dropout& drop, const int* step, int B, int T, int C, int NH, cudaStream_t stream) {
  using namespace attention;
  check("attention_backward", drop, step, B, T, C, NH);
  const float keep_scale = float(dropout_scale(drop.threshold));
  specialize("attention_backward", C / NH, drop.active(), [&](auto size, auto dropout) {
    constexpr int HS = size;
    if constexpr (std::is_same_v<Real, float>) {
      const LaunchConfig config = {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream};
      launch(attention_backward_queries_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, out, lse, drop, step,
             keep_scale, T, NH);
      launch(attention_backward_keys_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, lse, drop, step, keep_scale,
             T, NH);
    } else {
      const dim3 grid(NH, B, ceil_div(T, warps * 16));
      launch(attention_backward_queries_kernel<Real, HS, dropout>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(), stream}, dqkv, D, dout, qkv, out, lse, drop, step,
             keep_scale, T, NH);
      launch(attention_backward_keys_kernel<Real, HS, dropout>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(2 * tile_rows<HS> * sizeof(float2)), stream}, dqkv, D,
             dout, qkv, lse, drop, step, keep_scale, T, NH);
    }
  });
}
