// Linear layer: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), and its gradients.
// Nine tenths of a training step are these three products. The plain loops that say what is computed stand first; the
// layer itself calls the blocked product of product.h, which doc/cpu-matmul.md explains with a picture.
// defines: Weight, pack_weight, matmul_forward, matmul_backward_input, matmul_backward_weight, matmul_backward, their
// reference:: loops
#pragma once
#include <cstddef>
#include <type_traits>

#include "product.h"

namespace reference {

// out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), which may be nullptr
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

// A weight (OC, C) and, if you have made one with pack_weight, its packed copy. A product of few rows spends most of
// its time on packing the weight, so sampling packs each weight once and uses the copy for all tokens.
template <class Real, class Factor = Real>
struct Weight {
  const Real* data;
  const Unit<Factor>* packed = nullptr;  // product::packed_size<Factor>(C, OC) units
  Weight(const Real* weight, const Unit<Factor>* packed_weight = nullptr) : data(weight), packed(packed_weight) {}
};
// packed (product::packed_size<Factor>(C, OC) units) = weight (OC, C), as matmul_forward wants it
template <class Real, class Factor = Real>
void pack_weight(Unit<Factor>* packed, const Real* weight, int C, int OC) {
  product::pack_blocks<Factor>(packed, {weight, 1, size_t(C)}, C, OC);
}

// out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), which may be nullptr. Then calls after(first, count),
// block by block, until every element of out has been passed once: ReLU, or dropout and the residual sum.
template <class Real, class Factor = Real, class After = product::Nothing>
void matmul_forward(Real* out, const Real* inp, const std::type_identity_t<Weight<Real, Factor>>& weight,
                    const Real* bias, int rows, int C, int OC, const After& after = {}) {
  product::multiply<Factor>(out, {bias, 0}, {inp, size_t(C), 1}, {weight.data, 1, size_t(C)}, rows, OC, C, after,
                            nullptr, weight.packed);
}

// dinp (rows, C) = dout (rows, OC) @ weight (OC, C), then after(first, count) for its elements, as in matmul_forward
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

// Both: dinp (rows, C) =, dweight (OC, C) +=, dbias (OC) +=.
template <class Real, class Factor = Real, class After = product::Nothing>
void matmul_backward(Real* dinp, Real* dweight, Real* dbias, const Real* dout, const Real* inp, const Real* weight,
                     int rows, int C, int OC, const After& after = {}) {
  matmul_backward_input<Real, Factor>(dinp, dout, weight, rows, C, OC, after);
  matmul_backward_weight<Real, Factor>(dweight, dbias, dout, inp, rows, C, OC);
}
