// Muon, for the matrices inside the layers. AdamW divides each element of an update by that element's own size; Muon looks
// at the matrix as a whole and makes all its singular values about 1. A few directions dominate a gradient; the many others,
// in which it is small, matter as well, and here they get an equal share of the step.
//   Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024: momentum, and the iteration below;
//   Liu et al., "Muon is Scalable for LLM Training", 2025, equation 4: the scale, with which Muon takes AdamW's learning
//   rate and weight decay.
// defines: Muon, MuonMatrix, muon_matrices, muon_momentum, orthogonalize, muon_update, reference::orthogonalize
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "../host/tensors.h"
#include "../host/tree.h"
#include "muon_law.h"
#include "product.h"

struct Muon {
  double learning_rate, weight_decay;
  double gradient_scale;  // what every gradient is multiplied by, for clipping; 1 if nothing is clipped
};

// A matrix that Muon updates: where its elements lie in a buffer of this layout.
struct MuonMatrix {
  Part elements;
  int rows, columns;
};
// All of them, in order. NH: heads of a layer, each of which has three.
inline std::vector<MuonMatrix> muon_matrices(const Layout& layout, int NH) {
  std::vector<MuonMatrix> matrices;
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0, parts = hidden_matrices(spec, NH); l < spec.layers; l++)
      for (int i = 0; i < parts; i++) {
        const size_t count = spec.slice / size_t(parts);
        matrices.push_back({{spec.offset + size_t(l) * spec.stride + size_t(i) * count, count},
                            int(spec.shape[0]) / parts,
                            int(spec.shape[1])});
      }
  return matrices;
}

// With g = grads (count) * gradient_scale:  m (count) = beta m + (1 - beta) g, the gradients' running mean;  then
// grads = beta m + (1 - beta) g with the new m, Nesterov's momentum, which orthogonalize gets.
template <class Real>
void muon_momentum(Real* grads, Real* m, size_t count, const Muon& o) {
  const Real beta = Real(muon_beta), rest = Real(1 - muon_beta), scale = Real(o.gradient_scale);
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) {
    const Real g = grads[i] * scale;
    m[i] = beta * m[i] + rest * g;
    grads[i] = beta * m[i] + rest * g;
  }
}

// x (count), a matrix, is divided by its norm, so that no singular value is larger than 1.
template <class Real>
void muon_normalize(Real* x, size_t count) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (size_t i = 0; i < count; i++) squares += double(x[i]) * double(x[i]);
  const Real factor = Real(1 / (std::sqrt(squares) + 1e-7));
  for (size_t i = 0; i < count; i++) x[i] *= factor;
}

namespace reference {

// What orthogonalize, below, computes, by plain loops: x = a x + b (x x^T) x + c (x x^T)^2 x, five times.
template <class Real>
void orthogonalize(Real* x, int rows, int columns) {
  muon_normalize(x, size_t(rows) * columns);
  std::vector<Real> gram(size_t(rows) * rows), next(size_t(rows) * columns);
  const auto times_gram = [&](const std::vector<Real>& y, int r, int c) {
    Real sum = 0;
    for (int k = 0; k < rows; k++) sum += gram[size_t(r) * rows + k] * y[size_t(k) * columns + c];
    return sum;
  };
  for (int round = 0; round < muon_rounds; round++) {
    for (int r = 0; r < rows; r++)
      for (int s = 0; s < rows; s++) {
        gram[size_t(r) * rows + s] = 0;
        for (int c = 0; c < columns; c++) gram[size_t(r) * rows + s] += x[r * columns + c] * x[s * columns + c];
      }
    const std::vector<Real> once(x, x + next.size());
    std::vector<Real> cubed(next.size());
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns; c++) cubed[size_t(r) * columns + c] = times_gram(once, r, c);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns; c++) {
        const size_t i = size_t(r) * columns + c;
        x[i] = Real(muon_a) * once[i] + Real(muon_b) * cubed[i] + Real(muon_c) * times_gram(cubed, r, c);
      }
  }
}

}  // namespace reference

// x (rows, columns) = u v^T, nearly, where x was u s v^T with the singular values s. The iteration is Newton and Schulz's
// with the coefficients in muon_law.h, by products with a square matrix of the smaller side n of x:
//   A (n, n) = x x^T or, if x has more rows than columns, x^T x
//   B (n, n) = a 1 + b A + c A A
//   x = B x or x B
// Inside a parallel loop over matrices a call works with one thread, alone it takes all of them.
template <class Factor, class Real>
void orthogonalize(Real* x, int rows, int columns) {
  struct MemoryA;  // tags for scratch(), see simd.h
  struct MemoryB;
  struct MemoryX;
  const bool tall = rows > columns;
  const size_t n = size_t(std::min(rows, columns)), row = size_t(columns), count = size_t(rows) * row;
  Real *const A = scratch<MemoryA, Real>(n * n), *const B = scratch<MemoryB, Real>(n * n);
  Real* const next = scratch<MemoryX, Real>(count);
  muon_normalize(x, count);
  const product::View<Real> by_rows = {x, row, 1}, transposed = {x, 1, row};
  for (int round = 0; round < muon_rounds; round++) {
    if (tall)
      product::multiply_symmetric<Factor>(A, transposed, by_rows, int(n), rows);
    else
      product::multiply_symmetric<Factor>(A, by_rows, transposed, int(n), columns);
    product::multiply_symmetric<Factor>(B, {A, n, 1}, {A, n, 1}, int(n), int(n));
    for (size_t i = 0; i < n * n; i++) B[i] = Real(muon_b) * A[i] + Real(muon_c) * B[i];
    for (size_t i = 0; i < n; i++) B[i * n + i] += Real(muon_a);
    if (tall)
      product::multiply<Factor>(next, {}, by_rows, {B, n, 1}, rows, columns, int(n));
    else
      product::multiply<Factor>(next, {}, {B, n, 1}, by_rows, rows, columns, int(n));
    std::copy_n(next, count, x);
  }
}

// Updates elements of a matrix (rows, columns): params (count) by x (count), which orthogonalize has left.
template <class Real>
void muon_update(Real* params, const Real* x, size_t count, int rows, int columns, const Muon& o) {
  const Real decay = Real(1 - o.learning_rate * o.weight_decay);
  const Real step_size = Real(o.learning_rate * muon_size * std::sqrt(double(std::max(rows, columns))));
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) params[i] = params[i] * decay - step_size * x[i];
}
