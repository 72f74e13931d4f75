// Causal multi-head self-attention with dropout on the weights, on the GPU. attention.h has the equations and the CPU
// twin, dropout_law.h the numbering of the random draws. bf16 and fp16 run on tensor cores, with the kernels below,
// which doc/attention.md explains. float runs on the simpler kernels of attention_float.cuh: read those first.
//
// No (T, T) matrix is ever stored. Forward goes through the keys in tiles with a running softmax (Dao et al.,
// "FlashAttention", 2022, algorithm 1); a block of threads has some of the queries (Dao, "FlashAttention-2", 2023,
// section 3). Backward computes the weights again, from the logarithm of the softmax's denominator. It is two kernels:
// one owns queries and writes dq, the other owns keys and writes dk and dv. Both compute the weights, which makes seven
// products where a single kernel needs five. In exchange every sum stays within a warp, in a fixed order, without
// atomics.
//
// Where a whole head fits into shared memory there are second versions of both passes: attention_forward_head.cuh, with
// the same bits, and attention_backward_once.cuh, a single kernel that has an order of its own. choices.cuh says which
// card takes them: none yet.
// defines: attention_forward, attention_backward
#pragma once
#include <type_traits>

#include "attention_float.cuh"
#include "choices.cuh"
#include "device.cuh"
#include "dropout.cuh"
#include "launch.cuh"

namespace attention {

// Turing needs more registers a thread, so there we ask for one resident block fewer per multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int fewer_blocks = 1;
#else
constexpr int fewer_blocks = 0;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Squares. A warp's scores, weights and sums are made of squares of 16 x 16. A lane holds eight elements of a square,
// where the tensor cores put them (mma_16x8x16 in device.cuh). With g = lane / 4 and t = lane % 4:
//
//               columns 2t, 2t + 1     columns 2t + 8, 2t + 9
//   row g       elements 0, 1          elements 4, 5
//   row g + 8   elements 2, 3          elements 6, 7
//
// So four neighbouring lanes share a row. Dropout decides about element i by draw i of the lane's eight; in the keys
// kernel, attention_mask transposes the draws first. Below, a warp owns R squares of 16 rows, and takes N squares of 16
// keys or queries in one step. Squares live in registers, which have no addresses: loops over them must be unrolled.
// The compiler does that by itself for short loops; the long ones have a pragma.

struct Square {
  float half[2][4];  // columns 0 ... 7 and 8 ... 15
  __device__ float& operator[](int i) { return half[i / 4][i % 4]; }
  __device__ const float& operator[](int i) const { return half[i / 4][i % 4]; }
};
// Where this lane's element i is in a square.
__device__ inline int row_of(int i) { return lane() / 4 + i / 2 % 2 * 8; }
__device__ inline int column_of(int i) { return lane() % 4 * 2 + i / 4 * 8 + i % 2; }

// Keys (or queries, where a warp owns keys) whose scores a warp computes in one step: as many as its registers hold.
constexpr int step_keys = 32;
template <int HS>
constexpr int step_queries = HS <= 32 ? 32 : 16;

// Shared memory is rows of HS elements, in two stages. While the warps use one, the next tiles arrive in the other.
//
//   stage 0:  a tile of x  |  a tile of y      x and y are keys and values, or queries and dout
//   stage 1:  a tile of x  |  a tile of y      before its first tiles come: the thread block's own rows, on their way
//                                              to registers; after the last: the results, on their way to memory
template <int HS>
constexpr int tile_rows = HS <= 64 ? 64 : 32;
template <int HS>
constexpr int own_row = 2 * tile_rows<HS>;  // where stage 1 begins
template <int HS, int OWN_ROWS>
constexpr int smem_rows = own_row<HS> + (OWN_ROWS > 2 * tile_rows<HS> ? OWN_ROWS : 2 * tile_rows<HS>);

// How many squares of 16 queries a warp owns in forward (R). Each piece of keys and values that it loads from shared
// memory serves all of them. With 128 channels there are not enough registers for two.
template <int HS>
constexpr int query_squares = HS <= 64 ? 2 : 1;

// Where chunk `chunk` of a row, which is eight elements or 16 bytes, begins in shared memory. ldmatrix reads the same
// chunk of eight rows at a time; the exclusive or gives each of the eight its own four banks (doc/attention.md). It
// also makes addresses cheap. With c = chunk_offset(row, chunk), chunk_offset(row + 8, chunk) is c + 8 * HS, and
// chunk_offset(row, chunk ^ x) is c ^ 8 * x: a lane keeps one offset in a register and derives all others from it.
template <int HS>
__device__ inline int chunk_offset(int row, int chunk) {
  constexpr int chunks = HS < 64 ? HS / 8 : 8;
  return row * HS + (chunk ^ row / (8 / chunks) % chunks) * 8;
}

// Begins to copy rows first ... first + ROWS - 1 of a (T, HS) matrix, whose rows are `stride` elements apart, to the
// rows from `to` on of shared memory. Rows from T on become zeros. All threads of the block take part, THREADS of them,
// 16 bytes each at a time.
template <int ROWS, int HS, int THREADS = threads, class Real>
__device__ inline void copy_rows(Real* smem, int to, const Real* from, int stride, int first, int T) {
  constexpr int at_once = THREADS / (HS / 8);  // rows that the block copies at once
  static_assert(at_once % 8 == 0 && ROWS % at_once == 0);
  const int row = threadIdx.x / (HS / 8), chunk = threadIdx.x % (HS / 8), offset = chunk_offset<HS>(to + row, chunk);
  from += size_t(first + row) * stride + chunk * 8;
  for (int i = 0; i < ROWS; i += at_once) copy_async_16(smem + offset + i * HS, from + i * stride, first + row + i < T);
}

// Rounds a square's pairs of elements to Real: a[0] and a[1] are rows g and g + 8 of the first eight columns, a[2] and
// a[3] of the others. These are also the places where a left operand of a product has them.
template <class Real>
__device__ inline void pack_square(uint32_t (&a)[4], const Square& x) {
  for (int i = 0; i < 4; i++) a[i] = pack2<Real>(x[2 * i], x[2 * i + 1]);
}
// Puts a packed square into rows of shared memory. offset: chunk_offset of the square's row g and first chunk
template <int HS, class Real>
__device__ inline void put_square(Real* smem, int offset, const uint32_t (&a)[4]) {
  for (int i = 0; i < 4; i++)
    *reinterpret_cast<uint32_t*>(smem + (offset ^ (i / 2 * 8)) + i % 2 * 8 * HS + lane() % 4 * 2) = a[i];
}

// Writes a warp's 16 rows, x (16, HS) * factor, to `to` (16, HS), whose rows are `stride` elements apart; rows from
// `rows` on do not exist. The values pass through the warp's own 16 rows of shared memory, from smem_row on, so that a
// lane can write 16 bytes at once.
// factor: for this lane's rows g and g + 8
template <int HS, class Real>
__device__ inline void store_rows(Real* to, int stride, int rows, Real* smem, int smem_row, const Square (&x)[HS / 16],
                                  const float (&factor)[2]) {
  // 1. Each lane rounds its pairs of elements and puts them into shared memory, in the layout of chunk_offset.
  const int offset = chunk_offset<HS>(smem_row + lane() / 4, 0);
  for (int n = 0; n < HS / 16; n++) {
    Square y;
    for (int i = 0; i < 8; i++) y[i] = x[n][i] * factor[i / 2 % 2];
    uint32_t pairs[4];
    pack_square<Real>(pairs, y);
    put_square<HS>(smem, offset ^ (n * 16), pairs);
  }
  // 2. The warp stores chunk after chunk: neighbouring lanes write neighbouring 16 bytes.
  __syncwarp();
  for (int i = lane(); i < 2 * HS; i += 32) {
    const int row = i / (HS / 8), chunk = i % (HS / 8);
    if (row < rows)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(smem + chunk_offset<HS>(smem_row + row, chunk));
  }
}

// Rows 0 ... end - 1 of two matrices x and y, on their way through shared memory as pairs of tiles. x and y are keys
// and values, or queries and dout. All threads of the block work on it together:
//
//   copy(0);  for each i that begins a tile: { advance(i);  ... use rows i ... i + tile - 1 of x and y ... }
template <class Real, int HS>
struct TilePairs {
  Real* smem;
  const Real *x, *y;            // (end, HS)
  int x_stride, y_stride, end;  // elements from row to row
  static constexpr int tile = tile_rows<HS>;

  // Where row i of x and of y is in shared memory.
  __device__ static int x_row(int i) { return i / tile % 2 * 2 * tile + i % tile; }
  __device__ static int y_row(int i) { return x_row(i) + tile; }
  // Begins to copy the pair of tiles whose first row is i.
  __device__ void copy(int i) const {
    copy_rows<tile, HS>(smem, x_row(i), x, x_stride, i, end);
    copy_rows<tile, HS>(smem, y_row(i), y, y_stride, i, end);
    copy_async_commit();
  }
  // Waits for the pair that begins at row i, and begins to copy the next pair over the one before.
  __device__ void advance(int i) const {
    copy_async_wait<0>();
    __syncthreads();  // every thread's copies have arrived, and no warp still reads the previous tiles
    if (i + tile < end) copy(i + tile);
  }
};

// a (16 R, HS) = the 16 R rows from `row` on of shared memory, as left operands of products: a[r][k] is this lane's
// part of rows 16 r ... 16 r + 15 and channels 16 k ... 16 k + 15. For ldmatrix, each lane points to one row's chunk:
// lanes 0-15 to the 16 rows' first chunk, lanes 16-31 to the same rows' next chunk.
template <int HS, int R, class Real>
__device__ inline void load_a(uint32_t (&a)[R][HS / 16][4], const Real* smem, int row) {
  const int offset = chunk_offset<HS>(row + lane() % 16, lane() / 16);
  for (int r = 0; r < R; r++)
    for (int k = 0; k < HS / 16; k++) ldmatrix_x4(a[r][k], smem + r * 16 * HS + (offset ^ (16 * k)));
}

// d (16, 16) += a (16, 16) @ b (16, 16)
template <class Real>
__device__ inline void multiply(Square& d, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_16x8x16<Real>(d.half[0], a, {b[0], b[1]});
  mma_16x8x16<Real>(d.half[1], a, {b[2], b[3]});
}

// s (16 R, 16 N) = a (16 R, HS) @ rows (16 N, HS)^T, where the rows begin at `row` of shared memory. Scores are
// q @ k^T, and dP is dout @ v^T. For ldmatrix, each eight lanes point to: rows 0-7; the same rows' next chunk; rows
// 8-15; their next chunk. So b[0] and b[1] are rows 0-7, b[2] and b[3] rows 8-15.
template <class Real, int HS, bool ON_DIAGONAL = false, int R, int N>
__device__ inline void multiply_transposed(Square (&s)[R][N], const uint32_t (&a)[R][HS / 16][4], const Real* smem,
                                           int row) {
  const int offset = chunk_offset<HS>(row + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
  for (int n = 0; n < N; n++) {
    for (int r = 0; r < R; r++) s[r][n] = {};
    for (int k = 0; k < HS / 16; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, smem + n * 16 * HS + (offset ^ (16 * k)));
      for (int r = ON_DIAGONAL ? n : 0; r < R; r++) multiply<Real>(s[r][n], a[r][k], b);
    }
  }
}
// sum (16 R, 16 C) += a (16 R, 16) @ 16 rows of shared memory, of which it takes 16 C channels. The lanes point
// ldmatrix to the rows as in load_a: offset is chunk_offset of this lane's row and chunk. It transposes: b[0] and b[1]
// are the first chunk's channels, b[2] and b[3] the next chunk's. Squares of `a` before number `begin` are left out.
template <class Real, int R, int C>
__device__ inline void multiply_add_rows(Square (&sum)[R][C], const uint32_t (&a)[R][4], const Real* smem, int offset,
                                         int begin = 0) {
  for (int c = 0; c < C; c++) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, smem + (offset ^ (16 * c)));
    for (int r = begin; r < R; r++) multiply<Real>(sum[r][c], a[r], b);
  }
}
// sum (16 R, HS) += p (16 R, 16 N) @ rows (16 N, HS), where the rows begin at `row` of shared memory. p is the result
// of another product, rounded here to Real. It is already spread over the lanes as a left operand has to be.
template <class Real, int HS, bool ON_DIAGONAL = false, int R, int N>
__device__ inline void multiply_add(Square (&sum)[R][HS / 16], const Square (&p)[R][N], const Real* smem, int row) {
  const int offset = chunk_offset<HS>(row + lane() % 16, lane() / 16);
#pragma unroll
  for (int n = 0; n < N; n++) {
    uint32_t a[R][4];
    for (int r = 0; r < R; r++) pack_square<Real>(a[r], p[r][n]);
    multiply_add_rows(sum, a, smem + n * 16 * HS, offset, ON_DIAGONAL ? n : 0);
  }
}

// Scores of keys that come after the query become -infinity, so that their weights become 0. s (16 R, 16 N) begins at
// query first_row and key first_column or, if TRANSPOSED, at key first_row and query first_column. Returns at once
// where all keys are visible.
template <bool TRANSPOSED, int R, int N>
__device__ inline void hide_later_keys(Square (&s)[R][N], int first_row, int first_column) {
  const int last_row = first_row + 16 * R - 1, last_column = first_column + 16 * N - 1;
  if (TRANSPOSED ? last_row <= first_column : last_column <= first_row) return;
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 8; i++) {
        const int row = first_row + r * 16 + row_of(i), column = first_column + n * 16 + column_of(i);
        if (TRANSPOSED ? row > column : column > row) s[r][n][i] = -INFINITY;
      }
}

// The same for one square, if its first key is its first query.
__device__ inline void hide_above_diagonal(Square& s) {
  for (int i = 0; i < 8; i++)
    if (column_of(i) > row_of(i)) s[i] = -INFINITY;
}

// x (8) . y (8): a lane's share of D
template <class Real>
__device__ inline float dot8(const Real* x, const Real* y) {
  const Float8 a = load8(x), b = load8(y);
  float dot = 0;
  for (int j = 0; j < 8; j++) dot += a[j] * b[j];
  return dot;
}

// One step of the running softmax, for a warp's 16 queries and the keys of the first `squares` of N squares. Arrays of
// two have an element for each of the lane's rows, g and g + 8.
// In:  s (16, 16 N) = q . k and the max of the steps before, both not yet scaled; sum of the steps before; scale =
//      softmax_scale * log2_e
// Out: s becomes exp((s - max) / sqrt(HS)) with the new max. Everything summed before must be multiplied by shrink,
//      because the maximum may have grown; for sum that is done here. sum is this lane's share: the caller adds up the
//      four lanes of a row at the very end.
// A query's first step contains key 0, so max is finite from then on.
template <class Real, int N>
__device__ inline void softmax_step(Square (&s)[N], float (&max)[2], float (&sum)[2], float (&shrink)[2], float scale,
                                    int squares = N) {
  for (int r = 0; r < 2; r++) {  // the lane's rows: its elements 2r, 2r + 1 of every four
    const float before = max[r];
    float part = 0;
    for (int i = 0; i < 4 * squares; i++) max[r] = fmaxf(max[r], s[i / 4].half[i / 2 % 2][2 * r + i % 2]);
    max[r] = lane_max<4>(max[r]);
    shrink[r] = power_of_two<Real>((before - max[r]) * scale);
    for (int i = 0; i < 4 * squares; i++) {
      float& x = s[i / 4].half[i / 2 % 2][2 * r + i % 2];
      x = power_of_two<Real>(fmaf(x, scale, -max[r] * scale));
      part += x;
    }
    sum[r] = sum[r] * shrink[r] + part;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a warp does in forward, in either version of the kernel: it has 16 R queries and takes 32 keys at a time.

template <class Real, int HS, bool DROPOUT>
struct ForwardQueries {
  static constexpr int R = query_squares<HS>, N = step_keys / 16;
  // What stays in registers: q; o, the output so far, not yet divided; and for the lane's rows g and g + 8 of each 16
  // queries the softmax's maximum so far (of the whole row) and sum so far (of the lane's columns).
  uint32_t q[R][HS / 16][4];
  Square o[R][HS / 16];
  float max[R][2], sum[R][2];

  __device__ void begin() {
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < HS / 16; c++) o[r][c] = {};
      for (int i = 0; i < 2; i++) max[r][i] = -INFINITY, sum[r][i] = 0;
    }
  }

  // Queries from `first` on, keys from k0 on, whose rows and whose values' rows begin at k_row and v_row of shared
  // memory. ON_DIAGONAL: first = k0, and the step leaves out the squares above the diagonal. Otherwise it looks whether
  // it has keys to hide.
  template <bool ON_DIAGONAL>
  __device__ void step(const Real* smem, int k_row, int v_row, int first, int k0, const DeviceDropout& drop,
                       uint64_t draw_head, int T) {
    static_assert(!ON_DIAGONAL || R == N);
    const float scale = softmax_scale<HS>() * log2_e;
    // 1. scores = q @ k^T, for our queries and these keys
    Square s[R][N];
    multiply_transposed<Real, HS, ON_DIAGONAL>(s, q, smem, k_row);
    if constexpr (!ON_DIAGONAL) hide_later_keys<false>(s, first, k0);
#pragma unroll
    for (int r = 0; r < R; r++) {
      // 2. Running softmax: scores become weights, the output so far shrinks with the sum.
      const int squares = ON_DIAGONAL ? r + 1 : N;  // that the queries see
      if constexpr (ON_DIAGONAL) hide_above_diagonal(s[r][r]);
      float shrink[2];
      softmax_step<Real>(s[r], max[r], sum[r], shrink, scale, squares);
      for (int i = 0; i < HS / 2; i++) o[r][i / 8][i % 8] *= shrink[i / 2 % 2];
      // 3. Dropout, after the sum: the denominator contains all weights.
      if constexpr (DROPOUT) {
#pragma unroll
        for (int n = 0; n < squares; n++) {
          bool keep[8];
          attention_mask<false>(keep, drop, draw_head, first + r * 16, k0 + n * 16, T);
          for (int i = 0; i < 8; i++) s[r][n][i] = keep[i] ? s[r][n][i] : 0.0f;
        }
      }
    }
    // 4. o += weights @ v
    multiply_add<Real, HS, ON_DIAGONAL>(o, s, smem, v_row);
  }

  // Writes lse and the output of the 16 queries r, which begin at query first_of_r. The output is divided by the
  // denominators and gets dropout's factor; it passes through 16 rows of shared memory, which are the warp's own.
  // out (B, T, NH, HS), out_row elements from token to token; lse (B, NH, T) or null
  __device__ void write(int r, Real* out, int out_row, float* lse, const Head& head, Real* smem, int own,
                        int first_of_r, float keep_scale, int T) {
    float factor[2];
    for (int i = 0; i < 2; i++) {
      const float total = lane_sum<4>(sum[r][i]);  // the row's four lanes
      const int query = first_of_r + row_of(2 * i);
      if (lse && lane() % 4 == 0 && query < T) lse[head.bh * T + query] = max[r][i] * softmax_scale<HS>() + logf(total);
      factor[i] = keep_scale / total;
    }
    store_rows<HS>(out + head.out + size_t(first_of_r) * out_row, out_row, T - first_of_r, smem, own, o[r], factor);
  }
};

}  // namespace attention

// ---------------------------------------------------------------------------------------------------------------------
// Forward, version 1. Launched with (NH, B, ceil(T / rows)) blocks of 128 threads: a block has one head of one batch
// row and rows = 4 * 16 R queries, a warp has 16 R of them. It keeps the queries, their softmax and their output in
// registers while the block goes through the keys up to its last query.
//   out  (B, T, NH, HS) =       the weighted sums of the values
//   lse  (B, NH, T) = or null   the logarithm of each query's softmax denominator, for backward
//   qkv  (B, T, 3, NH, HS)
template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_forward_kernel(Real* out, float* lse, const Real* qkv, DeviceDropout drop, int T, int NH) {
  using namespace attention;
  constexpr int R = query_squares<HS>, rows = warps * 16 * R;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16 * R;
  // Keys that the block's queries see, and that the warp's queries see: those up to the last query.
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16 * R, T) : 0;

  // 1. Our queries: global -> shared -> registers. The first tiles of keys and values come with them. We wait for both.
  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  tiles.copy(0);
  copy_async_wait<0>();
  __syncthreads();
  const int own = own_row<HS> + warp * 16 * R;
  ForwardQueries<Real, HS, DROPOUT> queries;
  load_a<HS>(queries.q, smem, own);
  queries.begin();

  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    // 2. A step of 32 keys. A warp whose queries do not see them only helps to copy, in advance().
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    queries.template step<false>(smem, tiles.x_row(k0), tiles.y_row(k0), first, k0, drop, head.draw_head, T);
  }

  // 3. Write lse and the output: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more: their memory takes the outputs
#pragma unroll
  for (int r = 0; r < R; r++)
    queries.write(r, out, int(out_row), lse, head, smem, own + r * 16, first + r * 16, drop.keep_scale, T);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, first kernel: D = rowsum(dout * out) and dq = dS @ k.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads: a block has one head of one batch row and 64 queries, a
// warp has 16 of them and goes through the keys that they see.
//   dqkv (B, T, 3, NH, HS)      dq is written; dk and dv are the other kernel's
//   D    (B, NH, T) =           which the other kernel reads
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T) from forward
template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 4 - attention::fewer_blocks : 2)
    attention_backward_queries_kernel(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out,
                                      const float* lse, DeviceDropout drop, int T, int NH) {
  using namespace attention;
  constexpr int N = step_keys / 16, rows = warps * 16, chunks = HS / 8;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16;
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16, T) : 0;

  // 1. Our queries and their rows of dout, and the first tiles of keys and values: global -> shared.
  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out, *O = out + head.out;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  copy_rows<rows, HS>(smem, own_row<HS> + rows, dO, out_row, first_of_block, T);
  tiles.copy(0);
  // 2. Meanwhile D of the warp's queries, from global memory: HS / 8 lanes share a row, eight channels each.
  for (int i = lane(); i < 16 * chunks; i += 32) {
    const int query = first + i / chunks;
    const size_t at = min(query, T - 1) * out_row + i % chunks * 8;
    const float dot = lane_sum<chunks>(dot8(dO + at, O + at));
    if (query < T && i % chunks == 0) D[head.bh * T + query] = dot;
  }
  // 3. Our queries and dout: shared -> registers; lse and D of the lane's rows g and g + 8.
  copy_async_wait<0>();
  __syncthreads();  // all copies have arrived, and D is visible to the warp's other lanes
  const int own = own_row<HS> + warp * 16;
  uint32_t q[1][HS / 16][4], dO_of_q[1][HS / 16][4];
  load_a<HS>(q, smem, own);
  load_a<HS>(dO_of_q, smem, own + rows);
  float lse_of_q[2], D_of_q[2];
  for (int r = 0; r < 2; r++) {
    const int query = first + row_of(2 * r);  // rows from T on get weights of exp(-infinity) = 0
    lse_of_q[r] = query < T ? lse[head.bh * T + query] * log2_e : INFINITY;
    D_of_q[r] = query < T ? D[head.bh * T + query] : 0.0f;
  }

  const float scale = softmax_scale<HS>() * log2_e;
  Square dq[1][HS / 16] = {};
  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    // 4. A step of 32 keys. A warp whose queries do not see them only helps to copy, in advance().
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    // 5. scores = q @ k^T, dP = dout @ v^T
    Square s[1][N], ds[1][N];  // ds: dP now, dS after backward_weight
    multiply_transposed<Real, HS>(s, q, smem, tiles.x_row(k0));
    hide_later_keys<false>(s, first, k0);
    multiply_transposed<Real, HS>(ds, dO_of_q, smem, tiles.y_row(k0));
    // 6. dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) attention_mask<false>(keep, drop, head.draw_head, first, k0 + n * 16, T);
      for (int i = 0; i < 8; i++)
        backward_weight<Real>(s[0][n][i], ds[0][n][i], scale, lse_of_q[i / 2 % 2], D_of_q[i / 2 % 2],
                              !DROPOUT || keep[i], drop.keep_scale);
    }
    // 7. dq += dS @ k
    multiply_add<Real, HS>(dq, ds, smem, tiles.x_row(k0));
  }

  // 8. Write dq, with the factor that dS lacks: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more
  store_rows<HS>(dqkv + head.qkv + first * row, row, T - first, smem, own, dq[0],
                 {softmax_scale<HS>(), softmax_scale<HS>()});
}

// Backward, second kernel: dv = (m * P)^T @ dout and dk = dS^T @ q.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads, after the first kernel: a block has one head of one batch
// row and 64 keys, a warp has 16 of them and goes through the queries that see them. Its scores are transposed, keys by
// queries, because that is the left operand that its products need.
//   dqkv (B, T, 3, NH, HS)      dk and dv are written
//   D    (B, NH, T)             from the first kernel
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T)
template <class Real, int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_backward_keys_kernel(Real* dqkv, const float* D, const Real* dout, const Real* qkv, const float* lse,
                                   DeviceDropout drop, int T, int NH) {
  using namespace attention;
  constexpr int N = step_queries<HS> / 16, rows = warps * 16;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  const int first_of_block = int(blockIdx.z) * rows, first = first_of_block + warp * 16;

  // 1. Our keys and values: global -> shared -> registers. The first tiles of queries and dout come with them, and stay
  //    in shared memory. Behind the tiles it has lse and D of the queries of both stages, (2, tile).
  Real* smem = dynamic_smem<Real>();
  float2* lse_and_D = reinterpret_cast<float2*>(smem + smem_rows<HS, 2 * rows> * HS);
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
  // Threads 2 i and 2 i + 1 fetch lse and D of query i of a tile, one tile ahead. Tiles of 32 need 64 threads; nobody
  // stores what the others fetch.
  static_assert(2 * tiles.tile <= threads);
  const auto load_lse_or_D = [&](int query) {
    // Queries from T on get weights of exp(-infinity) = 0.
    if (threadIdx.x % 2 == 0) return query < T ? lse[head.bh * T + query] * log2_e : INFINITY;
    return query < T ? D[head.bh * T + query] : 0.0f;
  };

  const float scale = softmax_scale<HS>() * log2_e;
  Square dk[1][HS / 16] = {}, dv[1][HS / 16] = {};
  float next = load_lse_or_D(first_of_block + threadIdx.x / 2);
  for (int i = 0; i < tiles.end; i += step_queries<HS>) {  // queries, counted from first_of_block
    // 2. A step of 16 or 32 queries. A new tile: lse and D go to shared memory, before the barrier in advance().
    const int q0 = first_of_block + i;
    if (i % tiles.tile == 0) {
      if (threadIdx.x < 2 * tiles.tile) reinterpret_cast<float*>(lse_and_D + i % (2 * tiles.tile))[threadIdx.x] = next;
      tiles.advance(i);
      next = load_lse_or_D(q0 + tiles.tile + threadIdx.x / 2);
    }
    if (q0 + step_queries<HS> <= first) continue;  // they do not see the warp's keys
    // 3. scores^T = k @ q^T, dP^T = v @ dout^T
    Square p[1][N], ds[1][N];  // scores and dP now, weights and dS after backward_weight
    multiply_transposed<Real, HS>(p, k, smem, tiles.x_row(i));
    hide_later_keys<true>(p, first, q0);
    multiply_transposed<Real, HS>(ds, v, smem, tiles.y_row(i));
    // 4. Scores become weights after dropout, dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      if constexpr (DROPOUT) attention_mask<true>(keep, drop, head.draw_head, q0 + n * 16, first, T);
      for (int j = 0; j < 8; j++) {
        const float2 of_q = lse_and_D[i % (2 * tiles.tile) + n * 16 + column_of(j)];
        backward_weight<Real>(p[0][n][j], ds[0][n][j], scale, of_q.x, of_q.y, !DROPOUT || keep[j], drop.keep_scale);
      }
    }
    // 5. dv += weights^T @ dout, dk += dS^T @ q
    multiply_add<Real, HS>(dv, p, smem, tiles.y_row(i));
    multiply_add<Real, HS>(dk, ds, smem, tiles.x_row(i));
  }

  // 6. Write dk and dv, with the factors that backward_weight leaves out: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more
  Real *dK = dqkv + head.qkv + out_row + first * row, *dV = dK + out_row;
  store_rows<HS>(dK, row, T - first, smem, own, dk[0], {softmax_scale<HS>(), softmax_scale<HS>()});
  store_rows<HS>(dV, row, T - first, smem, own + rows, dv[0], {drop.keep_scale, drop.keep_scale});
}

#include "attention_forward_head.cuh"  // version 2 of forward, made of the building blocks above
#include "attention_tf32.cuh"          // version 2 for floats, made of the building blocks above

// ---------------------------------------------------------------------------------------------------------------------
// These functions launch the kernels: the ones above, or for floats the ones in attention_float.cuh or
// attention_tf32.cuh.

#include "attention_backward_once.cuh"  // version 2 of the backward pass, made of the building blocks above

namespace attention {

inline void check(const char* who, const DeviceDropout& drop, int B, int T, int C, int NH) {
  require(B > 0 && T > 0 && NH > 0 && C % NH == 0, who, ": B = ", B, ", T = ", T, ", C = ", C, ", NH = ", NH);
  require(B <= 65535 && T <= 65535 * warps, who, ": B = ", B, " or T = ", T, " is too large for a grid");
  require(!drop.active() || drop.step_on_device, who, ": dropout needs the step's number");
}

// Calls body(head size, whether there is dropout) with both as types, so that they are constants in the kernel that it
// launches.
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

// Bytes of shared memory of a kernel whose blocks own OWN_ROWS rows, and `more` for something else.
template <class Real, int HS, int OWN_ROWS>
constexpr size_t smem_bytes(int more = 0) {
  constexpr size_t bytes = smem_rows<HS, OWN_ROWS> * HS * sizeof(Real);
  static_assert(bytes + 4 * tile_rows<HS> * sizeof(float) <= 64 << 10, "Turing has no more");
  return bytes + more;
}

// Whether backward takes version 2: it is chosen, and the type, the sizes and the card's shared memory allow it.
template <class Real>
bool takes_once(int HS, int T) {
  static const size_t smem = current_card().sharedMemPerBlockOptin;
  return choices().attention_backward == 2 && sizeof(Real) == 2 && once::fits(HS, T, smem);
}

}  // namespace attention

// out and lse = attention of qkv, with the shapes that stand above the kernels. lse may be null.
// A query's result does not depend on B. A score that overflows float makes its query's results NaN.
// tf32: products of floats may take 10 bits of their mantissas (attention_tf32.cuh)
template <class Real>
void attention_forward(Real* out, float* lse, const Real* qkv, const DeviceDropout& drop, int B, int T, int C, int NH,
                       cudaStream_t stream, [[maybe_unused]] bool tf32 = false) {
  using namespace attention;
  check("attention_forward", drop, B, T, C, NH);
  specialize("attention_forward", C / NH, drop.active(), [&](auto size, auto dropout) {
    constexpr int HS = size;
    if constexpr (std::is_same_v<Real, float>) {
      if (has_tf32_kernels()) return forward_by_tf32<HS, dropout>(out, lse, qkv, drop, B, T, NH, stream, tf32);
      launch(attention_forward_float_kernel<HS, dropout>, {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream}, out,
             lse, qkv, drop, T, NH);
    } else {
      if constexpr (head_has_size(HS))
        if (choices().attention_forward == 2 && whole_head_fits(HS, T))
          return launch(attention_forward_head_kernel<Real, HS, dropout>, {dim3(NH, B), threads, head_smem(HS), stream},
                        out, lse, qkv, drop, T, NH);
      constexpr int rows = warps * 16 * query_squares<HS>;
      launch(attention_forward_kernel<Real, HS, dropout>,
             {dim3(NH, B, ceil_div(T, rows)), threads, smem_bytes<Real, HS, rows>(), stream}, out, lse, qkv, drop, T,
             NH);
    }
  });
}

// dqkv = the gradient of qkv, with the shapes that stand above the kernels. D is scratch memory, which version 2 leaves
// alone.
template <class Real>
void attention_backward(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                        const DeviceDropout& drop, int B, int T, int C, int NH, cudaStream_t stream,
                        [[maybe_unused]] bool tf32 = false) {
  using namespace attention;
  check("attention_backward", drop, B, T, C, NH);
  specialize("attention_backward", C / NH, drop.active(), [&](auto size, auto dropout) {
    constexpr int HS = size;
    if constexpr (std::is_same_v<Real, float>) {
      if (has_tf32_kernels())
        return backward_by_tf32<HS, dropout>(dqkv, D, dout, qkv, out, lse, drop, B, T, NH, stream, tf32);
      const LaunchConfig config = {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream};
      launch(attention_backward_queries_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, out, lse, drop, T, NH);
      launch(attention_backward_keys_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, lse, drop, T, NH);
    } else if (takes_once<Real>(HS, T)) {
      if constexpr (HS == once::HS)
        attention_backward_once<Real, dropout>(dqkv, dout, qkv, out, lse, drop, B, T, NH, stream);
    } else {
      const dim3 grid(NH, B, ceil_div(T, warps * 16));
      launch(attention_backward_queries_kernel<Real, HS, dropout>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(), stream}, dqkv, D, dout, qkv, out, lse, drop, T, NH);
      launch(attention_backward_keys_kernel<Real, HS, dropout>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(2 * tile_rows<HS> * sizeof(float2)), stream}, dqkv, D,
             dout, qkv, lse, drop, T, NH);
    }
  });
}
