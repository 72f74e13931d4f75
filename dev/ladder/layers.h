// The layers that only the ladder's rungs have; all others are the trainer's, in kernels/. As there, arguments are
// outputs, inputs, then sizes; activations' gradients are written (=), parameters' gradients are added (+=).
// defines: lookup_forward, lookup_backward, tanh_forward, tanh_backward, sigmoid_vec, tanh_vec, matmul_add,
//          matmul_add_backward, batchnorm_forward, batchnorm_backward
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../../kernels/matmul.h"
#include "../../kernels/simd.h"

// All threads call body(first, last), each on pieces of [0, count). Results do not depend on where we cut.
template <class Body>
void in_pieces(size_t count, size_t piece, Body body) {
#pragma omp parallel for schedule(static) if (count > worth_threads)
  for (size_t i = 0; i < count; i += piece) body(i, std::min(count, i + piece));
}

// x (count) = f(x), a vector at a time.
template <class Real, class F>
void apply_vec(Real* x, size_t count, F f) {
  constexpr size_t W = lanes<Real>;
  size_t i = 0;
  for (; i + W <= count; i += W) store(x + i, f(load(x + i)));
  if (i == count) return;
  Real rest[W] = {};
  std::copy(x + i, x + count, rest);
  store(rest, f(load(rest)));
  std::copy(rest, rest + (count - i), x + i);
}

template <class V>
V sigmoid_vec(const V& x) {
  return 1 / (1 + exp_vec(-x));
}
template <class V>
V tanh_vec(const V& x) {
  return 1 - 2 / (1 + exp_vec(x + x));  // within 1e-7 of the true value in float
}

// ---------------------------------------------------------------------------------------------------------------------
// out (rows, C) = wte (V, C) [x (rows)]: an embedding without positions.

template <class Real>
void lookup_forward(Real* out, const int* x, const Real* wte, int rows, int C) {
  for (int r = 0; r < rows; r++) std::copy_n(wte + size_t(x[r]) * C, C, out + size_t(r) * C);
}

// dwte (V, C) += dout (rows, C)
template <class Real>
void lookup_backward(Real* dwte, const Real* dout, const int* x, int rows, int C) {
  for (int r = 0; r < rows; r++) {
    Real* token = dwte + size_t(x[r]) * C;
    for (int c = 0; c < C; c++) token[c] += dout[size_t(r) * C + c];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// x (count) = tanh(x), in place; and dx (count) = dx * (1 - out^2).

template <class Real>
void tanh_forward(Real* x, size_t count) {
  in_pieces(count, 4096, [=](size_t first, size_t last) {
    apply_vec(x + first, last - first, [](const Vec<Real>& v) { return tanh_vec(v); });
  });
}

template <class Real>
void tanh_backward(Real* dx, const Real* out, size_t count) {
  in_pieces(count, 4096, [=](size_t first, size_t last) {
    for (size_t i = first; i < last; i++) dx[i] *= 1 - out[i] * out[i];
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Products that add to their output, for branches that end in one sum.

// out (rows, OC) += inp (rows, C) @ weight (OC, C)^T
template <class Real>
void matmul_add(Real* out, const Real* inp, const Real* weight, int rows, int C, int OC) {
  product::multiply<Real>(out, {out, size_t(OC)}, {inp, size_t(C), 1}, {weight, 1, size_t(C)}, rows, OC, C);
}

// dinp (rows, C) += dout (rows, OC) @ weight (OC, C);  dweight (OC, C) += dout^T @ inp
template <class Real>
void matmul_add_backward(Real* dinp, Real* dweight, const Real* dout, const Real* inp, const Real* weight, int rows,
                         int C, int OC) {
  const size_t row = size_t(C);
  product::multiply<Real>(dinp, {dinp, row}, {dout, size_t(OC), 1}, {weight, row, 1}, rows, C, OC);
  product::multiply<Real>(dweight, {dweight, row}, {dout, 1, size_t(OC)}, {inp, row, 1}, OC, C, rows);
}

// ---------------------------------------------------------------------------------------------------------------------
// Batch normalisation: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1. Every channel of a batch gets mean
// 0 and variance 1, then a scale and an offset of its own. Evaluation takes the averages of the means and variances
// that training has seen, and has no backward.

constexpr double batchnorm_eps = 1e-5, batchnorm_momentum = 0.01;

// All threads call body(c0, c1), each on strips of channels, so that one thread makes each sum over rows.
template <class Body>
void in_strips(int rows, int C, Body body) {
  constexpr int strip = 64;
#pragma omp parallel for schedule(static) if (size_t(rows) * C > worth_threads)
  for (int c = 0; c < C; c += strip) body(c, std::min(C, c + strip));
}

// out (rows, C) =, mean (C) =, rstd (C) = from inp (rows, C), gain (C), bias (C). Training moves running_mean (C) and
// running_var (C) a little towards the batch's; evaluation normalises with them.
template <class Real>
void batchnorm_forward(Real* out, Real* mean, Real* rstd, Real* running_mean, Real* running_var, const Real* inp,
                       const Real* gain, const Real* bias, int rows, int C, bool training) {
  in_strips(rows, C, [=](int c0, int c1) {
    if (training) {
      std::fill(mean + c0, mean + c1, Real(0));
      std::fill(rstd + c0, rstd + c1, Real(0));
      for (int r = 0; r < rows; r++)
        for (int c = c0; c < c1; c++) mean[c] += inp[size_t(r) * C + c];
      for (int c = c0; c < c1; c++) mean[c] /= Real(rows);
      for (int r = 0; r < rows; r++)
        for (int c = c0; c < c1; c++) {
          const Real d = inp[size_t(r) * C + c] - mean[c];
          rstd[c] += d * d;
        }
      for (int c = c0; c < c1; c++) {
        const Real var = rstd[c] / Real(rows), keep = Real(1 - batchnorm_momentum);
        running_mean[c] = keep * running_mean[c] + (1 - keep) * mean[c];
        running_var[c] = keep * running_var[c] + (1 - keep) * var;
        rstd[c] = 1 / std::sqrt(var + Real(batchnorm_eps));
      }
    } else {
      for (int c = c0; c < c1; c++) {
        mean[c] = running_mean[c];
        rstd[c] = 1 / std::sqrt(running_var[c] + Real(batchnorm_eps));
      }
    }
    for (int r = 0; r < rows; r++)
      for (int c = c0; c < c1; c++) {
        const size_t i = size_t(r) * C + c;
        out[i] = (inp[i] - mean[c]) * rstd[c] * gain[c] + bias[c];
      }
  });
}

// dinp (rows, C) =, dgain (C) +=, dbias (C) +=; dout (rows, C), after a forward in training. As in a layernorm, but
// with the sums over the rows of a channel: with n = (inp - mean) * rstd,
//   dinp = (dout - mean(dout) - n * mean(dout * n)) * rstd * gain
template <class Real>
void batchnorm_backward(Real* dinp, Real* dgain, Real* dbias, const Real* dout, const Real* inp, const Real* mean,
                        const Real* rstd, const Real* gain, int rows, int C) {
  in_strips(rows, C, [=](int c0, int c1) {
    struct Sums;
    Real *sum = scratch<Sums, Real>(2 * size_t(C)), *sum_n = sum + C;
    std::fill(sum, sum + 2 * C, Real(0));
    for (int r = 0; r < rows; r++)
      for (int c = c0; c < c1; c++) {
        const size_t i = size_t(r) * C + c;
        sum[c] += dout[i];
        sum_n[c] += dout[i] * (inp[i] - mean[c]) * rstd[c];
      }
    for (int c = c0; c < c1; c++) {
      dbias[c] += sum[c];
      dgain[c] += sum_n[c];
    }
    for (int r = 0; r < rows; r++)
      for (int c = c0; c < c1; c++) {
        const size_t i = size_t(r) * C + c;
        const Real n = (inp[i] - mean[c]) * rstd[c];
        dinp[i] = (dout[i] - sum[c] / Real(rows) - n * sum_n[c] / Real(rows)) * rstd[c] * gain[c];
      }
  });
}
