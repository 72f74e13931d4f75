// Residual connection around a branch that ends in dropout: out = inp + dropout(branch).
// He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, equation 1.
// defines: residual_forward, residual_backward
#pragma once
#include "dropout.h"

// out (B, T, C) = inp (B, T, C) + dropout(branch (B, T, C))
template <class Real>
void residual_forward(Real* out, const Real* inp, const Real* branch, const Dropout& drop, int B, int T, int C) {
  dropout_apply(out, inp, branch, drop, B, T, C);
}

// dbranch (B, T, C) = dropout(dout), with forward's mask. The gradient of inp is dout itself: it stays where it is.
template <class Real>
void residual_backward(Real* dbranch, const Real* dout, const Dropout& drop, int B, int T, int C) {
  dropout_apply<Real>(dbranch, nullptr, dout, drop, B, T, C);
}
