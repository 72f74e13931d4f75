// Linear layer: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), and its gradients.
// Nine tenths of a training step are these three products, so they are blocked for registers and caches; the plain
// loops that say what is computed stand first. doc/cpu-matmul.md explains the blocking, with a picture.
// defines: Weight, pack_weight, matmul_forward, matmul_backward, their reference:: loops, and product::, which attention
// uses as well
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "amx.h"
#include "factors.h"
#include "simd.h"

namespace reference {

// out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC); no bias: nullptr
template <class Real>
void matmul_forward(Real* out, const Real* inp, const Real* weight, const Real* bias, int rows, int C, int OC) {
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < OC; o++) {
      Real sum = bias ? bias[o] : Real(0);
      for (int c = 0; c < C; c++) sum += inp[size_t(r) * C + c] * weight[size_t(o) * C + c];
      out[size_t(r) * OC + o] = sum;
    }
}

// dinp (rows, C) = dout (rows, OC) @ weight (OC, C);  dweight (OC, C) += dout^T @ inp;  dbias (OC) += column sums of
// dout
template <class Real>
void matmul_backward(Real* dinp, Real* dweight, Real* dbias, const Real* dout, const Real* inp, const Real* weight,
                     int rows, int C, int OC) {
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < C; c++) dinp[size_t(r) * C + c] = 0;
    for (int o = 0; o < OC; o++) {
      const Real d = dout[size_t(r) * OC + o];
      for (int c = 0; c < C; c++) {
        dinp[size_t(r) * C + c] += d * weight[size_t(o) * C + c];
        dweight[size_t(o) * C + c] += d * inp[size_t(r) * C + c];
      }
      if (dbias) dbias[o] += d;
    }
  }
}

}  // namespace reference

// ---------------------------------------------------------------------------------------------------------------------
// The blocked product: c (M, N) = start + a (M, K) @ b (K, N).
//
//   for each block of the K terms:
//     b's block is copied into panels of NR columns, so that the innermost loop reads it contiguously   (pack_panel)
//     for each task of some rows, in parallel:
//       a's rows are copied into tiles of MR rows, for the same reason                                       (pack_a)
//       for each panel, which then is in the L2 cache, too; for each MR rows:
//         MR x NR sums stay in registers while k runs: per k, NV vectors of b are loaded and MR numbers of a
//         broadcast, for MR * NV fused multiply-adds                                                          (tile)
//
// `multiply` does this. `multiply_by_columns` swaps the roles of a and b, for an `a` that is the smaller of the two.
//
// Every element of c is one chain of multiply-adds over k = 0, 1, ..., K-1. Which tile, task or thread it falls to does
// not enter, so the result is bit-identical for any number of threads, and a row of it for any number of other rows.
//
// Factor is the type that the operands are rounded to as they are copied: Real itself or bfloat16, kernels/factors.h.

namespace product {

// The register block. 32 vector registers hold 12 x 2 sums, 2 vectors of b and a broadcast; 16 hold half as many.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
template <class Factor>
constexpr int NR = lanes<Sum<Factor>>* NV;

// Units of k in a block. Long ones: between two blocks the sums wait in c, and a tile that begins by loading sums from
// memory stands still for longer than it does for a panel, which comes in order and so is fetched ahead. Where `a` is by
// columns, K is the number of rows of a batch and c a weight's gradient: shorter blocks, whose panels stay closer.
constexpr int KC = 2048, KC_COLUMNS = 768;

// Rows of a task. Few, since each row of c that a task walks along is a stream of its own, and the processor can fetch
// only so many ahead; for an `a` by columns three whole cache lines. Multiples of MR.
constexpr int task_rows(bool a_by_columns) { return a_by_columns ? 48 : 24; }

// A matrix by its strides: element (i, j) is data[i * row + j * column], and one of the strides is 1.
template <class Real>
struct View {
  const Real* data;
  size_t row, column;
};

// What the sums begin with: nothing, a bias that all rows share (row = 0), or the values already there.
template <class Real>
struct Start {
  const Real* data = nullptr;
  size_t row = 0;
};

// Numbers of k in units: the last may be half empty, filled up with 0.
template <class Factor>
constexpr int units(int K) {
  return (K + Factors<Factor>::terms - 1) / Factors<Factor>::terms;
}

// to (count) = the units of x (count) with, for pairs, y (count); the last row has none: nullptr
template <class Factor>
inline void pair_up(Unit<Factor>* to, const Sum<Factor>* x, const Sum<Factor>* y, int count) {
  if constexpr (Factors<Factor>::terms == 1)
    std::memcpy(to, x, count * sizeof *x);
  else
    for (int i = 0; i < count; i++) to[i] = Factors<Factor>::unit(x[i], y ? y[i] : 0);
}

// Matrix registers for these products, kernels/amx.h? They need vectors of their rows' width to be filled.
template <class Factor>
constexpr bool tiles_possible = std::is_same_v<Factor, bfloat16>&& vector_bytes == 64;

// Units that b (K, N) takes when it is packed.
template <class Factor>
size_t packed_size(int K, int N) {
  const int whole = tiles_possible<Factor> ? amx::side : 1;  // for either way of packing
  return size_t((units<Factor>(K) + whole - 1) / whole * whole) * ((N + NR<Factor> - 1) / NR<Factor>)*NR<Factor>;
}

// ---------------------------------------------------------------------------------------------------------------------
// With matrix registers, kernels/amx.h, the same functions do the same with other tiles. a and b are copied into tiles of
// 16 x 16 units: a's rows are rows of c, b's rows are units of k, and all that lie along k for 16 rows of a or columns of b
// are a line, one tile after the other. Four tiles of c, 32 x 32 sums, stay in registers while k runs: per 32 k, two tiles
// of a and two of b are loaded, and four products added.
//
// The processor adds 32 terms to an element of c at a time: it sums those with even k and those with odd k apart, and then
// adds both. So results differ from the vectors' in their rounding. They still do not depend on threads, tasks or rows.

constexpr int tiled_units(int K) { return (units<bfloat16>(K) + amx::side - 1) / amx::side * amx::side; }

// The thread's matrix registers, for as long as it multiplies.
template <class Factor>
using Registers = std::conditional_t<tiles_possible<Factor>, amx::Tiles, char>;

template <class Factor>
bool tiles_taken() {
  return tiles_possible<Factor> && amx::enabled;
}

// to (16, 16): a tile of 16 of a's rows or b's columns, "lines", `line` numbers apart, and 32 k, `k` numbers apart. What is
// missing of the lines and of K is filled up with zeros. If line is 1: sums (lines) += the sum of each line.
template <bool rows_are_lines>
void pack_tile(uint32_t* to, const float* data, size_t line, size_t k, int lines, int K, float* sums) {
  constexpr int side = amx::side;
  const auto along = [K](const float* from) {
    if (K >= 2 * side) return units_along<bfloat16>(from);
    float some[2 * side] = {};
    std::memcpy(some, from, K * sizeof *some);
    return units_along<bfloat16>(some);
  };
  const auto across = [lines](const float* from) {
    if (lines >= side) return load(from);
    float some[side] = {};
    std::memcpy(some, from, lines * sizeof *some);
    return load(some);
  };
  Vec<uint32_t> square[side] = {};
  if (line != 1) {
    for (int i = 0; i < std::min(side, lines); i++) square[i] = along(data + i * line);
    if (!rows_are_lines) transpose<uint32_t>(square);
  } else if (lines > 0) {
    Vec<float> total = sums ? across(sums) : Vec<float>{};
    for (int u = 0; 2 * u < std::min(2 * side, K); u++) {
      const float* x = data + 2 * u * k;
      const bool pair = 2 * u + 1 < K;
      const Vec<float> even = across(x), odd = pair ? across(x + k) : Vec<float>{};
      square[u] = units_across<bfloat16>(even, odd);
      total += pair ? even + odd : even;
    }
    if (sums) std::memcpy(sums, &total, std::min(side, lines) * sizeof *sums);
    if (rows_are_lines) transpose<uint32_t>(square);
  }
  for (int i = 0; i < side; i++) store(to + i * side, square[i]);
}

constexpr int tile_steps(int K) { return tiled_units(K) / amx::side; }                             // along k
constexpr int tile_lines(int lines) { return (lines + 2 * amx::side - 1) / (2 * amx::side) * 2; }  // across, even

// packed = tile_lines(lines) lines of tile_steps(K) tiles, in the order in which memory has their numbers: step after step,
// if line is 1, else line after line. Of this outer loop the passes from `begin` to `end`; all are tile_passes.
inline int tile_passes(size_t line, int lines, int K) { return line == 1 ? tile_steps(K) : tile_lines(lines); }
template <bool rows_are_lines>
void pack_tiles(uint32_t* packed, const float* data, size_t line, size_t k, int lines, int K, float* sums, int begin,
                int end) {
  constexpr int side = amx::side;
  const int inner = line == 1 ? tile_lines(lines) : tile_steps(K);
  for (int pass = begin; pass < end; pass++)
    for (int i = 0; i < inner; i++) {
      const int l = (line == 1 ? i : pass) * side, u = (line == 1 ? pass : i) * side;
      pack_tile<rows_are_lines>(packed + size_t(l) * tiled_units(K) + u * side, data + l * line + 2 * u * k, line, k,
                                lines - l, K - 2 * u, sums && l < lines ? sums + l : nullptr);
    }
}

// c (32, 32) = start + two lines of `count` tiles of a @ two of b, the lines a_line and b_line units apart
inline void four_tiles(float* c, size_t ldc, const Start<float>& start, const uint32_t* a, size_t a_line,
                       const uint32_t* b, size_t b_line, int count) {
  using namespace amx;
  for (int i = 0; i < 2 * side; i++)  // so that the stores at the end find c in the cache
    for (int j = 0; j < 2 * side; j += side) __builtin_prefetch(c + i * ldc + j, 1);
  if (start.data) {
    amx::load<0>(start.data, start.row);
    amx::load<1>(start.data + side, start.row);
    amx::load<2>(start.data + side * start.row, start.row);
    amx::load<3>(start.data + side * start.row + side, start.row);
  } else {
    clear<0>(), clear<1>(), clear<2>(), clear<3>();
  }
  for (int t = 0; t < count; t++, a += area, b += area) {
    amx::load<4>(a, side);
    amx::load<6>(b, side);
    amx::load<5>(a + a_line, side);
    amx::load<7>(b + b_line, side);
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

// panel (K, NR) = columns [n, n + NR) of b (K, N), filled up with zeros: what is computed with them is thrown away, but
// numbers that happened to lie there could be denormal, and slow
template <class Factor>
void pack_panel(Unit<Factor>* panel, const View<Sum<Factor>>& b, int K, int n, int N) {
  using F = Factors<Factor>;
  constexpr int width = NR<Factor>, terms = F::terms, W = lanes<Sum<Factor>>;
  const int columns = std::min(width, N - n), whole = K / terms, count = units<Factor>(K);
  if (columns < width) std::memset(panel, 0, size_t(count) * width * sizeof *panel);
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
  int u = 0;
  for (; u + W <= whole; u += W)  // squares of W columns by W units
    for (int j0 = 0; j0 < width; j0 += W) {
      Vec<Unit<Factor>> square[W];
      for (int j = 0; j < W; j++)
        square[j] =
            j0 + j < columns ? units_along<Factor>(column + (j0 + j) * b.column + u * terms) : Vec<Unit<Factor>>{};
      transpose<Unit<Factor>>(square);
      for (int k = 0; k < W; k++) store(panel + size_t(u + k) * width + j0, square[k]);
    }
  for (; u < count; u++)
    for (int j = 0; j < columns; j++) {
      const Sum<Factor>* x = column + j * b.column + u * terms;
      panel[size_t(u) * width + j] = F::unit(x[0], u < whole ? x[terms - 1] : 0);
    }
}

// All of b, for those who work alone: panel after panel.
template <class Factor>
void pack_b(Unit<Factor>* packed, const View<Sum<Factor>>& b, int K, int N) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled)
      return pack_tiles<false>(packed, b.data, b.column, b.row, N, K, nullptr, 0, tile_passes(b.column, N, K));
  const size_t panel_size = packed_size<Factor>(K, NR<Factor>);
  for (int n = 0; n < N; n += NR<Factor>) pack_panel<Factor>(packed + n / NR<Factor> * panel_size, b, K, n, N);
}

// a (M, K) as the tile reads it, MR rows at a time, `tile` apart: unit (i, u) of them is data[i * row + u * column]. In a
// copy the units of the MR rows lie side by side: row is 1 and column is MR.
template <class Factor>
struct PackedA {
  const Unit<Factor>* data;
  size_t row, column, tile;
};

// Units that a (M, K) takes when it is packed. The copy writes whole vectors, so it needs some room behind the last tile.
template <class Factor>
size_t packed_a_size(int M, int K) {
  const size_t vectors = size_t(M + MR - 1) / MR * MR * units<Factor>(K) + lanes<Sum<Factor>>;
  return tiles_possible<Factor> ? std::max(vectors, size_t(M + 31) / 32 * 32 * tiled_units(K)) : vectors;
}

// Copies a view by rows to packed, in squares of W rows and W units that are transposed in registers. A square may have more
// rows than the MR of a tile: the next store overwrites what this one writes too far.
template <class Factor>
void pack_a_by_rows(Unit<Factor>* packed, const View<Sum<Factor>>& a, int M, int K) {
  using F = Factors<Factor>;
  constexpr int terms = F::terms, W = lanes<Sum<Factor>>, squares = (MR + W - 1) / W;
  const int whole = K / terms, count = units<Factor>(K);
  for (int m = 0; m < M; m += MR, packed += size_t(count) * MR) {
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
    for (; u < count; u++)
      for (int i = 0; i < rows; i++) {
        const Sum<Factor>* at = x + i * a.row + u * terms;
        packed[size_t(u) * MR + i] = F::unit(at[0], u < whole ? at[terms - 1] : 0);
      }
  }
}

// Copies a view by columns to packed. Also adds up each row of `a`, in the order of k: sums (M) += the row's sum. Pass nullptr
// if you do not need the sums.
template <class Factor>
void pack_a_by_columns(Unit<Factor>* packed, const View<Sum<Factor>>& a, int M, int K, Sum<Factor>* sums) {
  constexpr int terms = Factors<Factor>::terms, W = lanes<Sum<Factor>>, full = task_rows(true);
  const int whole = K / terms, count = units<Factor>(K);
  const size_t tile = size_t(count) * MR;
  const bool in_registers = sums && M == full;
  Vec<Sum<Factor>> total[full / W] = {};
  if (in_registers)
    for (int j = 0; j < full / W; j++) total[j] = load(sums + j * W);
  for (int u = 0; u < count; u++) {
    const Sum<Factor>*x = a.data + size_t(u) * terms * a.column, *y = u < whole ? x + (terms - 1) * a.column : nullptr;
    for (int t = 0; t < terms; t++)  // each row lies on a page of its own, where the processor does not fetch ahead
      for (int j = 0; j < M; j += 64 / int(sizeof *x)) __builtin_prefetch(x + (24 + t) * a.column + j);
    Unit<Factor>* to = packed + u * MR;
    int i = 0;
    if constexpr (terms == 1) {
      for (; i + MR <= M; i += MR, to += tile) std::memcpy(to, x + i, MR * sizeof *to);
    } else {
      for (constexpr int both = std::lcm(MR, W); i + both <= M && y; i += both) {  // whole vectors that are whole tiles
        Unit<Factor> units[both];
        for (int j = 0; j < both; j += W) store(units + j, units_across<Factor>(load(x + i + j), load(y + i + j)));
        for (int j = 0; j < both; j += MR, to += tile) std::memcpy(to, units + j, MR * sizeof *units);
      }
    }
    for (; i < M; i += MR, to += tile) pair_up<Factor>(to, x + i, y ? y + i : nullptr, std::min(MR, M - i));
    if (in_registers)
      for (int j = 0; j < full / W; j++)
        total[j] += y && terms > 1 ? load(x + j * W) + load(y + j * W) : load(x + j * W);
    else if (sums)
      for (i = 0; i < M; i++) sums[i] += y && terms > 1 ? x[i] + y[i] : x[i];
  }
  if (in_registers)
    for (int j = 0; j < full / W; j++) store(sums + j * W, total[j]);
}

// Copies a (M, K) to packed (packed_a_size). Only a view by columns can give the sums.
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

// Where a tile's rows of `a` are: where the matrix has them, a_row apart; or in a copy, which is asked for some steps ahead,
// and the panel with it, or is not. It pays where both come from L2 or L3, and what the processor fetches by itself comes
// too late; in attention, where all is near, the requests would only take their slots.
enum class A { in_place, packed, packed_ahead };

// c (ROWS, NR) = start + a (ROWS, K) @ panel (K, NR)
template <int ROWS, class Factor, A where>
inline void tile(Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start, const Unit<Factor>* a, size_t a_row,
                 const Unit<Factor>* panel, int n_units) {
  constexpr int W = lanes<Sum<Factor>>;
  if (where != A::in_place) a_row = 1;
  const size_t a_column = where == A::in_place ? 1 : MR;
  Vec<Sum<Factor>> sum[ROWS][NV];
  repeat<ROWS * NV>([&](auto n) {
    constexpr int i = n / NV, j = n % NV;
    sum[i][j] = start.data ? load(start.data + i * start.row + j * W) : Vec<Sum<Factor>>{};
  });
  for (int i = 0; i < ROWS; i++)  // so that the stores at the end find c in the cache
    for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * W, 1);
  for (int u = 0; u < n_units; u++) {
    Vec<Unit<Factor>> b[NV];
    for (int j = 0; j < NV; j++) b[j] = load(panel + j * W);
    if constexpr (where == A::packed_ahead) {
      for (int j = 0; j < NR<Factor>; j += 64 / int(sizeof *panel)) __builtin_prefetch(panel + 32 * NR<Factor> + j);
      __builtin_prefetch(a + 16 * MR);
    }
    repeat<ROWS>([&](auto i) {
      const Unit<Factor> x = a[i * a_row];
      repeat<NV>([&](auto j) { sum[i][j] = multiply_add(sum[i][j], x, b[j]); });
    });
    a += a_column;
    panel += NR<Factor>;
  }
  repeat<ROWS * NV>([&](auto n) {
    constexpr int i = n / NV, j = n % NV;
    store(c + i * ldc + j * W, sum[i][j]);
  });
}

// The same for any number of rows up to ROWS, and for the last columns of a matrix.
template <int ROWS, class Factor, A where>
void edge_tile(int rows, int columns, Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start,
               const Unit<Factor>* a, size_t a_row, const Unit<Factor>* panel, int n_units) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return edge_tile<ROWS - 1, Factor, where>(rows, columns, c, ldc, start, a, a_row, panel, n_units);
  if (columns == NR<Factor>) return tile<ROWS, Factor, where>(c, ldc, start, a, a_row, panel, n_units);
  Sum<Factor> padded[ROWS * NR<Factor>] = {};
  if (start.data)
    for (int i = 0; i < ROWS; i++)
      std::memcpy(padded + i * NR<Factor>, start.data + i * start.row, columns * sizeof *padded);
  tile<ROWS, Factor, where>(padded, NR<Factor>, {padded, NR<Factor>}, a, a_row, panel, n_units);
  for (int i = 0; i < ROWS; i++) std::memcpy(c + i * ldc, padded + i * NR<Factor>, columns * sizeof *padded);
}

// What of a product is not wanted, or known to be zero, because of a triangular matrix: for the rows up to m, columns
// from n_end + m on are not computed; terms from k_end + m on are left out, and for the rows from m on those before
// k_begin + m.
struct Triangle {
  static constexpr int none = 1 << 30;
  int n_end = none, k_end = none, k_begin = -none;
};

// multiply_packed for tiles; a panel is two lines.
inline void multiply_tiles(float* c, size_t ldc, const Start<float>& start, const PackedA<bfloat16>& a,
                           const uint32_t* packed_b, size_t panel_size, int M, int N, int K, const Triangle& only) {
  constexpr int side = amx::side, two = 2 * side;
  for (int n = 0; n < N; n += two)
    for (int m = 0; m < M; m += two) {
      const int rows = std::min(two, M - m), columns = std::min(two, N - n), last = m + rows - 1;
      if (n >= only.n_end + last) continue;
      const int first = std::max(0, only.k_begin + m) / two, end = std::min(K, only.k_end + last);
      const int count = std::max(0, (end + two - 1) / two - first);
      const uint32_t* a_tiles = a.data + m / side * a.tile + first * amx::area;
      const uint32_t* b_tiles = packed_b + n / two * panel_size + first * amx::area;
      const Start<float> from = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      float* to = c + m * ldc + n;
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

// c (M, N) = start + a (M, K) @ b, with b packed in panels `panel_size` units apart; one thread
template <class Factor, A copy = A::packed>
void multiply_packed(Sum<Factor>* c, size_t ldc, const Start<Sum<Factor>>& start, const PackedA<Factor>& a,
                     const Unit<Factor>* packed_b, size_t panel_size, int M, int N, int K, const Triangle& only = {}) {
  if constexpr (tiles_possible<Factor>)
    if (amx::enabled) return multiply_tiles(c, ldc, start, a, packed_b, panel_size, M, N, K, only);
  for (int n = 0; n < N; n += NR<Factor>) {
    const int columns = std::min(NR<Factor>, N - n);
    for (int m = 0; m < M; m += MR) {
      const int rows = std::min(MR, M - m), last = m + rows - 1;
      if (n >= only.n_end + last) continue;
      const int first_unit = std::max(0, only.k_begin + m) / Factors<Factor>::terms;
      const int n_units = units<Factor>(std::min(K, only.k_end + last)) - first_unit;
      const Unit<Factor>* panel = packed_b + n / NR<Factor> * panel_size + size_t(first_unit) * NR<Factor>;
      const Start<Sum<Factor>> from = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      const Unit<Factor>* a_tile = a.data + m / MR * a.tile + first_unit * a.column;
      Sum<Factor>* to = c + m * ldc + n;
      if (a.row != 1)
        edge_tile<MR, Factor, A::in_place>(rows, columns, to, ldc, from, a_tile, a.row, panel, n_units);
      else
        edge_tile<MR, Factor, copy>(rows, columns, to, ldc, from, a_tile, 1, panel, n_units);
    }
  }
}

// A block of b (K, N), panel after panel, by the threads of the team that calls it.
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

// How c (M, N) is divided: into tasks of MC rows; where these are few, by columns as well, in whole panels, so that every
// thread has several and none waits long for the last.
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

// What happens to a product's elements [first, first + count), in its memory, while they are still in the cache.
struct Nothing {
  void operator()(size_t, size_t) const {}
};

// All of b as `multiply` wants it, block after block of k, by all threads: for a b that is used again and again.
template <class Factor>
void pack_blocks(Unit<Factor>* packed, const View<Sum<Factor>>& b, int K, int N) {
  constexpr int block = KC * Factors<Factor>::terms;
#pragma omp parallel if (size_t(K) * N > worth_threads)
  for (int k0 = 0; k0 < K; k0 += block)
    pack_block<Factor>(packed + packed_size<Factor>(k0, N), {b.data + k0 * b.row, b.row, b.column},
                       std::min(block, K - k0), N);
}

// c (M, N) = start + a (M, K) @ b (K, N), by all threads; then after(first, count) for every element of c, once.
// sums (M) += a's rows added up, for an a by columns; none wanted: nullptr. packed: b by pack_blocks, or nullptr.
template <class Factor, class After = Nothing>
void multiply(Sum<Factor>* c, const Start<Sum<Factor>>& start, const View<Sum<Factor>>& a, const View<Sum<Factor>>& b,
              int M, int N, int K, const After& after = {}, Sum<Factor>* sums = nullptr,
              const Unit<Factor>* packed = nullptr) {
  struct MemoryA;
  struct MemoryB;
  const bool tiles = tiles_taken<Factor>();
  const int block = (a.row == 1 && !tiles ? KC_COLUMNS : KC) * Factors<Factor>::terms;
  Unit<Factor>* own = packed ? nullptr : scratch<MemoryB, Unit<Factor>>(packed_size<Factor>(std::min(K, block), N));
  const int MC = tiles ? 64 : task_rows(a.row == 1);
  const Tasks tasks(M, N, MC, NR<Factor>);
#pragma omp parallel if (size_t(M) * N * K > 8 * worth_threads)
  for (int k0 = 0; k0 < K; k0 += block) {
    [[maybe_unused]] const Registers<Factor> registers{};
    const int kc = std::min(block, K - k0);
    const size_t panel_size = packed_size<Factor>(kc, NR<Factor>);
    const Unit<Factor>* packed_b = packed ? packed + packed_size<Factor>(k0, N) : own;
    if (own) pack_block<Factor>(own, {b.data + k0 * b.row, b.row, b.column}, kc, N);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks.count; task++) {
      const int m = tasks.row(task), n = tasks.column(task);
      const int rows = std::min(MC, M - m), columns = std::min(tasks.columns, N - n);
      Unit<Factor>* memory = scratch<MemoryA, Unit<Factor>>(packed_a_size<Factor>(MC, block));
      const PackedA<Factor> packed_a = pack_a<Factor>(memory, {a.data + m * a.row + k0 * a.column, a.row, a.column},
                                                      rows, kc, sums && n == 0 ? sums + m : nullptr);
      const Start<Sum<Factor>> first = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      Sum<Factor>* target = c + size_t(m) * N + n;
      multiply_packed<Factor, A::packed_ahead>(target, N, k0 == 0 ? first : Start<Sum<Factor>>{target, size_t(N)},
                                               packed_a, packed_b + panel_size * (n / NR<Factor>), panel_size, rows,
                                               columns, kc);
      if (k0 + kc < K) continue;
      if (columns == N)
        after(size_t(m) * N, size_t(rows) * N);
      else
        for (int i = m; i < m + rows; i++) after(size_t(i) * N + n, columns);
    }
  }
}

// c (M, N) += a (M, K) @ b (K, N), for an `a` by columns that is no larger than b, M <= N: all of a is copied once, by all
// threads, and a task is some columns of b. sums as in `multiply`.
template <class Factor>
void multiply_by_columns(Sum<Factor>* c, const View<Sum<Factor>>& a, const View<Sum<Factor>>& b, int M, int N, int K,
                         Sum<Factor>* sums) {
  if (tiles_taken<Factor>()) return multiply<Factor>(c, {c, size_t(N)}, a, b, M, N, K, Nothing{}, sums);
  struct MemoryA;
  struct MemoryB;
  constexpr int block = KC * Factors<Factor>::terms, MC = task_rows(true);
  const int panels = (N + NR<Factor> - 1) / NR<Factor>, longest = std::min(K, block);
  const int NC =
      std::clamp(panels / (2 * omp_get_max_threads()), 1, 3) * NR<Factor>;  // two tasks a thread, if it can be
  Unit<Factor>* all_a = scratch<MemoryA, Unit<Factor>>(packed_a_size<Factor>(M, longest));
#pragma omp parallel if (size_t(M) * N * K > 8 * worth_threads)
  for (int k0 = 0; k0 < K; k0 += block) {
    const int kc = std::min(block, K - k0);
    const size_t row = units<Factor>(kc), panel_size = packed_size<Factor>(kc, NR<Factor>);
#pragma omp for schedule(static)
    for (int m = 0; m < M; m += MC)
      pack_a<Factor>(all_a + m * row, {a.data + m * a.row + k0 * a.column, a.row, a.column}, std::min(MC, M - m), kc,
                     sums ? sums + m : nullptr);
#pragma omp for schedule(dynamic)
    for (int n = 0; n < N; n += NC) {
      const int columns = std::min(NC, N - n);
      Unit<Factor>* packed_b = scratch<MemoryB, Unit<Factor>>(packed_size<Factor>(longest, NC));
      pack_b<Factor>(packed_b, {b.data + k0 * b.row + n * b.column, b.row, b.column}, kc, columns);
      for (int m = 0; m < M; m += MR) {  // these rows of a stay in L1 or L2 while the panels go past them
        const PackedA<Factor> packed_a = {all_a + m * row, 1, MR, MR * row};
        Sum<Factor>* target = c + size_t(m) * N + n;
        multiply_packed<Factor, A::packed_ahead>(target, N, {target, size_t(N)}, packed_a, packed_b, panel_size,
                                                 std::min(MR, M - m), columns, kc);
      }
    }
  }
}

}  // namespace product

// A weight (OC, C), and where it lies ready for products of few rows, which otherwise spend their time on packing it.
template <class Real, class Factor = Real>
struct Weight {
  const Real* data;
  const Unit<Factor>* packed = nullptr;  // product::packed_size<Factor>(C, OC), by pack_weight
  Weight(const Real* weight, const Unit<Factor>* packed_weight = nullptr) : data(weight), packed(packed_weight) {}
};
template <class Real, class Factor = Real>
void pack_weight(Unit<Factor>* packed, const Real* weight, int C, int OC) {
  product::pack_blocks<Factor>(packed, {weight, 1, size_t(C)}, C, OC);
}

// out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC); no bias: nullptr. Then after(first, count) for the
// elements of out, block by block.
template <class Real, class Factor = Real, class After = product::Nothing>
void matmul_forward(Real* out, const Real* inp, const std::type_identity_t<Weight<Real, Factor>>& weight,
                    const Real* bias, int rows, int C, int OC, const After& after = {}) {
  product::multiply<Factor>(out, {bias, 0}, {inp, size_t(C), 1}, {weight.data, 1, size_t(C)}, rows, OC, C, after,
                            nullptr, weight.packed);
}

// dinp (rows, C) = dout (rows, OC) @ weight (OC, C), then after(first, count) for its elements
template <class Real, class Factor = Real, class After = product::Nothing>
void matmul_backward_input(Real* dinp, const Real* dout, const Real* weight, int rows, int C, int OC,
                           const After& after = {}) {
  product::multiply<Factor>(dinp, {}, {dout, size_t(OC), 1}, {weight, size_t(C), 1}, rows, C, OC, after);
}

// dweight (OC, C) += dout (rows, OC)^T @ inp (rows, C);  dbias (OC) += column sums of dout, unless it is nullptr
template <class Real, class Factor = Real>
void matmul_backward_weight(Real* dweight, Real* dbias, const Real* dout, const Real* inp, int rows, int C, int OC) {
  const size_t row = size_t(C);
  const product::View<Real> douts = {dout, 1, size_t(OC)}, inps = {inp, row, 1};
  if (C < OC)
    product::multiply<Factor>(dweight, {dweight, row}, douts, inps, OC, C, rows, product::Nothing{}, dbias);
  else
    product::multiply_by_columns<Factor>(dweight, douts, inps, OC, C, rows, dbias);
}

// Both: dinp =, dweight +=, dbias +=.
template <class Real, class Factor = Real, class After = product::Nothing>
void matmul_backward(Real* dinp, Real* dweight, Real* dbias, const Real* dout, const Real* inp, const Real* weight,
                     int rows, int C, int OC, const After& after = {}) {
  matmul_backward_input<Real, Factor>(dinp, dout, weight, rows, C, OC, after);
  matmul_backward_weight<Real, Factor>(dweight, dbias, dout, inp, rows, C, OC);
}
