// Compares two arrays of numbers, tensor by tensor: the gaps between a buffer's tensors hold NaN in test builds.
// The lab (dev/kernels) compares with it, too.
// defines: Worst, compare, mismatch
#pragma once
#include <cmath>
#include <cstddef>
#include <limits>
#include <sstream>
#include <string>

// The element that comes closest to its budget, or exceeds it the most. `share` is its error over its budget.
// Above 1 the arrays differ; infinity means that a number is not finite or that the budget is zero.
struct Worst {
  size_t index = 0;
  double got = 0, want = 0, share = 0;
};

// An element's budget is tolerance * (|want| + rms(want)), with the root mean square over the whole tensor. A sum that
// nearly cancels cannot be more exact than its terms, and those are about as large as the neighbouring elements.
template <class A, class B>
Worst compare(const A* got, const B* want, size_t n, double tolerance) {
  double squares = 0;
  for (size_t i = 0; i < n; i++) squares += double(want[i]) * double(want[i]);
  const double rms = n ? std::sqrt(squares / double(n)) : 0;
  Worst worst;
  for (size_t i = 0; i < n; i++) {
    const double g = double(got[i]), w = double(want[i]);
    const double error = std::fabs(g - w), budget = tolerance * (std::fabs(w) + rms);
    double share = error == 0 ? 0 : error / budget;
    // Checked explicitly: every comparison with NaN is false, and an infinite budget would forgive any error.
    if (!std::isfinite(g) || !std::isfinite(budget)) share = std::numeric_limits<double>::infinity();
    if (i == 0 || share > worst.share) worst = {i, g, w, share};
  }
  return worst;
}

// Returns "" if every element is finite and within its budget, otherwise the worst element and its error.
template <class A, class B>
std::string mismatch(const A* got, const B* want, size_t n, double tolerance) {
  const Worst worst = compare(got, want, n, tolerance);
  if (worst.share <= 1) return "";
  std::ostringstream out;
  out.precision(17);
  out << "element " << worst.index << " of " << n << " is " << worst.got << " instead of " << worst.want << ", ";
  if (std::isfinite(worst.share))
    out << worst.share << " times the error allowed";
  else
    out << "and no error is allowed or finite";
  return out.str();
}
