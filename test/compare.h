// Compares two arrays of numbers, tensor by tensor: the gaps between a buffer's tensors hold NaN in test builds.
// defines: Worst, compare, mismatch, check_close
#pragma once
#include <cmath>
#include <cstddef>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "test.h"

// The element that comes closest to its budget, or exceeds it the most. Share: its error over the budget; above 1 the
// arrays differ, infinity says that no error can be stated, because a number is not finite or the budget is zero.
struct Worst {
  size_t index = 0;
  double got = 0, want = 0, share = 0;
};

// An element's budget is tolerance * (|want| + rms(want)). The root mean square is that of the whole tensor: an element
// that nearly cancels cannot be better than the terms it is the sum of, and those are about as large as its neighbours.
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
    // Asked for by name: NaN compares as false with everything, and an infinite budget would forgive any error.
    if (!std::isfinite(g) || !std::isfinite(budget)) share = std::numeric_limits<double>::infinity();
    if (i == 0 || share > worst.share) worst = {i, g, w, share};
  }
  return worst;
}

// "" when every element is finite and within its budget, otherwise what is wrong and where.
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

template <class A, class B>
void check_close(const std::vector<A>& got, const std::vector<B>& want, double tolerance) {
  REQUIRE(got.size() == want.size());
  const std::string message = mismatch(got.data(), want.data(), got.size(), tolerance);
  INFO(message);
  CHECK(message.empty());
}
