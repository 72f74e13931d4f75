// CUDA on the CPU (see cuda_runtime.h): the type fp16, IEEE 754's binary16: 5 bits of exponent, 10 of mantissa.
// defines: __half, half, __float2half, __half2float
#pragma once
#include "cuda_runtime.h"

// Explicit conversions and no arithmetic: see cuda_bf16.h.
struct __half {
  uint16_t bits;

  __half() = default;
  // Rounded to the nearest, ties to even.
  explicit __half(float x) {
    const uint32_t u = __float_as_uint(x), magnitude = u & 0x7fffffff;
    uint32_t rounded;
    if (magnitude > 0x7f800000) {
      bits = 0x7fff;
      return;
    }
    if (magnitude >= 0x47800000)  // 65536 and infinity; what is below and rounds up to it becomes infinity by itself
      rounded = 0x7c00;
    else if (magnitude >= 0x38800000)  // 2^-14, the smallest normal number: another exponent, 13 bits fewer
      rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    else  // a multiple of 2^-24, which is the last place of floats from 0.5 to 1: the addition rounds
      rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
    bits = uint16_t(u >> 16 & 0x8000) | uint16_t(rounded);
  }
  explicit operator float() const {
    // Moved into place, the number is too small by 2^112, and that is all, even if it has become a subnormal float.
    const uint32_t magnitude = bits & 0x7fff, sign = (bits & 0x8000u) << 16;
    const uint32_t finite = __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
    return __uint_as_float(sign | (magnitude < 0x7c00 ? finite : 0x7f800000 | magnitude << 13));
  }
};
using half = __half;

inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
