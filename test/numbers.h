// Numbers to try kernels with, for the tests and for the lab (dev/kernels).
// defines: noise, rounded, rounding_of
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../host/random.h"
#include "../kernels/device.cuh"

// scale * N(0, 1), the same on every machine; `which` numbers the array.
inline std::vector<float> noise(size_t count, uint32_t which, double scale = 1) {
  std::vector<float> out(count);
  for (size_t i = 0; i < count; i += 4) {
    double x[4];
    normal4(x, random4(99, which, 0, i / 4));
    for (size_t j = 0; j < 4 && i + j < count; j++) out[i + j] = float(scale * x[j]);
  }
  return out;
}

// x rounded to Real: the numbers that the kernel really sees, from which we compute the reference.
template <class Real, class To = double>
std::vector<To> rounded(const std::vector<float>& x) {
  std::vector<To> out(x.size());
  for (size_t i = 0; i < x.size(); i++) out[i] = To(float(Real(x[i])));
  return out;
}

// The largest relative error of rounding a number to Real: half a unit in the last place.
template <class Real>
constexpr double rounding_of = 0x1p-24;
template <>
inline constexpr double rounding_of<bf16> = 0x1p-8;
template <>
inline constexpr double rounding_of<fp16> = 0x1p-11;
