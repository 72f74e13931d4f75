// Causal multi-head self-attention of floats on the GPU, on tensor cores: version 2 of attention_float in choices.cuh.
// Tensor cores multiply floats as TF32 numbers, of which 11 bits count where a float has 24 (device.cuh). PRODUCTS says
// how many such products make one product of floats:
//
//   1 (--dtype tf32)      high * high, each operand rounded by up to 2^-11 of itself
//   3 (--dtype float32)   high * high + high * low + low * high, where x = high + low: high is x rounded, low the rest
//
// low has up to 12 bits, of which the tensor cores ignore the last. Three products leave out low * low. So a product is
// wrong by up to 2^-21 of itself, mostly by much less, where float rounds it by 2^-24.
//
// The kernels do what those in attention.cuh do, in the same order; read them first. A warp's scores are the same
// squares of 16 x 16, so softmax_step, hide_later_keys and attention_mask serve both. What differs:
// - Floats are twice as large, so there is no room in registers for the rows that a warp owns. They stay in shared
//   memory, and every step reads them again. Tiles are smaller, and a step takes a whole tile.
// - There is no ldmatrix for 32-bit numbers. A lane reads its part of an operand by plain loads of 16 bytes.
// - A product's sum over k may take k in any order, the same for both operands. multiply_transposed and multiply_add
//   choose orders in which a lane's numbers are neighbours.
// defines: attention_forward_tf32_kernel, attention_backward_queries_tf32_kernel, attention_backward_keys_tf32_kernel,
//          attention::has_tf32_kernels, forward_by_tf32, backward_by_tf32
#pragma once
#include "attention_squares.cuh"
#include "choices.cuh"
#include "launch.cuh"

namespace attention_tf32 {

using attention::dot4;
using attention::Head;
using attention::lane;
using attention::Square;
using attention::threads;
using attention::warps;

// Keys or queries in a tile, all of which a warp takes in one step.
template <int HS>
constexpr int tile_rows = HS <= 64 ? 32 : 16;

// How many squares of 16 queries a warp owns in forward (R). In backward it owns one.
template <int HS, int PRODUCTS>
constexpr int query_squares = HS <= 64 && PRODUCTS == 1 ? 2 : 1;

// ---------------------------------------------------------------------------------------------------------------------
// Operands

// A lane's part of an operand: N of its floats belong to columns (or rows) 0 ... 7 of sixteen, N to the others.
template <int PRODUCTS, int N>
struct Operand {
  float high[2][N], low[2][PRODUCTS == 3 ? N : 1];
  __device__ void set(int half, int i, float x) {
    high[half][i] = round_to_tf32(x);
    if constexpr (PRODUCTS == 3) low[half][i] = x - high[half][i];
  }
};

// d (16, 8) += a (16, 16) @ b (16, 8)
// Tensor cores round sums towards zero, and so a long sum of theirs becomes too small. That would spoil the three
// products: there the tensor cores only add up these 16 terms, the smallest first, and we add the result to d.
template <int PRODUCTS>
__device__ inline void multiply(float (&d)[4], const Operand<PRODUCTS, 4>& a, const Operand<PRODUCTS, 2>& b) {
  if constexpr (PRODUCTS == 1) {
    for (int k = 0; k < 2; k++) mma_16x8x8_tf32(d, a.high[k], b.high[k]);
  } else {
    float sum[4] = {};
    for (int k = 0; k < 2; k++) {
      mma_16x8x8_tf32(sum, a.low[k], b.high[k]);
      mma_16x8x8_tf32(sum, a.high[k], b.low[k]);
    }
    for (int k = 0; k < 2; k++) mma_16x8x8_tf32(sum, a.high[k], b.high[k]);
    for (int i = 0; i < 4; i++) d[i] += sum[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory is rows of HS floats:
//
//   the thread block's own rows  |  stage 0: a tile of x, a tile of y  |  stage 1: a tile of x, a tile of y
//
// x and y are keys and values, or queries and dout. While the warps use one stage, the next tiles arrive in the other.

// N neighbouring floats, read or written at once.
template <int N>
struct __align__(4 * N) Floats {
  float v[N];
};
template <int N>
__device__ inline Floats<N> load(const float* from) {
  return *reinterpret_cast<const Floats<N>*>(from);
}

// Where channel `channel` of a row stands in shared memory. Chunks of four channels change their places by an exclusive
// or, within the 128 bytes that have a place in every bank. A warp reads 16 bytes a lane in four turns of eight lanes,
// and it reads in two ways, which both get eight chunks in different banks:
//   multiply_transposed   rows r and r + 1 (r is even), of each the chunks c ... c + 3 (c is a multiple of 4)
//   multiply_add          rows r, r + 2, r + 4, r + 6, of each the chunks c and c + 1 (c is even)
// So bits 1 and 2 of the row go into the chunk's bits 1 and 2, and bit 0 into bit 2. (Rows of 16 floats need no bit 0:
// two of them share 128 bytes, and so it is bit 2 already.) Rows that are 8 apart have the same order.
template <int HS>
__device__ inline int place(int row, int channel) {
  const int order = (row & 6) ^ (HS > 16 ? row % 2 * 4 : 0);
  return ((row * (HS / 4) + channel / 4) ^ order) * 4 + channel % 4;
}

// Begins to copy rows first ... first + ROWS - 1 of a (T, HS) matrix, whose rows are `stride` floats apart, to shared
// memory. Rows from T on become zeros. All threads of the block take part, 16 bytes each at a time.
template <int ROWS, int HS>
__device__ inline void copy_rows(float* smem, const float* from, int stride, int first, int T) {
  static_assert(ROWS * HS / 4 % threads == 0);
  from += size_t(first) * stride;
#pragma unroll
  for (int i = 0; i < ROWS * HS / 4; i += threads) {
    const int row = (i + int(threadIdx.x)) / (HS / 4), channel = (i + int(threadIdx.x)) % (HS / 4) * 4;
    copy_async_16(smem + place<HS>(row, channel), from + row * stride + channel, first + row < T);
  }
}

// Rows 0 ... end - 1 of two matrices x and y, on their way through shared memory. All threads of the block work on it
// together:
//
//   copy(0);  for (i = 0; i < end; i += tile) { advance(i);  ... use rows i ... i + tile - 1, at x_tile(i), y_tile(i) }
template <int HS>
struct Tiles {
  float* smem;                  // both stages
  const float *x, *y;           // (end, HS)
  int x_stride, y_stride, end;  // floats from row to row
  static constexpr int tile = tile_rows<HS>;

  __device__ float* x_tile(int i) const { return smem + i / tile % 2 * (2 * tile * HS); }
  __device__ float* y_tile(int i) const { return x_tile(i) + tile * HS; }
  __device__ void copy(int i) const {
    copy_rows<tile, HS>(x_tile(i), x, x_stride, i, end);
    copy_rows<tile, HS>(y_tile(i), y, y_stride, i, end);
    copy_async_commit();
  }
  // Waits for the tiles that begin at row i (and for all that was copied before), and begins to copy the next ones over
  // the ones before.
  __device__ void advance(int i) const {
    copy_async_wait<0>();
    __syncthreads();  // every thread's copies have arrived, and no warp still reads the previous tiles
    if (i + tile < end) copy(i + tile);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Products. g = lane / 4, t = lane % 4.

// s (16 R, 16 N) = own (16 R, HS) @ rows (16 N, HS)^T, both from shared memory. Scores are q @ k^T, dP is dout @ v^T.
// Of 16 channels, a lane reads 4 t ... 4 t + 3 at once: k = t and t + 4 of the first eight, then of the second.
template <int PRODUCTS, int HS, int R, int N>
__device__ inline void multiply_transposed(Square (&s)[R][N], const float* own, const float* rows) {
  const int offset = place<HS>(lane() / 4, lane() % 4 * 4);
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) s[r][n] = {};
#pragma unroll
  for (int c = 0; c < HS; c += 16) {
    // 1. Our rows g and g + 8 of each 16.
    Operand<PRODUCTS, 4> a[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float* from = own + (offset ^ c) + 16 * r * HS;
      const Floats<4> upper = load<4>(from), lower = load<4>(from + 8 * HS);
      for (int i = 0; i < 4; i++) {
        a[r].set(i / 2, i % 2 * 2, upper.v[i]);
        a[r].set(i / 2, i % 2 * 2 + 1, lower.v[i]);
      }
    }
    // 2. Row g of each eight of the others, which is column g of a product.
#pragma unroll
    for (int n = 0; n < 2 * N; n++) {
      const Floats<4> x = load<4>(rows + (offset ^ c) + 8 * n * HS);
      Operand<PRODUCTS, 2> b;
      for (int i = 0; i < 4; i++) b.set(i / 2, i % 2, x.v[i]);
      for (int r = 0; r < R; r++) multiply(s[r][n / 2].half[n % 2], a[r], b);
    }
  }
}

// How a lane holds sums (16, HS). Channels come in groups of 32 (or all 16), a lane has two runs in each group's row:
//   element [c / 8 + j][i] of group c ... c + 31:   row g + i / 2 * 8, channel c + (2 t + i % 2) * run + j
// That is mma's layout of four products side by side, whose columns g are the channels g * run + j, j = 0 ... run - 1.
template <int HS>
using Sums = float[HS / 8][4];
template <int HS>
constexpr int run = HS < 32 ? HS / 8 : 4;

// sum (16 R, HS) += p (16 R, 16 N) @ rows (16 N, HS), where rows are in shared memory. p is the result of another
// product, already spread over the lanes as a left operand has to be, if its columns 2 t and 2 t + 1 become k = t and
// t + 4. So a lane reads rows 2 t and 2 t + 1 of each eight.
template <int PRODUCTS, int HS, int R, int N>
__device__ inline void multiply_add(Sums<HS> (&sum)[R], const Square (&p)[R][N], const float* rows) {
  const int offset[2] = {place<HS>(lane() % 4 * 2, lane() / 4 * run<HS>),
                         place<HS>(lane() % 4 * 2 + 1, lane() / 4 * run<HS>)};
#pragma unroll
  for (int n = 0; n < N; n++) {
    Operand<PRODUCTS, 4> a[R];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 8; i++) a[r].set(i / 4, i % 2 * 2 + i / 2 % 2, p[r][n][i]);
#pragma unroll
    for (int c = 0; c < HS; c += 8 * run<HS>) {
      Floats<run<HS>> x[2][2];  // rows 2 t and 2 t + 1 of the first eight and of the second
      for (int i = 0; i < 4; i++) x[i / 2][i % 2] = load<run<HS>>(rows + offset[i % 2] + (2 * n + i / 2) * 8 * HS + c);
      for (int j = 0; j < run<HS>; j++) {
        Operand<PRODUCTS, 2> b;
        for (int i = 0; i < 4; i++) b.set(i / 2, i % 2, x[i / 2][i % 2].v[j]);
        for (int r = 0; r < R; r++) multiply(sum[r][c / 8 + j], a[r], b);
      }
    }
  }
}

// Writes a warp's 16 rows, x (16, HS) * factor, to `to` (16, HS), whose rows are `stride` floats apart; rows from
// `rows` on do not exist. Four neighbouring lanes write 128 bytes of a row.
// factor: for this lane's rows g and g + 8
template <int HS>
__device__ inline void store_rows(float* to, int stride, int rows, const Sums<HS>& x, const float (&factor)[2]) {
#pragma unroll
  for (int c = 0; c < HS; c += 8 * run<HS>)
    for (int i = 0; i < 4; i++) {
      const int row = attention::row_of(i), channel = c + (lane() % 4 * 2 + i % 2) * run<HS>;
      Floats<run<HS>> out;
      for (int j = 0; j < run<HS>; j++) out.v[j] = x[c / 8 + j][i] * factor[i / 2];
      if (row < rows) *reinterpret_cast<Floats<run<HS>>*>(to + row * stride + channel) = out;
    }
}

}  // namespace attention_tf32

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Launched with (NH, B, ceil(T / rows)) blocks of 128 threads: a block has one head of one batch row and
// rows = 4 * 16 R queries, a warp has 16 R of them. It keeps their softmax and their output in registers while the
// block goes through the keys up to its last query.
//   out  (B, T, NH, HS) =       the weighted sums of the values
//   lse  (B, NH, T) = or null   the logarithm of each query's softmax denominator, for backward
//   qkv  (B, T, 3, NH, HS)
template <int HS, bool DROPOUT, int PRODUCTS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 && PRODUCTS == 3 ? 3 : 2)
    attention_forward_tf32_kernel(float* out, float* lse, const float* qkv, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention_tf32;
  constexpr int R = query_squares<HS, PRODUCTS>, N = tile_rows<HS> / 16, rows = warps * 16 * R;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const int out_row = NH * HS, row = 3 * out_row, warp = attention::warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16 * R;
  // Keys that the block's queries see, and that the warp's queries see: those up to the last query.
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16 * R, T) : 0;

  // 1. Our queries, and the first tiles of keys and values: global -> shared.
  float* smem = dynamic_smem<float>();
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  const Tiles<HS> tiles{smem + rows * HS, K, V, row, row, keys_of_block};
  copy_rows<rows, HS>(smem, Q, row, first_of_block, T);
  tiles.copy(0);
  const float* q = smem + warp * 16 * R * HS;

  // What stays in registers: o, the output so far, not yet divided; and for the lane's rows g and g + 8 of each 16
  // queries the softmax's maximum so far (of the whole row) and sum so far (of the lane's columns).
  const float scale = attention::softmax_scale<HS>() * attention::log2_e;
  Sums<HS> o[R] = {};
  float max[R][2], sum[R][2] = {};
  for (int r = 0; r < R; r++) max[r][0] = max[r][1] = -INFINITY;
  for (int k0 = 0; k0 < keys_of_block; k0 += tiles.tile) {
    // 2. A tile of keys. A warp whose queries do not see them only helps to copy the next, in advance().
    tiles.advance(k0);
    if (k0 >= keys) continue;
    // 3. scores = q @ k^T, for our queries and these keys
    Square s[R][N];
    multiply_transposed<PRODUCTS, HS>(s, q, tiles.x_tile(k0));
    attention::hide_later_keys<false>(s, first, k0);
#pragma unroll
    for (int r = 0; r < R; r++) {
      // 4. Running softmax: scores become weights, the output so far shrinks with the sum.
      float shrink[2];
      attention::softmax_step<float>(s[r], max[r], sum[r], shrink, scale);
      for (int i = 0; i < HS / 2; i++) o[r][i / 4][i % 4] *= shrink[i / 2 % 2];
      // 5. Dropout, after the sum: the denominator contains all weights.
      if constexpr (DROPOUT) {
#pragma unroll
        for (int n = 0; n < N; n++) {
          bool keep[8];
          attention_mask<false>(keep, drop, head.draw_head, first + r * 16, k0 + n * 16, T);
          for (int i = 0; i < 8; i++) s[r][n][i] = keep[i] ? s[r][n][i] : 0.0f;
        }
      }
    }
    // 6. o += weights @ v
    multiply_add<PRODUCTS, HS>(o, s, tiles.y_tile(k0));
  }

  // 7. Write lse. Divide out by the denominators, apply dropout's factor, and write it.
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int first_of_r = first + r * 16;
    float factor[2];
    for (int i = 0; i < 2; i++) {
      const float total = lane_sum<4>(sum[r][i]);  // the row's four lanes
      const int query = first_of_r + attention::row_of(2 * i);
      if (lse && lane() % 4 == 0 && query < T)
        lse[head.bh * T + query] = max[r][i] * attention::softmax_scale<HS>() + logf(total);
      factor[i] = drop.keep_scale / total;
    }
    store_rows<HS>(out + head.out + size_t(first_of_r) * out_row, out_row, T - first_of_r, o[r], factor);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, first kernel: D = rowsum(dout * out) and dq = dS @ k.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads: a block has one head of one batch row and 64 queries, a
// warp has 16 of them and goes through the keys that they see.
//   dqkv (B, T, 3, NH, HS)      dq is written; dk and dv are the other kernel's
//   D    (B, NH, T) =           which the other kernel reads
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T) from forward
template <int HS, bool DROPOUT, int PRODUCTS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 : 2)
    attention_backward_queries_tf32_kernel(float* dqkv, float* D, const float* dout, const float* qkv, const float* out,
                                           const float* lse, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention_tf32;
  constexpr int N = tile_rows<HS> / 16, rows = warps * 16;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const int out_row = NH * HS, row = 3 * out_row, warp = attention::warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16;
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16, T) : 0;

  // 1. Our queries and their rows of dout, and the first tiles of keys and values: global -> shared.
  float* smem = dynamic_smem<float>();
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out, *O = out + head.out;
  const Tiles<HS> tiles{smem + 2 * rows * HS, K, V, row, row, keys_of_block};
  copy_rows<rows, HS>(smem, Q, row, first_of_block, T);
  copy_rows<rows, HS>(smem + rows * HS, dO, out_row, first_of_block, T);
  tiles.copy(0);
  const float *q = smem + warp * 16 * HS, *dO_of_q = q + rows * HS;
  // 2. Meanwhile lse and D of the lane's rows g and g + 8, from global memory. A row's four lanes share its channels.
  float lse_of_q[2], D_of_q[2];
  for (int r = 0; r < 2; r++) {
    const int query = first + attention::row_of(2 * r);
    float dot = 0;
    for (int c = lane() % 4 * 4; c < HS && query < T; c += 16)
      dot += dot4(*reinterpret_cast<const float4*>(dO + size_t(query) * out_row + c),
                  *reinterpret_cast<const float4*>(O + size_t(query) * out_row + c));
    D_of_q[r] = lane_sum<4>(dot);
    if (query < T && lane() % 4 == 0) D[head.bh * T + query] = D_of_q[r];
    // Rows from T on get weights of exp(-infinity) = 0.
    lse_of_q[r] = query < T ? lse[head.bh * T + query] * attention::log2_e : INFINITY;
  }

  const float scale = attention::softmax_scale<HS>() * attention::log2_e;
  Sums<HS> dq[1] = {};
  for (int k0 = 0; k0 < keys_of_block; k0 += tiles.tile) {
    // 3. A tile of keys. A warp whose queries do not see them only helps to copy the next, in advance().
    tiles.advance(k0);
    if (k0 >= keys) continue;
    // 4. scores = q @ k^T, dP = dout @ v^T
    Square s[1][N], ds[1][N];  // ds: dP now, dS after backward_weight
    multiply_transposed<PRODUCTS, HS>(s, q, tiles.x_tile(k0));
    attention::hide_later_keys<false>(s, first, k0);
    multiply_transposed<PRODUCTS, HS>(ds, dO_of_q, tiles.y_tile(k0));
    // 5. dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) attention_mask<false>(keep, drop, head.draw_head, first, k0 + n * 16, T);
      for (int i = 0; i < 8; i++)
        attention::backward_weight<float>(s[0][n][i], ds[0][n][i], scale, lse_of_q[i / 2 % 2], D_of_q[i / 2 % 2],
                                          !DROPOUT || keep[i], drop.keep_scale);
    }
    // 6. dq += dS @ k
    multiply_add<PRODUCTS, HS>(dq, ds, tiles.x_tile(k0));
  }

  // 7. Write dq, with the factor that dS lacks.
  store_rows<HS>(dqkv + head.qkv + size_t(first) * row, row, T - first, dq[0],
                 {attention::softmax_scale<HS>(), attention::softmax_scale<HS>()});
}

// Backward, second kernel: dv = (m * P)^T @ dout and dk = dS^T @ q.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads, after the first kernel: a block has one head of one batch
// row and 64 keys, a warp has 16 of them and goes through the queries that see them. Its scores are transposed, keys by
// queries, because that is the left operand that its products need.
//   dqkv (B, T, 3, NH, HS)      dk and dv are written
//   D    (B, NH, T)             from the first kernel
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T)
template <int HS, bool DROPOUT, int PRODUCTS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 && PRODUCTS == 1 ? 3 : 2)
    attention_backward_keys_tf32_kernel(float* dqkv, const float* D, const float* dout, const float* qkv,
                                        const float* lse, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention_tf32;
  constexpr int N = tile_rows<HS> / 16, rows = warps * 16;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const int out_row = NH * HS, row = 3 * out_row, warp = attention::warp_index();
  const int first_of_block = int(blockIdx.z) * rows, first = first_of_block + warp * 16;

  // 1. Our keys and values, and the first tiles of queries and dout: global -> shared. Behind the tiles it has lse and
  //    D of the queries of both stages, (2, tile).
  float* smem = dynamic_smem<float>();
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out;
  const Tiles<HS> tiles{
      smem + 2 * rows * HS, Q + size_t(first_of_block) * row, dO + size_t(first_of_block) * out_row, row, out_row,
      T - first_of_block};
  copy_rows<rows, HS>(smem, K, row, first_of_block, T);
  copy_rows<rows, HS>(smem + rows * HS, V, row, first_of_block, T);
  tiles.copy(0);
  const float *k = smem + warp * 16 * HS, *v = k + rows * HS;
  float2* lse_and_D = reinterpret_cast<float2*>(tiles.smem + 4 * tiles.tile * HS);
  // Threads 2 i and 2 i + 1 fetch lse and D of query i of a tile, one tile ahead.
  static_assert(2 * tiles.tile <= threads);
  const auto load_lse_or_D = [&](int query) {
    // Queries from T on get weights of exp(-infinity) = 0.
    if (threadIdx.x % 2 == 0) return query < T ? lse[head.bh * T + query] * attention::log2_e : INFINITY;
    return query < T ? D[head.bh * T + query] : 0.0f;
  };

  const float scale = attention::softmax_scale<HS>() * attention::log2_e;
  Sums<HS> dk[1] = {}, dv[1] = {};
  float next = load_lse_or_D(first_of_block + threadIdx.x / 2);
  for (int i = 0; i < tiles.end; i += tiles.tile) {  // queries, counted from first_of_block
    // 2. A tile of queries. Its lse and D go to shared memory, before the barrier in advance().
    const int q0 = first_of_block + i, stage = i % (2 * tiles.tile);
    if (threadIdx.x < 2 * tiles.tile) reinterpret_cast<float*>(lse_and_D + stage)[threadIdx.x] = next;
    tiles.advance(i);
    next = load_lse_or_D(q0 + tiles.tile + threadIdx.x / 2);
    if (q0 + tiles.tile <= first) continue;  // they do not see the warp's keys
    // 3. scores^T = k @ q^T, dP^T = v @ dout^T
    Square p[1][N], ds[1][N];  // scores and dP now, weights and dS after backward_weight
    multiply_transposed<PRODUCTS, HS>(p, k, tiles.x_tile(i));
    attention::hide_later_keys<true>(p, first, q0);
    multiply_transposed<PRODUCTS, HS>(ds, v, tiles.y_tile(i));
    // 4. Scores become weights after dropout, dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) attention_mask<true>(keep, drop, head.draw_head, q0 + n * 16, first, T);
      for (int j = 0; j < 8; j++) {
        const float2 of_q = lse_and_D[stage + n * 16 + attention::column_of(j)];
        attention::backward_weight<float>(p[0][n][j], ds[0][n][j], scale, of_q.x, of_q.y, !DROPOUT || keep[j],
                                          drop.keep_scale);
      }
    }
    // 5. dv += weights^T @ dout, dk += dS^T @ q
    multiply_add<PRODUCTS, HS>(dv, p, tiles.y_tile(i));
    multiply_add<PRODUCTS, HS>(dk, ds, tiles.x_tile(i));
  }

  // 6. Write dk and dv, with the factors that backward_weight leaves out.
  float *dK = dqkv + head.qkv + out_row + size_t(first) * row, *dV = dK + out_row;
  store_rows<HS>(dK, row, T - first, dk[0], {attention::softmax_scale<HS>(), attention::softmax_scale<HS>()});
  store_rows<HS>(dV, row, T - first, dv[0], {drop.keep_scale, drop.keep_scale});
}

// ---------------------------------------------------------------------------------------------------------------------
// attention_forward<float> and attention_backward<float> launch the kernels above through these functions.

namespace attention {

// Whether choices() asks for these kernels, and the card has TF32.
inline bool has_tf32_kernels() {
  static const bool ampere = current_card().major >= 8;
  return choices().attention_float == 2 && ampere;
}

// Bytes of shared memory of a kernel whose blocks own OWN_ROWS rows.
template <int HS, int OWN_ROWS>
constexpr size_t smem_bytes_tf32 = (OWN_ROWS + 4 * attention_tf32::tile_rows<HS>)*HS * sizeof(float);

template <int HS, bool DROPOUT>
void forward_by_tf32(float* out, float* lse, const float* qkv, const DeviceDropout& drop, int B, int T, int NH,
                     cudaStream_t stream, bool tf32) {
  const auto run = [&](auto products) {
    constexpr int rows = warps * 16 * attention_tf32::query_squares<HS, products>;
    launch(attention_forward_tf32_kernel<HS, DROPOUT, products>,
           {dim3(NH, B, ceil_div(T, rows)), threads, smem_bytes_tf32<HS, rows>, stream}, out, lse, qkv, drop, T, NH);
  };
  tf32 ? run(std::integral_constant<int, 1>()) : run(std::integral_constant<int, 3>());
}

template <int HS, bool DROPOUT>
void backward_by_tf32(float* dqkv, float* D, const float* dout, const float* qkv, const float* out, const float* lse,
                      const DeviceDropout& drop, int B, int T, int NH, cudaStream_t stream, bool tf32) {
  const dim3 grid(NH, B, ceil_div(T, warps * 16));
  constexpr size_t smem = smem_bytes_tf32<HS, warps * 32>;
  constexpr size_t lse_and_D = 2 * attention_tf32::tile_rows<HS> * sizeof(float2);
  static_assert(smem + lse_and_D <= 99 << 10, "on a card of capability 8.6 or 8.9 a block has no more");
  const auto run = [&](auto products) {
    launch(attention_backward_queries_tf32_kernel<HS, DROPOUT, products>, {grid, threads, smem, stream}, dqkv, D, dout,
           qkv, out, lse, drop, T, NH);
    launch(attention_backward_keys_tf32_kernel<HS, DROPOUT, products>, {grid, threads, smem + lse_and_D, stream}, dqkv,
           D, dout, qkv, lse, drop, T, NH);
  };
  tf32 ? run(std::integral_constant<int, 1>()) : run(std::integral_constant<int, 3>());
}

}  // namespace attention
