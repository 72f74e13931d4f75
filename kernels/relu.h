// Rectified linear unit, in place: after forward the tensor itself says which elements passed.
// defines: relu_forward, relu_backward
#pragma once
#include <cstddef>

#include "simd.h"

// x (count) = max(x, 0)
template <class Real>
void relu_forward(Real* x, size_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] : Real(0);
}

// dx (count) = dx where out > 0, else 0; out (count) is what forward left
template <class Real>
void relu_backward(Real* dx, const Real* out, size_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) dx[i] = out[i] > 0 ? dx[i] : Real(0);
}
