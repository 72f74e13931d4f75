// Linear layer: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), and its gradients.
// Nine tenths of a training step are these three products, so they are blocked for registers and caches; the plain
// loops that say what is computed stand first.
// defines: matmul_forward, matmul_backward, their reference:: loops, and product::, which attention uses as well
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstring>

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
//   for each block of KC of the K terms:
//     b's block is copied into panels of NR columns, so that the innermost loop reads it contiguously       (pack_b)
//     for each task of MC rows by NC columns, in parallel; for each panel; for each MR rows:
//       MR x NR sums stay in registers while k runs: per k, NR/lanes vectors of b are loaded and MR numbers
//       of a broadcast, for MR * NR/lanes fused multiply-adds                                                  (tile)
//
// Every element of c is one chain of multiply-adds over k = 0, 1, ..., K-1. Which tile, task or thread it falls to does
// not enter, so the result is bit-identical for any number of threads, and a row of it for any number of other rows.

namespace product {

// The register block. 32 vector registers hold 12 x 2 sums, 2 vectors of b and a broadcast; 16 hold half as many.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
template <class Real>
constexpr int NR = lanes<Real>* NV;

constexpr int KC = 384;  // a panel of KC x NR floats is 48 KB, a tile of a 18 KB: they stream from the L2 cache
template <class Real>
constexpr size_t A_STRIDE = KC + lanes<Real>;
constexpr int MC = 8 * MR;  // rows of a task
constexpr int PANELS = 4;   // panels of a task

// A matrix by its strides: element (i, j) is data[i * row + j * column].
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

template <class Real>
size_t packed_size(int K, int N) {
  return size_t(K) * ((N + NR<Real> - 1) / NR<Real>)*NR<Real>;
}

// panel (K, NR) = columns [n, n + NR) of b (K, N), filled up with zeros: what is computed with them is thrown away, but
// numbers that happened to lie there could be denormal, and slow
template <class Real>
void pack_panel(Real* panel, const View<Real>& b, int K, int n, int N) {
  const int columns = std::min(NR<Real>, N - n);
  if (columns < NR<Real>) std::memset(panel, 0, size_t(K) * NR<Real> * sizeof(Real));
  if (b.column == 1) {
    for (int k = 0; k < K; k++)
      std::memcpy(panel + size_t(k) * NR<Real>, b.data + k * b.row + n, columns * sizeof(Real));
  } else {
    for (int j = 0; j < columns; j++) {
      const Real* from = b.data + (n + j) * b.column;
      for (int k = 0; k < K; k++) panel[size_t(k) * NR<Real> + j] = from[k * b.row];
    }
  }
}

// All of b, for those who work alone: panel after panel, each K * NR.
template <class Real>
void pack_b(Real* packed, const View<Real>& b, int K, int N) {
  for (int n = 0; n < N; n += NR<Real>) pack_panel(packed + size_t(K) * n, b, K, n, N);
}

// c (ROWS, NR) = start + a (ROWS, K) @ panel (K, NR); a's element (i, k) is a[i * a_row + k * a_column]
template <int ROWS, class Real>
inline void tile(Real* c, size_t ldc, const Start<Real>& start, const Real* a, size_t a_row, size_t a_column,
                 const Real* panel, int K) {
  constexpr int W = lanes<Real>;
  Vec<Real> sum[ROWS][NV];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = start.data ? load(start.data + i * start.row + j * W) : Vec<Real>{};
  for (int k = 0; k < K; k++) {
    Vec<Real> b[NV];
    for (int j = 0; j < NV; j++) b[j] = load(panel + j * W);
    for (int i = 0; i < ROWS; i++) {
      const Real x = a[i * a_row];
      for (int j = 0; j < NV; j++) sum[i][j] += x * b[j];
    }
    a += a_column;
    panel += NR<Real>;
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < NV; j++) store(c + i * ldc + j * W, sum[i][j]);
}

// The same for any number of rows up to ROWS, and for the last columns of a matrix.
template <int ROWS, class Real>
void edge_tile(int rows, int columns, Real* c, size_t ldc, const Start<Real>& start, const Real* a, size_t a_row,
               size_t a_column, const Real* panel, int K) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return edge_tile<ROWS - 1>(rows, columns, c, ldc, start, a, a_row, a_column, panel, K);
  if (columns == NR<Real>) return tile<ROWS>(c, ldc, start, a, a_row, a_column, panel, K);
  Real padded[ROWS * NR<Real>] = {};
  if (start.data)
    for (int i = 0; i < ROWS; i++)
      std::memcpy(padded + i * NR<Real>, start.data + i * start.row, columns * sizeof(Real));
  tile<ROWS, Real>(padded, NR<Real>, {padded, NR<Real>}, a, a_row, a_column, panel, K);
  for (int i = 0; i < ROWS; i++) std::memcpy(c + i * ldc, padded + i * NR<Real>, columns * sizeof(Real));
}

// c (M, N) = start + a (M, K) @ b, with b packed in panels `panel_size` elements apart; one thread
template <class Real>
void multiply_packed(Real* c, size_t ldc, const Start<Real>& start, const View<Real>& a, const Real* packed,
                     size_t panel_size, int M, int N, int K) {
  for (int n = 0; n < N; n += NR<Real>) {
    const int columns = std::min(NR<Real>, N - n);
    for (int m = 0; m < M; m += MR) {
      const int rows = std::min(MR, M - m);
      const Start<Real> from = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      const Real *a_tile = a.data + m * a.row, *panel = packed + n / NR<Real> * panel_size;
      if (a.column == 1)  // said twice, so that the compiler sees the constant stride
        edge_tile<MR>(rows, columns, c + m * ldc + n, ldc, from, a_tile, a.row, 1, panel, K);
      else
        edge_tile<MR>(rows, columns, c + m * ldc + n, ldc, from, a_tile, a.row, a.column, panel, K);
    }
  }
}

// c (M, N) = start + a (M, K) @ b (K, N), by all threads
template <class Real>
void multiply(Real* c, const Start<Real>& start, const View<Real>& a, const View<Real>& b, int M, int N, int K) {
  struct PackedA;
  struct PackedB;
  Real* packed_b = scratch<PackedB, Real>(packed_size<Real>(std::min(K, KC), N));
  const int panels = (N + NR<Real> - 1) / NR<Real>, NC = PANELS * NR<Real>;
  const int row_tasks = (M + MC - 1) / MC, tasks = row_tasks * ((N + NC - 1) / NC);
#pragma omp parallel if (size_t(M) * N * K > 8 * worth_threads)
  for (int k0 = 0; k0 < K; k0 += KC) {
    const int kc = std::min(KC, K - k0);
#pragma omp for schedule(static)
    for (int p = 0; p < panels; p++)
      pack_panel(packed_b + size_t(kc) * p * NR<Real>, {b.data + k0 * b.row, b.row, b.column}, kc, p * NR<Real>, N);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
      const int m = task % row_tasks * MC, n = task / row_tasks * NC;
      const int rows = std::min(MC, M - m), columns = std::min(NC, N - n);
      const View<Real> from = {a.data + m * a.row + k0 * a.column, a.row, a.column};
      Real* packed_a = scratch<PackedA, Real>(size_t(MC) * A_STRIDE<Real>);
      const bool by_rows = a.column == 1;
      if (by_rows)
        for (int i = 0; i < rows; i++)
          std::memcpy(packed_a + i * A_STRIDE<Real>, from.data + i * from.row, kc * sizeof(Real));
      else
        for (int k = 0; k < kc; k++) std::memcpy(packed_a + k * MC, from.data + k * from.column, rows * sizeof(Real));
      const View<Real> block = by_rows ? View<Real>{packed_a, A_STRIDE<Real>, 1} : View<Real>{packed_a, 1, MC};
      const Start<Real> first = {start.data ? start.data + m * start.row + n : nullptr, start.row};
      Real* target = c + size_t(m) * N + n;
      multiply_packed(target, N, k0 == 0 ? first : Start<Real>{target, size_t(N)}, block, packed_b + size_t(kc) * n,
                      size_t(kc) * NR<Real>, rows, columns, kc);
    }
  }
}

}  // namespace product

// out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC); no bias: nullptr
template <class Real>
void matmul_forward(Real* out, const Real* inp, const Real* weight, const Real* bias, int rows, int C, int OC) {
  product::multiply<Real>(out, {bias, 0}, {inp, size_t(C), 1}, {weight, 1, size_t(C)}, rows, OC, C);
}

// dinp (rows, C) = dout (rows, OC) @ weight (OC, C);  dweight (OC, C) += dout^T @ inp;  dbias (OC) += column sums of
// dout. No gradient wanted of the input: dinp = nullptr; no bias: dbias = nullptr.
template <class Real>
void matmul_backward(Real* dinp, Real* dweight, Real* dbias, const Real* dout, const Real* inp, const Real* weight,
                     int rows, int C, int OC) {
  if (dinp) product::multiply<Real>(dinp, {}, {dout, size_t(OC), 1}, {weight, size_t(C), 1}, rows, C, OC);
  product::multiply<Real>(dweight, {dweight, size_t(C)}, {dout, 1, size_t(OC)}, {inp, size_t(C), 1}, OC, C, rows);
  if (dbias) {
    constexpr int strip = 32;  // columns of one task: the sum over rows is never split, so its order is fixed
#pragma omp parallel for schedule(static) if (size_t(rows) * OC > worth_threads)
    for (int o0 = 0; o0 < OC; o0 += strip) {
      const int width = std::min(strip, OC - o0);
      Real sum[strip] = {};
      for (int r = 0; r < rows; r++)
        for (int o = 0; o < width; o++) sum[o] += dout[size_t(r) * OC + o0 + o];
      for (int o = 0; o < width; o++) dbias[o0 + o] += sum[o];
    }
  }
}
