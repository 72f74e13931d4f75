// defines: add
#pragma once
#include <cstddef>

#include "simd.h"

// sum (count) += x (count)
template <class Real>
void add(Real* sum, const Real* x, size_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) sum[i] += x[i];
}
