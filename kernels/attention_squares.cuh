// What attention's kernels for 16-bit types are made of: squares of 16 x 16 numbers, which a warp holds in its registers
// as the tensor cores want them; rows of shared memory, and how they get there; products of both; the running softmax.
// attention.cuh and attention_forward_head.cuh, attention_backward_once.cuh make kernels of it, attention_tf32.cuh takes
// some of it for floats. Read attention_float.cuh first, which does the same without squares.
// defines, in namespace attention: Square, row_of, column_of, step_keys, step_queries, tile_rows, own_row, smem_rows,
//          query_squares, chunk_offset, copy_rows, pack_square, put_square, store_rows, TilePairs, load_a, multiply,
//          multiply_transposed, multiply_add_rows, multiply_add, hide_later_keys, hide_above_diagonal, dot8,
//          softmax_step, Masks, StoredMasks, store_mask, SquareMask, ForwardQueries
#pragma once
#include "attention_float.cuh"
#include "device.cuh"
#include "dropout.cuh"

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
// So four neighbouring lanes share a row. Dropout decides about element i by draw i of the lane's eight; where keys are
// rows, the mask is transposed first (SquareMask). Below, a warp owns R squares of 16 rows, and takes N squares of 16
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
// Dropout's masks. Backward needs the masks that forward has drawn. It draws them again, or forward stores them for it,
// a bit for each weight: version 2 of attention_masks in choices.cuh.
//
// The generator's call number c decides about eight weights (attention_counter in dropout_law.h), and the stored masks
// have a byte for it: a bit is 1 if its weight is kept. So a square has 32 bytes, one for each lane, and bit i is the
// lane's element i. In this picture, 5.2 is bit 2 of byte 5:
//
//   keys          0    1     2    3     4    5     6    7        8    9    10   11    12   13    14   15
//
//   query  0     0.0  0.1   1.0  1.1   2.0  2.1   3.0  3.1      0.4  0.5   1.4  1.5   2.4  2.5   3.4  3.5
//   query  1     4.0  4.1   5.0  5.1   6.0  6.1   7.0  7.1      4.4  4.5   5.4  5.5   6.4  6.5   7.4  7.5
//     ...
//   query  7    28.0 28.1  29.0 29.1  30.0 30.1  31.0 31.1     28.4 28.5  29.4 29.5  30.4 30.5  31.4 31.5
//
//   query  8     0.2  0.3   1.2  1.3   2.2  2.3   3.2  3.3      0.6  0.7   1.6  1.7   2.6  2.7   3.6  3.7
//     ...
//   query 15    28.2 28.3  29.2 29.3  30.2 30.3  31.2 31.3     28.6 28.7  29.6 29.7  30.6 30.7  31.6 31.7
//
// Where queries are rows, a lane reads the byte that it wrote. Where keys are rows (TRANSPOSED), lane 4g + t has keys g
// and g + 8 and queries 2t, 2t + 1, 2t + 8 and 2t + 9. These are columns and rows of the picture, and where they cross
// are only two bytes: byte 8t + g / 2 has the two even queries, the fourth byte after it the two odd ones. A byte has
// four of the lane's weights and four of its neighbour's: bits 0, 2, 4 and 6 are the lane's if g is even, else 1, 3, 5
// and 7. So a lane reads two bytes, and no lane needs to ask another.
//
// There is memory for squares above the diagonal and for queries from T on, too, but no kernel writes or reads it.

enum class Masks {
  none,    // there is no dropout
  drawn,   // forward and backward draw them
  stored,  // forward draws and stores them, backward reads them
};

// The stored masks, as kernels get them. The generator's calls are numbered over all micro-batches of a step. The
// memory holds the masks of one micro-batch, whose first call is number first_call: byte i is that of call
// first_call + i.
template <class Byte>  // unsigned char, const in backward
struct StoredMasks {
  Byte* bytes;  // (B, NH, n, n, 32), n = ceil(T / 16); null if masks are not stored
  uint64_t first_call;

  // The 32 bytes of the square with first query q and first key kv. draw_head: the head's number, counted as calls are
  __device__ Byte* of_square(uint64_t draw_head, int q, int kv, int T) const {
    return bytes - first_call + attention_counter(draw_head, q, kv, T);
  }
};

// Stores keep, the mask of this lane's elements of the square with first query q and first key kv.
__device__ inline void store_mask(const StoredMasks<unsigned char>& masks, const bool (&keep)[8], uint64_t draw_head,
                                  int q, int kv, int T) {
  uint32_t byte = 0;
  for (int i = 0; i < 8; i++) byte |= uint32_t(keep[i]) << i;
  unsigned char* to = masks.of_square(draw_head, q, kv, T) + lane();
  if (kv <= q && q < T) *to = static_cast<unsigned char>(byte);
}

// The mask of a square in backward, wherever it comes from.
template <Masks MASKS, bool TRANSPOSED>
struct SquareMask {
  uint32_t bytes[TRANSPOSED ? 2 : 1];

  // Begins to load it, if it is stored, from the place where store_mask has put it. Memory is slow: load early, get
  // late.
  __device__ void load(const StoredMasks<const unsigned char>& masks, uint64_t draw_head, int q, int kv, int T) {
    if constexpr (MASKS == Masks::stored) {
      const unsigned char* from = masks.of_square(draw_head, q, kv, T);
      from += TRANSPOSED ? lane() % 4 * 8 + lane() / 8 : lane();
      for (int i = 0; i < int(TRANSPOSED) + 1; i++) bytes[i] = kv <= q && q < T ? from[4 * i] : 0;
    }
  }
  // keep = the mask of this lane's elements
  __device__ void get(bool (&keep)[8], const Dropout& drop, uint64_t draw_head, int q, int kv, int T) const {
    if constexpr (MASKS == Masks::drawn) attention_mask<TRANSPOSED>(keep, drop, draw_head, q, kv, T);
    for (int i = 0; i < 8 && MASKS != Masks::drawn; i++) {
      const int bit = TRANSPOSED ? lane() / 4 % 2 + i / 4 * 2 + i / 2 % 2 * 4 : i;
      keep[i] = MASKS == Masks::none || (bytes[TRANSPOSED ? i % 2 : 0] >> bit & 1);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What a warp does in forward, in either version of the kernel: it has 16 R queries and takes 32 keys at a time.

template <class Real, int HS, Masks MASKS>
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
                       uint64_t draw_head, const StoredMasks<unsigned char>& masks, int T) {
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
      if constexpr (MASKS != Masks::none) {
#pragma unroll
        for (int n = 0; n < squares; n++) {
          const int query = first + r * 16, key = k0 + n * 16;
          bool keep[8];
          attention_mask<false>(keep, drop, draw_head, query, key, T);
          if constexpr (MASKS == Masks::stored) store_mask(masks, keep, draw_head, query, key, T);
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
