// Residual connection around a branch that ends in dropout: out = inp + dropout(branch).
// He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, equation 1.
// defines: residual_forward, add_residual, residual_backward
#pragma once
#include "dropout.h"

namespace residual {
constexpr size_t piece = 64 * draws_at_once;  // elements that a thread takes at a time

// out (B, T, C) = base + dropout(inp), by all threads; base may be null (0)
template <class Real>
void apply(Real* out, const Real* base, const Real* inp, const Dropout& drop, int B, int T, int C) {
  const size_t count = size_t(B) * T * C, first = size_t(drop.first_row) * T * C;
#pragma omp parallel for schedule(static) if (count > worth_threads)
  for (size_t i = 0; i < count; i += piece)
    dropout_apply(out + i, base ? base + i : nullptr, inp + i, drop, first + i, std::min(piece, count - i));
}
}  // namespace residual

// out (B, T, C) = inp (B, T, C) + dropout(branch (B, T, C))
template <class Real>
void residual_forward(Real* out, const Real* inp, const Real* branch, const Dropout& drop, int B, int T, int C) {
  residual::apply(out, inp, branch, drop, B, T, C);
}

// The same as a product's `after`: the product has written the branch to out (B, T, C), and out becomes inp +
// dropout(out).
template <class Real>
auto add_residual(Real* out, const Real* inp, const Dropout& drop, int T, int C) {
  return [=](size_t first, size_t count) {
    dropout_apply(out + first, inp + first, out + first, drop, size_t(drop.first_row) * T * C + first, count);
  };
}

// dbranch (B, T, C) = dropout(dout (B, T, C)), with forward's mask. The gradient of inp is dout itself and stays where
// it is.
template <class Real>
void residual_backward(Real* dbranch, const Real* dout, const Dropout& drop, int B, int T, int C) {
  residual::apply<Real>(dbranch, nullptr, dout, drop, B, T, C);
}
