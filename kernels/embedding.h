// Embedding: out (B, T, C) = wte[x] + wpe, the token's vector plus the position's.
// defines: embedding_forward, embedding_backward
#pragma once
#include <algorithm>
#include <cstddef>

#include "simd.h"

// out (B, T, C) = wte[x[b, t]] (V, C) + wpe[t] (T, C)
template <class Real>
void embedding_forward(Real* out, const int* x, const Real* wte, const Real* wpe, int B, int T, int C) {
#pragma omp parallel for schedule(static) if (size_t(B) * T * C > worth_threads)
  for (int bt = 0; bt < B * T; bt++) {
    const Real *token = wte + size_t(x[bt]) * C, *position = wpe + size_t(bt % T) * C;
    Real* row = out + size_t(bt) * C;
    for (int c = 0; c < C; c++) row[c] = token[c] + position[c];
  }
}

// dwte (V, C) += rows of dout (B, T, C), each to its token's row;  dwpe (T, C) += dout summed over B
// A thread owns columns, not rows, because many rows add to one token, and their order must not depend on the threads.
template <class Real>
void embedding_backward(Real* dwte, Real* dwpe, const Real* dout, const int* x, int B, int T, int C) {
  constexpr int strip = 32;
#pragma omp parallel for schedule(static) if (size_t(B) * T * C > worth_threads)
  for (int c0 = 0; c0 < C; c0 += strip) {
    const int c1 = std::min(C, c0 + strip);
    for (int bt = 0; bt < B * T; bt++) {
      const Real* row = dout + size_t(bt) * C;
      Real *token = dwte + size_t(x[bt]) * C, *position = dwpe + size_t(bt % T) * C;
      for (int c = c0; c < c1; c++) {
        token[c] += row[c];
        position[c] += row[c];
      }
    }
  }
}
