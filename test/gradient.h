// Gradients against finite differences.
// defines: check_gradient
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "test.h"

// Compares grad (count) with central differences of f at each element of x (count), or at about a hundred of a large x.
// With h = 1e-5 the truncation error is about 1e-10 and the rounding error 1e-16 / h = 1e-11, relative to f.
inline void check_gradient(double* x, const double* grad, size_t count, const std::function<double()>& f,
                           double tolerance = 1e-7) {
  std::vector<double> got, want;
  for (size_t i = 0; i < count; i += std::max<size_t>(1, count / 100)) {
    const double h = 1e-5, kept = x[i];
    x[i] = kept + h;
    const double up = f();
    x[i] = kept - h;
    const double down = f();
    x[i] = kept;
    got.push_back(grad[i]);
    want.push_back((up - down) / (2 * h));
  }
  check_close(got, want, tolerance);
}
