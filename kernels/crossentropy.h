// Softmax and cross-entropy: loss = log(sum_v exp(logits_v)) - logits_target, in nats.
// defines: crossentropy_forward, crossentropy_backward
#pragma once
#include <cmath>
#include <cstddef>

#include "simd.h"

// losses (rows) = ..., probs (rows, V) = softmax(logits (rows, V)); targets (rows)
template <class Real>
void crossentropy_forward(Real* losses, Real* probs, const Real* logits, const int* targets, int rows, int V) {
#pragma omp parallel for schedule(static) if (size_t(rows) * V > worth_threads)
  for (int r = 0; r < rows; r++) {
    const Real* row = logits + size_t(r) * V;
    Real* p = probs + size_t(r) * V;
    Real max = row[0], sum = 0;
    for (int v = 1; v < V; v++) max = row[v] > max ? row[v] : max;
    for (int v = 0; v < V; v++) sum += p[v] = std::exp(row[v] - max);  // <= 1: nothing overflows
    for (int v = 0; v < V; v++) p[v] /= sum;
    losses[r] = std::log(sum) - (row[targets[r]] - max);
  }
}

// dlogits (rows, V) = (probs - onehot(targets)) * dloss; dloss: the gradient of one row's loss, 1 / rows for their mean
template <class Real>
void crossentropy_backward(Real* dlogits, const Real* probs, const int* targets, Real dloss, int rows, int V) {
#pragma omp parallel for schedule(static) if (size_t(rows) * V > worth_threads)
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < V; v++) dlogits[size_t(r) * V + v] = (probs[size_t(r) * V + v] - Real(v == targets[r])) * dloss;
}
