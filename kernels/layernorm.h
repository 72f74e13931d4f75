// Layer normalisation over the channels of each position: Ba, Kiros, Hinton, "Layer Normalization", 2016, equation 4.
//   out = (inp - mean) * rstd * weight + bias,  rstd = 1 / sqrt(variance + 1e-5)
// defines: layernorm_forward, layernorm_backward
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "simd.h"

// out (rows, C) = layernorm of inp (rows, C), mean (rows) = ..., rstd (rows) = ...; weight (C), bias (C)
template <class Real>
void layernorm_forward(Real* out, Real* mean, Real* rstd, const Real* inp, const Real* weight, const Real* bias,
                       int rows, int C) {
#pragma omp parallel for schedule(static) if (size_t(rows) * C > worth_threads)
  for (int r = 0; r < rows; r++) {
    const Real* x = inp + size_t(r) * C;
    Real* y = out + size_t(r) * C;
    Real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c];
    const Real m = sum / C;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);  // not E[x^2] - E[x]^2, which cancels
    const Real s = 1 / std::sqrt(squares / C + Real(1e-5));
    for (int c = 0; c < C; c++) y[c] = (x[c] - m) * s * weight[c] + bias[c];
    mean[r] = m;
    rstd[r] = s;
  }
}

// dinp (rows, C) +=, dweight (C) +=, dbias (C) +=; dout (rows, C), inp (rows, C), mean (rows), rstd (rows), weight (C)
// dinp is += because a layernorm reads the residual stream, whose gradient also flows past it.
//   With n = (inp - mean) * rstd and g = dout * weight:  dinp += (g - mean(g) - n * mean(g * n)) * rstd
template <class Real>
void layernorm_backward(Real* dinp, Real* dweight, Real* dbias, const Real* dout, const Real* inp, const Real* mean,
                        const Real* rstd, const Real* weight, int rows, int C) {
  // Each chunk of rows adds up its own partials of dweight and dbias, which are then added in order. The chunks depend
  // only on the number of rows, so the sums do not depend on the threads.
  constexpr int chunk = 64;
  struct Partials;
  const int chunks = (rows + chunk - 1) / chunk;
  Real* partials = scratch<Partials, Real>(size_t(chunks) * 2 * C);  // (chunks, 2, C)
#pragma omp parallel if (size_t(rows) * C > worth_threads)
  {
#pragma omp for schedule(static)
    for (int k = 0; k < chunks; k++) {
      Real *dw = partials + size_t(k) * 2 * C, *db = dw + C;
      std::fill(dw, db + C, Real(0));
      for (int r = k * chunk; r < std::min(rows, (k + 1) * chunk); r++) {
        const Real *x = inp + size_t(r) * C, *dy = dout + size_t(r) * C;
        Real* dx = dinp + size_t(r) * C;
        const Real m = mean[r], s = rstd[r];
        Real sum_g = 0, sum_gn = 0;
#pragma omp simd reduction(+ : sum_g, sum_gn)
        for (int c = 0; c < C; c++) {
          const Real n = (x[c] - m) * s, g = dy[c] * weight[c];
          sum_g += g;
          sum_gn += g * n;
          dw[c] += dy[c] * n;
          db[c] += dy[c];
        }
        sum_g /= C;
        sum_gn /= C;
        for (int c = 0; c < C; c++) dx[c] += (dy[c] * weight[c] - sum_g - (x[c] - m) * s * sum_gn) * s;
      }
    }
#pragma omp for schedule(static)
    for (int c = 0; c < C; c++)
      for (int k = 0; k < chunks; k++) {
        dweight[c] += partials[size_t(k) * 2 * C + c];
        dbias[c] += partials[size_t(k) * 2 * C + C + c];
      }
  }
}
