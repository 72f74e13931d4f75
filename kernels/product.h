// The blocked product on the CPU: c (M, N) = start + a (M, K) @ b (K, N). Layers (matmul.h) and attention (attention.h)
// compute all their products with it. doc/cpu-matmul.md has the long story, with pencil work and measurements.
//
//                      N
//            +--------------------+
//            |   b       |panel|  |    panel  K rows of NR columns of b, copied so that the innermost loop reads them
//          K |           |  NR |  |           one after the other. It stays in the L2 cache while a task uses it.
//            +--------------------+
//       K                :     :
//    +------+ +----------:-----:--+
//    | a    | |          :     :  |
//    |======| |==========+-----+==| <+  task   24 or 48 rows of c for one thread, which copies its rows of a as well.
//    | tile | |          |tile |  |  |          With matrix registers 64 rows. A task may be only some of the columns.
//    |======| |==========+-----+==| <+  tile   MR x NR numbers of c. Their sums stay in registers while k runs.
//    +------+ +-------------------+ c
//
// `multiply` does it in these steps:
//
//   for each block of k (2048 units, so that the sums rarely have to wait in c; or 768, see KC):
//     1. all threads copy b's block into panels                                                            (pack_block)
//     for each task, in parallel:
//       2. the thread copies the task's rows of a, MR at a time                                                (pack_a)
//       3. for each panel, for each MR rows: a tile, that is MR x NR sums in registers. Each k loads NV vectors
//          of b, broadcasts MR numbers of a, and does MR * NV fused multiply-adds                       (tile)
//       4. after the last block of k, the caller's `after` works on the task's numbers while they are in the cache
//
// `multiply_by_columns` does the same with a and b in each other's place, where a is the smaller one.
//
// Every element of c is one chain of multiply-adds over k = 0, 1, ..., K - 1 (with matrix registers, see below),
// whichever tile, task or thread computes it. So the result has the same bits for any number of threads, and a row of
// it for any number of other rows.
//
// Factor is the type that the operands are rounded to as they are copied: Real itself or bfloat16 (factors.h).
// defines, in namespace product: View, Start, Nothing, multiply, multiply_by_columns, pack_blocks, for layers;
// multiply_symmetric, for Muon; pack_a, pack_b, multiply_packed, Triangle, for attention
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "amx.h"
#include "factors.h"
#include "simd.h"

namespace product {

// The tile: MR rows by NR columns, a row of which is NV vectors. 32 vector registers hold 12 x 2 vectors of sums, 2
// vectors of b and a broadcast number of a; 16 registers hold half as many sums.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
template <class Factor>
constexpr int NR = lanes<Sum<Factor>>* NV;

// Units of k in a block. Blocks are long, because a tile that begins by loading its sums from c has to wait for them.
// multiply() uses shorter ones where `a` is by columns, except with matrix registers. doc/cpu-matmul.md says why.
constexpr int KC = 2048, KC_COLUMNS = 768;

// Rows of a task, a multiple of MR. They are few: each row of c that a task walks along is a stream of its own, and the
// processor fetches only so many streams ahead. For an `a` by columns they are three whole cache lines of it.
constexpr int task_rows(bool a_by_columns) { return a_by_columns ? 48 : 24; }

// A matrix that somebody else owns, by its strides: element (i, j) is data[i * row + j * column]. We call it "by rows"
// if column is 1, and "by columns" if row is 1; one of both holds.
template <class Real>
struct View {
  const Real* data;
  size_t row, column;
};

// What the sums begin with: 0 (data is nullptr), a bias (N) that all rows share (row = 0), or a matrix (M, N) whose
// rows are `row` numbers apart, such as c itself.
template <class Real>
struct Start {
  const Real* data = nullptr;
  size_t row = 0;
};

// A unit is what one multiply-add takes of an operand: one number or, of bfloat16, two neighbours in k. K numbers fill
// this many; if K is odd, the second half of the last unit is 0.
template <class Factor>
constexpr int units(int K) {
  return (K + Factors<Factor>::terms - 1) / Factors<Factor>::terms;
}

// to (count) = units of x (count) and y (count), which are rows k and k + 1 of an operand. Interleaves them as pairs;
// if a unit is one number, copies x. y is nullptr if x is the last row.
template <class Factor>
inline void pair_up(Unit<Factor>* to, const Sum<Factor>* x, const Sum<Factor>* y, int count) {
  if constexpr (Factors<Factor>::terms == 1)
    std::memcpy(to, x, count * sizeof *x);
  else
    for (int i = 0; i < count; i++) to[i] = Factors<Factor>::unit(x[i], y ? y[i] : 0);
}

// Whether products of this type can use matrix registers (amx.h): the functions that fill them need vectors as wide as
// their rows. Whether the processor has the registers is known only when the program runs.
template <class Factor>
constexpr bool tiles_possible = std::is_same_v<Factor, bfloat16>&& vector_bytes == 64;

// How many units b (K, N) takes when it is packed, whichever way of packing is chosen.
template <class Factor>
size_t packed_size(int K, int N) {
  const int whole = tiles_possible<Factor> ? amx::side : 1;
  return size_t((units<Factor>(K) + whole - 1) / whole * whole) * ((N + NR<Factor> - 1) / NR<Factor>)*NR<Factor>;
}

// ---------------------------------------------------------------------------------------------------------------------
// The same with matrix registers (amx.h), of which each holds a tile of 16 x 16 units.
//
//                       b: K x 32
//                      +----+----+      A tile of a is 16 rows by 16 units of k, of b 16 units of k by 16 columns.
//                      |tile|tile|      A "line" is one row of a or one column of b. All tiles of the same 16 lines
//                      +----+----+      are a "strip", which the copy has tile after tile along k.
//                      |tile|tile|
//                      +----+----+
//     a: 32 x K          :    :         Four tiles of c, 32 x 32 sums, stay in registers while k runs: for each 32 k,
//   +----+----+--      +----+----+      two tiles of a and two of b are loaded, and four products are added.
//   |tile|tile| ..     |  0 |  1 |
//   +----+----+--      +----+----+
//   |tile|tile| ..     |  2 |  3 |
//   +----+----+--      +----+----+ c
//
// The processor adds 32 terms to an element of c at a time: it sums the terms with even k and those with odd k apart,
// and then adds both. So results differ from the vectors' in their rounding. They still do not depend on threads, tasks
// or rows.

// Units of k in a strip: K numbers in whole tiles.
constexpr int tiled_units(int K) { return (units<bfloat16>(K) + amx::side - 1) / amx::side * amx::side; }

// A thread keeps one of these on its stack while it multiplies. It reserves the thread's matrix registers, or nothing
// where the type cannot use them.
template <class Factor>
using Registers = std::conditional_t<tiles_possible<Factor>, amx::Tiles, char>;

// Whether products of this type do use matrix registers, here and now.
template <class Factor>
bool tiles_taken() {
  return tiles_possible<Factor> && amx::enabled;
}

// Copies one tile. data points to its first number. Its lines are line_stride numbers apart, and neighbours in k are
// k_stride numbers apart. The matrix has `lines` more lines, and K more numbers along k; where that is less than 16 and
// 32, the rest of the tile is 0.
// to (16, 16) units: lines by k, as a wants it (rows_are_lines), or k by lines, as b does
// sums (lines), only with line_stride == 1 and possibly nullptr: sums[i] += the numbers of line i
template <bool rows_are_lines>
void pack_tile(uint32_t* to, const float* data, size_t line_stride, size_t k_stride, int lines, int K, float* sums) {
  constexpr int side = amx::side;
  // 16 units from 32 neighbours in k.
  const auto along = [K](const float* from) {
    if (K >= 2 * side) return units_along<bfloat16>(from);
    float some[2 * side] = {};
    std::memcpy(some, from, K * sizeof *some);
    return units_along<bfloat16>(some);
  };
  // 16 numbers that have the same k.
  const auto across = [lines](const float* from) {
    if (lines >= side) return load(from);
    float some[side] = {};
    std::memcpy(some, from, lines * sizeof *some);
    return load(some);
  };
  // 1. Read the way memory has the numbers, either along k or across it, and round pairs to bfloat16.
  // 2. Transpose the tile if it is to stand the other way.
  Vec<uint32_t> square[side] = {};
  if (line_stride != 1) {
    for (int i = 0; i < std::min(side, lines); i++) square[i] = along(data + i * line_stride);
    if (!rows_are_lines) transpose<uint32_t>(square);
  } else if (lines > 0) {
    Vec<float> total = sums ? across(sums) : Vec<float>{};
    for (int u = 0; 2 * u < std::min(2 * side, K); u++) {
      const float* x = data + 2 * u * k_stride;
      const bool pair = 2 * u + 1 < K;
      const Vec<float> even = across(x), odd = pair ? across(x + k_stride) : Vec<float>{};
      square[u] = units_across<bfloat16>(even, odd);
      total += pair ? even + odd : even;
    }
    if (sums) std::memcpy(sums, &total, std::min(side, lines) * sizeof *sums);
    if (rows_are_lines) transpose<uint32_t>(square);
  }
  for (int i = 0; i < side; i++) store(to + i * side, square[i]);
}

constexpr int tile_steps(int K) { return tiled_units(K) / amx::side; }  // tiles of a strip
// Strips of so many lines: an even number, since four_tiles takes two at a time.
constexpr int tile_strips(int lines) { return (lines + 2 * amx::side - 1) / (2 * amx::side) * 2; }

// packed (tile_strips(lines), tile_steps(K)) tiles = data, with strides as in pack_tile. It reads memory in order: the
// outer loop goes along k if line_stride is 1, else from strip to strip. Threads share the outer loop's tile_passes:
// this call does begin ... end - 1.
inline int tile_passes(size_t line_stride, int lines, int K) {
  return line_stride == 1 ? tile_steps(K) : tile_strips(lines);
}
template <bool rows_are_lines>
void pack_tiles(uint32_t* packed, const float* data, size_t line_stride, size_t k_stride, int lines, int K, float* sums,
                int begin, int end) {
  constexpr int side = amx::side;
  const int inner = line_stride == 1 ? tile_strips(lines) : tile_steps(K);
  for (int pass = begin; pass < end; pass++)
    for (int i = 0; i < inner; i++) {
      const int l = (line_stride == 1 ? i : pass) * side, u = (line_stride == 1 ? pass : i) * side;
      pack_tile<rows_are_lines>(packed + size_t(l) * tiled_units(K) + u * side,
                                data + l * line_stride + 2 * u * k_stride, line_stride, k_stride, lines - l, K - 2 * u,
                                sums && l < lines ? sums + l : nullptr);
    }
}

// c (32, 32), rows ldc apart, = start (32, 32) + two strips of a @ two strips of b, of `count` tiles each
// a, b: the first tile of the first strip; the second strip begins a_strip and b_strip units later
inline void four_tiles(float* c, size_t ldc, const Start<float>& start, const uint32_t* a, size_t a_strip,
                       const uint32_t* b, size_t b_strip, int count) {
  using namespace amx;
  // 1. Ask for c now, so that the stores at the end find it in the cache.
  for (int i = 0; i < 2 * side; i++)
    for (int j = 0; j < 2 * side; j += side) __builtin_prefetch(c + i * ldc + j, 1);
  // 2. Registers 0 to 3 hold the four tiles of c. They begin with start.
  if (start.data) {
    amx::load<0>(start.data, start.row);
    amx::load<1>(start.data + side, start.row);
    amx::load<2>(start.data + side * start.row, start.row);
    amx::load<3>(start.data + side * start.row + side, start.row);
  } else {
    clear<0>(), clear<1>(), clear<2>(), clear<3>();
  }
  // 3. Each round takes 32 k: registers 4 and 5 hold two tiles of a, 6 and 7 two of b.
  for (int t = 0; t < count; t++, a += area, b += area) {
    amx::load<4>(a, side);
    amx::load<6>(b, side);
    amx::load<5>(a + a_strip, side);
    amx::load<7>(b + b_strip, side);
    amx::multiply_add<0, 4, 6>();
    amx::multiply_add<1, 4, 7>();
    amx::multiply_add<2, 5, 6>();
    amx::multiply_add<3, 5, 7>();
  }
  amx::store<0>(c, ldc);
  amx::store<1>(c + side, ldc);
  amx::store<2>(c + side * ldc, ldc);
  amx::store<3>(c + side * ldc + side, ldc);
}

// ---------------------------------------------------------------------------------------------------------------------

// Copies with vectors: a panel of b, then rows of a.

// panel (units(K), NR) = columns n ... n + NR - 1 of b (K, N)
// Columns from N on become 0. What is computed with them is thrown away, but numbers that happened to lie there could
// be denormal, and slow.
template <class Factor>
void pack_panel(Unit<Factor>* panel, const View<Sum<Factor>>& b, int K, int n, int N) {
  using F = Factors<Factor>;
  constexpr int width = NR<Factor>, terms = F::terms, W = lanes<Sum<Factor>>;
  const int columns = std::min(width, N - n), whole = K / terms, count = units<Factor>(K);
  if (columns < width) std::memset(panel, 0, size_t(count) * width * sizeof *panel);
  // 1. b by rows: a unit's numbers are one or two neighbouring rows, which are copied or interleaved.
  if (b.column == 1) {
    for (int u = 0; u < count; u++) {
      const Sum<Factor>*x = b.data + size_t(u) * terms * b.row + n, *y = u < whole ? x + (terms - 1) * b.row : nullptr;
      Unit<Factor>* to = panel + size_t(u) * width;
      if (columns == width && y)
        for (int j = 0; j < width; j += W) store(to + j, units_across<Factor>(load(x + j), load(y + j)));
      else
        pair_up<Factor>(to, x, y, columns);
    }
    return;
  }
  const Sum<Factor>* column = b.data + n * b.column;
  // 2. b by columns: W columns by W units are loaded along the columns and transposed in registers.
  int u = 0;
  for (; u + W <= whole; u += W)
    for (int j0 = 0; j0 < width; j0 += W) {
      Vec<Unit<Factor>> square[W];
      for (int j = 0; j < W; j++)
        square[j] =
            j0 + j < columns ? units_along<Factor>(column + (j0 + j) * b.column + u * terms) : Vec<Unit<Factor>>{};
      transpose<Unit<Factor>>(square);
      for (int k = 0; k < W; k++) store(panel + size_t(u + k) * width + j0, square[k]);
    }
  // 3. What is left of k, number by number.
  for (; u < count; u++)
    for (int j = 0; j < columns; j++) {
      const Sum<Factor>* x = column + j * b.column + u * terms;
      panel[size_t(u) * width + j] = F::unit(x[0], u < whole ? x[terms - 1] : 0);
    }
}

// packed (packed_size(K, N)) = all of b (K, N), panel after panel, by the thread that calls.
template <class Factor>
void pack_b(Unit<Factor>* packed, const View<Sum<Factor>>& b, int K, int N) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled)
      return pack_tiles<false>(packed, b.data, b.column, b.row, N, K, nullptr, 0, tile_passes(b.column, N, K));
  const size_t panel_size = packed_size<Factor>(K, NR<Factor>);
  for (int n = 0; n < N; n += NR<Factor>) pack_panel<Factor>(packed + n / NR<Factor> * panel_size, b, K, n, N);
}

// a (M, K) as `tile` reads it, MR rows at a time. Rows m ... m + MR - 1 begin at data + m / MR * tile, and their unit
// (i, u) is i * row + u * column further. In a copy the MR rows' units lie side by side (row = 1, column = MR); a
// matrix that is read in place has its own strides. With matrix registers there are no such MR rows: strip i begins at
// data + i * tile, and row and column mean nothing.
template <class Factor>
struct PackedA {
  const Unit<Factor>* data;
  size_t row, column, tile;
};

// How many units a (M, K) takes when it is packed. The copy writes whole vectors, so it needs room behind the last MR
// rows.
template <class Factor>
size_t packed_a_size(int M, int K) {
  const size_t vectors = size_t(M + MR - 1) / MR * MR * units<Factor>(K) + lanes<Sum<Factor>>;
  return tiles_possible<Factor> ? std::max(vectors, size_t(M + 31) / 32 * 32 * tiled_units(K)) : vectors;
}

// packed (M / MR rounded up, units(K), MR) = a (M, K), which is by rows.
// W rows by W units are transposed in registers. These squares may have more rows than the MR of a tile; what a store
// writes too far, the next store overwrites.
template <class Factor>
void pack_a_by_rows(Unit<Factor>* packed, const View<Sum<Factor>>& a, int M, int K) {
  using F = Factors<Factor>;
  constexpr int terms = F::terms, W = lanes<Sum<Factor>>, squares = (MR + W - 1) / W;
  const int whole = K / terms, count = units<Factor>(K);
  for (int m = 0; m < M; m += MR, packed += size_t(count) * MR) {
    // 1. For MR rows, squares as far as k fills them. Rows from M on are 0.
    const Sum<Factor>* x = a.data + m * a.row;
    const int rows = std::min(MR, M - m);
    int u = 0;
    for (; u + W <= whole; u += W) {
      Vec<Unit<Factor>> square[squares][W];
      for (int i = 0; i < squares * W; i++)
        square[i / W][i % W] = i < rows ? units_along<Factor>(x + i * a.row + u * terms) : Vec<Unit<Factor>>{};
      for (auto& s : square) transpose<Unit<Factor>>(s);
      for (int k = 0; k < W; k++)
        for (int s = 0; s < squares; s++) store(packed + size_t(u + k) * MR + s * W, square[s][k]);
    }
    // 2. What is left of k, number by number.
    for (; u < count; u++)
      for (int i = 0; i < rows; i++) {
        const Sum<Factor>* from = x + i * a.row + u * terms;
        packed[size_t(u) * MR + i] = F::unit(from[0], u < whole ? from[terms - 1] : 0);
      }
  }
}

// packed (M / MR rounded up, units(K), MR) = a (M, K), which is by columns: its rows' units lie side by side already.
// sums (M), or nullptr: sums[i] += row i of a, added up in the order of k. For the gradient of a weight, a is dout^T,
// every number of which passes here, and these sums are the gradient of the bias.
template <class Factor>
void pack_a_by_columns(Unit<Factor>* packed, const View<Sum<Factor>>& a, int M, int K, Sum<Factor>* sums) {
  constexpr int terms = Factors<Factor>::terms, W = lanes<Sum<Factor>>, full = task_rows(true);
  const int whole = K / terms, count = units<Factor>(K);
  const size_t tile = size_t(count) * MR;
  // 1. A whole task's sums fit in registers. Other row counts, at the edge of a, add in memory.
  const bool in_registers = sums && M == full;
  Vec<Sum<Factor>> total[full / W] = {};
  if (in_registers)
    for (int j = 0; j < full / W; j++) total[j] = load(sums + j * W);
  for (int u = 0; u < count; u++) {
    const Sum<Factor>*x = a.data + size_t(u) * terms * a.column, *y = u < whole ? x + (terms - 1) * a.column : nullptr;
    // 2. Ask for a column of `a` 24 k ahead. Each lies on a page of its own, and the processor does not fetch ahead
    //    there.
    for (int t = 0; t < terms; t++)
      for (int j = 0; j < M; j += 64 / int(sizeof *x)) __builtin_prefetch(x + (24 + t) * a.column + j);
    // 3. Copy unit u of all rows, MR rows at a time: each MR go to a tile of their own.
    Unit<Factor>* to = packed + u * MR;
    int i = 0;
    if constexpr (terms == 1) {
      for (; i + MR <= M; i += MR, to += tile) std::memcpy(to, x + i, MR * sizeof *to);
    } else {
      // So many rows that they are whole vectors and whole tiles.
      for (constexpr int both = std::lcm(MR, W); i + both <= M && y; i += both) {
        Unit<Factor> units[both];
        for (int j = 0; j < both; j += W) store(units + j, units_across<Factor>(load(x + i + j), load(y + i + j)));
        for (int j = 0; j < both; j += MR, to += tile) std::memcpy(to, units + j, MR * sizeof *units);
      }
    }
    for (; i < M; i += MR, to += tile) pair_up<Factor>(to, x + i, y ? y + i : nullptr, std::min(MR, M - i));
    // 4. Add them to the rows' sums.
    if (in_registers)
      for (int j = 0; j < full / W; j++)
        total[j] += y && terms > 1 ? load(x + j * W) + load(y + j * W) : load(x + j * W);
    else if (sums)
      for (i = 0; i < M; i++) sums[i] += y && terms > 1 ? x[i] + y[i] : x[i];
  }
  if (in_registers)
    for (int j = 0; j < full / W; j++) store(sums + j * W, total[j]);
}

// packed (packed_a_size(M, K)) = a (M, K), whichever way it lies. sums (M) as in pack_a_by_columns; an `a` by rows must
// pass nullptr.
template <class Factor>
PackedA<Factor> pack_a(Unit<Factor>* packed, const View<Sum<Factor>>& a, int M, int K, Sum<Factor>* sums = nullptr) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled) {
      pack_tiles<true>(packed, a.data, a.row, a.column, M, K, sums, 0, tile_passes(a.row, M, K));
      return {packed, 1, MR, size_t(tiled_units(K)) * amx::side};
    }
  if (a.row == 1)
    pack_a_by_columns<Factor>(packed, a, M, K, sums);
  else
    pack_a_by_rows<Factor>(packed, a, M, K);
  return {packed, 1, MR, size_t(units<Factor>(K)) * MR};
}

// How a tile reads `a`: in the matrix itself, whose rows are a_row numbers apart; from a copy; or from a copy that the
// loop asks for some steps ahead, and for the panel as well (doc/cpu-matmul.md). In attention everything is near, and
// the requests would only take the loads' slots.
enum class ReadA { in_place, packed, packed_ahead };

// The innermost loop. c (ROWS, VECTORS * W), rows ldc apart, = start + a (ROWS, n_units) @ the first columns of panel
// (n_units, NR), where W is a vector's length.
template <int ROWS, int VECTORS, class Factor, ReadA how>
inline void tile(Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start, const Unit<Factor>* a, size_t a_row,
                 const Unit<Factor>* panel, int n_units) {
  constexpr int W = lanes<Sum<Factor>>;
  if (how != ReadA::in_place) a_row = 1;
  const size_t a_column = how == ReadA::in_place ? 1 : MR;
  // 1. The sums begin with start. They are registers from here to the stores: `repeat` sees to that, see simd.h.
  Vec<Sum<Factor>> sum[ROWS][VECTORS];
  repeat<ROWS * VECTORS>([&](auto n) {
    constexpr int i = n / VECTORS, j = n % VECTORS;
    sum[i][j] = start.data ? load(start.data + i * start.row + j * W) : Vec<Sum<Factor>>{};
  });
  // 2. Ask for c now, so that the stores at the end find it in the cache.
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++) __builtin_prefetch(c + i * ldc + j * W, 1);
  // 3. For each unit of k: the panel's vectors, then ROWS times one number of a, broadcast, with all of them.
  for (int u = 0; u < n_units; u++) {
    Vec<Unit<Factor>> b[VECTORS];
    for (int j = 0; j < VECTORS; j++) b[j] = load(panel + j * W);
    if constexpr (how == ReadA::packed_ahead) {
      for (int j = 0; j < NR<Factor>; j += 64 / int(sizeof *panel)) __builtin_prefetch(panel + 32 * NR<Factor> + j);
      __builtin_prefetch(a + 16 * MR);
    }
    repeat<ROWS>([&](auto i) {
      const Unit<Factor> x = a[i * a_row];
      repeat<VECTORS>([&](auto j) { sum[i][j] = multiply_add(sum[i][j], x, b[j]); });
    });
    a += a_column;
    panel += NR<Factor>;
  }
  repeat<ROWS * VECTORS>([&](auto n) {
    constexpr int i = n / VECTORS, j = n % VECTORS;
    store(c + i * ldc + j * W, sum[i][j]);
  });
}

// The same for `rows` up to ROWS, and for the last columns of a matrix: c (rows, columns). A tile of fewer than NR
// columns is computed in a padded buffer, and with one vector a row if that is enough.
template <int ROWS, class Factor, ReadA how>
void edge_tile(int rows, int columns, Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start,
               const Unit<Factor>* a, size_t a_row, const Unit<Factor>* panel, int n_units) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return edge_tile<ROWS - 1, Factor, how>(rows, columns, c, ldc, start, a, a_row, panel, n_units);
  if (columns == NR<Factor>) return tile<ROWS, NV, Factor, how>(c, ldc, start, a, a_row, panel, n_units);
  Sum<Factor> padded[ROWS * NR<Factor>] = {};
  if (start.data)
    for (int i = 0; i < ROWS; i++)
      std::memcpy(padded + i * NR<Factor>, start.data + i * start.row, columns * sizeof *padded);
  const Start<Sum<Factor>> from = {padded, NR<Factor>};
  if (columns <= lanes<Sum<Factor>>)
    tile<ROWS, 1, Factor, how>(padded, NR<Factor>, from, a, a_row, panel, n_units);
  else
    tile<ROWS, NV, Factor, how>(padded, NR<Factor>, from, a, a_row, panel, n_units);
  for (int i = 0; i < ROWS; i++) std::memcpy(c + i * ldc, padded + i * NR<Factor>, columns * sizeof *padded);
}

// The part (#) of a product that a triangular matrix leaves: attention's causal mask makes the result or an operand a
// triangle. Tiles that lie outside of it are skipped, tiles on its edge are computed as a whole.
//
//            columns n                  terms k                   terms k
//          +--------------+           +--------------+          +--------------+
//   rows m |##\           |    rows m |##\           |   rows m |\#############|
//   of c   |####\  not    |    of a   |####\    0    |   of a   |  \###########|
//          |######\ wanted|           |######\       |          | 0  \#########|
//          +--------------+           +--------------+          +--------------+
//            n < n_end + m              k < k_end + m             k >= k_begin + m
//            scores = q @ k^T           out = P @ v               dk = dS^T @ q
struct Triangle {
  static constexpr int none = 1 << 30;
  int n_end = none, k_end = none, k_begin = -none;
};

// multiply_packed with matrix registers: the same arguments, where a panel is two strips of b's tiles.
inline void multiply_tiles(float* c, size_t ldc, const Start<float>& start, const PackedA<bfloat16>& a,
                           const uint32_t* packed_b, size_t panel_size, int M, int N, int K, const Triangle& only) {
  constexpr int side = amx::side, two = 2 * side;
  for (int n = 0; n < N; n += two)
    for (int m = 0; m < M; m += two) {
      // 1. These 32 rows and columns, and the tiles along k that the triangle leaves.
      const int rows = std::min(two, M - m), columns = std::min(two, N - n), last = m + rows - 1;
      if (n >= only.n_end + last) continue;
      const int first = std::max(0, only.k_begin + m) / two, end = std::min(K, only.k_end + last);
      const int count = std::max(0, (end + two - 1) / two - first);
      const uint32_t* a_tiles = a.data + m / side * a.tile + first * amx::area;
      const uint32_t* b_tiles = packed_b + n / two * panel_size + first * amx::area;
      const Start<float> from = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      float* to = c + m * ldc + n;
      // 2. A whole square is computed in c, an incomplete one in a buffer.
      if (rows == two && columns == two) {
        four_tiles(to, ldc, from, a_tiles, a.tile, b_tiles, panel_size / 2, count);
        continue;
      }
      float edge[two * two] = {};
      if (from.data)
        for (int i = 0; i < rows; i++) std::memcpy(edge + i * two, from.data + i * from.row, columns * sizeof *edge);
      four_tiles(edge, two, {edge, two}, a_tiles, a.tile, b_tiles, panel_size / 2, count);
      for (int i = 0; i < rows; i++) std::memcpy(to + i * ldc, edge + i * two, columns * sizeof *edge);
    }
}

// c (M, N), rows ldc apart, = start (M, N) + a (M, K) @ b (K, N), by the thread that calls
// packed_b: b's panels, `panel_size` units apart, from pack_b or pack_block. copy: how the tiles read an `a` that is a
// copy.
template <class Factor, ReadA copy = ReadA::packed>
void multiply_packed(Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start, const PackedA<Factor>& a,
                     const Unit<Factor>* packed_b, size_t panel_size, int M, int N, int K, const Triangle& only = {}) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled) return multiply_tiles(c, ldc, start, a, packed_b, panel_size, M, N, K, only);
  for (int n = 0; n < N; n += NR<Factor>) {
    const int columns = std::min(NR<Factor>, N - n);
    for (int m = 0; m < M; m += MR) {
      // This tile's rows and columns, and the units of k that the triangle leaves.
      const int rows = std::min(MR, M - m), last = m + rows - 1;
      if (n >= only.n_end + last) continue;
      const int first_unit = std::max(0, only.k_begin + m) / Factors<Factor>::terms;
      const int n_units = units<Factor>(std::min(K, only.k_end + last)) - first_unit;
      const Unit<Factor>* panel = packed_b + n / NR<Factor> * panel_size + size_t(first_unit) * NR<Factor>;
      const Start<Sum<Factor>> from = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      const Unit<Factor>* a_tile = a.data + m / MR * a.tile + first_unit * a.column;
      Sum<Factor>* to = c + m * ldc + n;
      if (a.row != 1)
        edge_tile<MR, Factor, ReadA::in_place>(rows, columns, to, ldc, from, a_tile, a.row, panel, n_units);
      else
        edge_tile<MR, Factor, copy>(rows, columns, to, ldc, from, a_tile, 1, panel, n_units);
    }
  }
}

// packed (packed_size(K, N)) = a block of b (K, N), panel after panel. All threads of a parallel region call it, share
// the panels, and meet at the end.
template <class Factor>
void pack_block(Unit<Factor>* packed, const View<Sum<Factor>>& b, int K, int N) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled) {
      const int all = tile_passes(b.column, N, K);
#pragma omp for schedule(static)
      for (int i = 0; i < all; i++) pack_tiles<false>(packed, b.data, b.column, b.row, N, K, nullptr, i, i + 1);
      return;
    }
  const size_t panel_size = packed_size<Factor>(K, NR<Factor>);
#pragma omp for schedule(static)
  for (int n = 0; n < N; n += NR<Factor>) pack_panel<Factor>(packed + n / NR<Factor> * panel_size, b, K, n, N);
}

// How c (M, N) is divided: into tasks of MC rows. Where that makes few, tasks are divided by columns as well, in whole
// panels, so that every thread has several and none waits long for the last.
struct Tasks {
  int row_tasks, rows, columns, count;
  Tasks(int M, int N, int MC, int panel) : row_tasks((M + MC - 1) / MC), rows(MC) {
    const int wanted = 8 * omp_get_max_threads(), panels = (N + panel - 1) / panel;
    const int divide = std::min((wanted + row_tasks - 1) / row_tasks, (panels + 3) / 4);
    columns = (panels + divide - 1) / divide * panel;
    count = row_tasks * ((N + columns - 1) / columns);
  }
  int row(int task) const { return task % row_tasks * rows; }
  int column(int task) const { return task / row_tasks * columns; }
};

// The default for `after`. Yours would work on the elements first ... first + count - 1 of c, counted from its first
// row, which have just been written and are still in the cache.
struct Nothing {
  void operator()(size_t, size_t) const {}
};

// packed (packed_size(K, N)) = all of b (K, N) as `multiply` wants it, block after block of k, by all threads. It is
// for a b that is used again and again.
template <class Factor>
void pack_blocks(Unit<Factor>* packed, const View<Sum<Factor>>& b, int K, int N) {
  constexpr int block = KC * Factors<Factor>::terms;
#pragma omp parallel if (size_t(K) * N > worth_threads)
  for (int k0 = 0; k0 < K; k0 += block)
    pack_block<Factor>(packed + packed_size<Factor>(k0, N), {b.data + k0 * b.row, b.row, b.column},
                       std::min(block, K - k0), N);
}

// c (M, N) = start (M, N) + a (M, K) @ b (K, N), by all threads; then after(first, count), until every element of c has
// been passed once.
// sums (M), or nullptr: sums[m] += row m of a, added up; only for an `a` by columns
// packed (packed_size(K, N)), or nullptr: b, copied before by pack_blocks
// n_end: elements of c with n >= n_end + m are not wanted, see Triangle
template <class Factor, class After = Nothing>
void multiply(Sum<Factor>* c, const Start<Sum<Factor>>& start, const View<Sum<Factor>>& a, const View<Sum<Factor>>& b,
              int M, int N, int K, const After& after = {}, Sum<Factor>* sums = nullptr,
              const Unit<Factor>* packed = nullptr, int n_end = Triangle::none) {
  struct MemoryA;  // tags for scratch(), see simd.h
  struct MemoryB;
  const bool tiles = tiles_taken<Factor>();
  const int block = (a.row == 1 && !tiles ? KC_COLUMNS : KC) * Factors<Factor>::terms;
  Unit<Factor>* own = packed ? nullptr : scratch<MemoryB, Unit<Factor>>(packed_size<Factor>(std::min(K, block), N));
  const int MC = tiles ? 64 : task_rows(a.row == 1);
  const Tasks tasks(M, N, MC, NR<Factor>);
#pragma omp parallel if (size_t(M) * N * K > 8 * worth_threads)
  for (int k0 = 0; k0 < K; k0 += block) {
    [[maybe_unused]] const Registers<Factor> registers{};
    // 1. A block of k: b's panels, packed now or before.
    const int kc = std::min(block, K - k0);
    const size_t panel_size = packed_size<Factor>(kc, NR<Factor>);
    const Unit<Factor>* packed_b = packed ? packed + packed_size<Factor>(k0, N) : own;
    if (own) pack_block<Factor>(own, {b.data + k0 * b.row, b.row, b.column}, kc, N);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks.count; task++) {
      // 2. A task's rows of a, copied. The first task of these rows also adds them up.
      const int m = tasks.row(task), n = tasks.column(task);
      const int rows = std::min(MC, M - m), columns = std::min(tasks.columns, N - n);
      Unit<Factor>* memory = scratch<MemoryA, Unit<Factor>>(packed_a_size<Factor>(MC, block));
      const PackedA<Factor> packed_a = pack_a<Factor>(memory, {a.data + m * a.row + k0 * a.column, a.row, a.column},
                                                      rows, kc, sums && n == 0 ? sums + m : nullptr);
      // 3. Multiply. From the second block of k on, the sums begin with what the blocks before have left in c.
      const Start<Sum<Factor>> first = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      Sum<Factor>* target = c + size_t(m) * N + n;
      multiply_packed<Factor, ReadA::packed_ahead>(target, N, k0 == 0 ? first : Start<Sum<Factor>>{target, size_t(N)},
                                                   packed_a, packed_b + panel_size * (n / NR<Factor>), panel_size, rows,
                                                   columns, kc, {.n_end = n_end - n + m});
      // 4. The last block of k: c's elements are complete.
      if (k0 + kc < K) continue;
      if (columns == N)
        after(size_t(m) * N, size_t(rows) * N);
      else
        for (int i = m; i < m + rows; i++) after(size_t(i) * N + n, columns);
    }
  }
}

// c (N, N) = a (N, K) @ b (K, N), where a and b are such that c is symmetric: a times its transpose, or a symmetric matrix
// times itself. Computes the lower half of c, and copies it to the upper half. The result has the same bits as multiply's:
// elements (i, j) and (j, i) add up the same products in the same order.
template <class Factor>
void multiply_symmetric(Sum<Factor>* c, const View<Sum<Factor>>& a, const View<Sum<Factor>>& b, int N, int K) {
  multiply<Factor>(c, {}, a, b, N, N, K, Nothing{}, nullptr, nullptr, 1);  // n < 1 + m
  constexpr int W = lanes<Sum<Factor>>;
  const size_t row = size_t(N);
  for (int i0 = 0; i0 < N; i0 += W)
    for (int j0 = 0; j0 <= i0; j0 += W) {
      if (j0 < i0 && i0 + W <= N) {  // a square, in registers
        Vec<Sum<Factor>> square[W];
        for (int i = 0; i < W; i++) square[i] = load(c + (i0 + i) * row + j0);
        transpose<Sum<Factor>>(square);
        for (int j = 0; j < W; j++) store(c + (j0 + j) * row + i0, square[j]);
      } else {
        for (int i = i0; i < std::min(i0 + W, N); i++)
          for (int j = j0; j < std::min(j0 + W, i); j++) c[j * row + i] = c[i * row + j];
      }
    }
}

// c (M, N) += a (M, K) @ b (K, N), for an `a` by columns that is no larger than b, M <= N. All threads copy all of a
// once, and a task is some columns of b, which its thread copies.
// sums (M), or nullptr: sums[m] += row m of a, added up
template <class Factor>
void multiply_by_columns(Sum<Factor>* c, const View<Sum<Factor>>& a, const View<Sum<Factor>>& b, int M, int N, int K,
                         Sum<Factor>* sums) {
  if (tiles_taken<Factor>()) return multiply<Factor>(c, {c, size_t(N)}, a, b, M, N, K, Nothing{}, sums);
  struct MemoryA;  // tags for scratch(), see simd.h
  struct MemoryB;
  constexpr int block = KC * Factors<Factor>::terms, MC = task_rows(true);
  const int panels = (N + NR<Factor> - 1) / NR<Factor>, longest = std::min(K, block);
  // Columns of a task: few enough for two tasks a thread, if c has so many.
  const int NC = std::clamp(panels / (2 * omp_get_max_threads()), 1, 3) * NR<Factor>;
  Unit<Factor>* all_a = scratch<MemoryA, Unit<Factor>>(packed_a_size<Factor>(M, longest));
#pragma omp parallel if (size_t(M) * N * K > 8 * worth_threads)
  for (int k0 = 0; k0 < K; k0 += block) {
    const int kc = std::min(block, K - k0);
    const size_t row = units<Factor>(kc), panel_size = packed_size<Factor>(kc, NR<Factor>);
    // 1. A block of k: the threads share the copying of all rows of a.
#pragma omp for schedule(static)
    for (int m = 0; m < M; m += MC)
      pack_a<Factor>(all_a + m * row, {a.data + m * a.row + k0 * a.column, a.row, a.column}, std::min(MC, M - m), kc,
                     sums ? sums + m : nullptr);
#pragma omp for schedule(dynamic)
    for (int n = 0; n < N; n += NC) {
      // 2. A task: some columns of b, one to three panels, copied by the thread itself.
      const int columns = std::min(NC, N - n);
      Unit<Factor>* packed_b = scratch<MemoryB, Unit<Factor>>(packed_size<Factor>(longest, NC));
      pack_b<Factor>(packed_b, {b.data + k0 * b.row + n * b.column, b.row, b.column}, kc, columns);
      // 3. MR rows of a at a time, which stay in L1 or L2 while the panels go past them.
      for (int m = 0; m < M; m += MR) {
        const PackedA<Factor> packed_a = {all_a + m * row, 1, MR, MR * row};
        Sum<Factor>* target = c + size_t(m) * N + n;
        multiply_packed<Factor, ReadA::packed_ahead>(target, N, {target, size_t(N)}, packed_a, packed_b, panel_size,
                                                     std::min(MR, M - m), columns, kc);
      }
    }
  }
}

}  // namespace product
