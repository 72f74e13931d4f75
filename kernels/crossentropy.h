// Softmax and cross-entropy: loss = log(sum_v exp(logits_v)) - logits_target, in nats.
// defines: crossentropy_forward, crossentropy_backward
#pragma once
#include <cmath>
#include <cstddef>

#include "simd.h"

// losses (rows) = ..., probs (rows, V) = softmax(logits (rows, V)); targets (rows)
// The loops take whole vectors, and the rest of a row one by one. With a vocabulary of 20,000 the library's exp alone
// would take a tenth of a training step.
template <class Real>
void crossentropy_forward(Real* losses, Real* probs, const Real* logits, const int* targets, int rows, int V) {
  constexpr int W = lanes<Real>;
  const int whole = V / W * W;
#pragma omp parallel for schedule(static) if (size_t(rows) * V > worth_threads)
  for (int r = 0; r < rows; r++) {
    const Real* row = logits + size_t(r) * V;
    Real* p = probs + size_t(r) * V;
    Vec<Real> tops = broadcast(row[0]), sums{};
    for (int v = 0; v < whole; v += W) {
      const Vec<Real> x = load(row + v);
      tops = x > tops ? x : tops;
    }
    Real max = horizontal_max<Real>(tops);
    for (int v = whole; v < V; v++) max = row[v] > max ? row[v] : max;
    for (int v = 0; v < whole; v += W) {
      const Vec<Real> e = exp_vec(load(row + v) - max);  // <= 1: nothing overflows
      sums += e;
      store(p + v, e);
    }
    Real sum = horizontal_sum<Real>(sums);
    for (int v = whole; v < V; v++) sum += p[v] = std::exp(row[v] - max);
    for (int v = 0; v < V; v++) p[v] /= sum;
    losses[r] = std::log(sum) - (row[targets[r]] - max);
  }
}

// dlogits (rows, V) = (probs (rows, V) - onehot(targets (rows))) * dloss. dloss is the gradient of one row's loss, 1 /
// rows for their mean.
template <class Real>
void crossentropy_backward(Real* dlogits, const Real* probs, const int* targets, Real dloss, int rows, int V) {
#pragma omp parallel for schedule(static) if (size_t(rows) * V > worth_threads)
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < V; v++) dlogits[size_t(r) * V + v] = (probs[size_t(r) * V + v] - Real(v == targets[r])) * dloss;
}
