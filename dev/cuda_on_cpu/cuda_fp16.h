// CUDA on the CPU (see cuda_runtime.h): the type fp16, IEEE 754's binary16: 5 bits of exponent, 10 of mantissa.
// defines: __half, half, __float2half, __half2float
#pragma once
#include "cuda_runtime.h"

// Only explicit conversions and no arithmetic: cuda_bf16.h says why.
struct __half {
  uint16_t bits;

  __half() = default;
  // Rounds to the nearest, ties to even.
  explicit __half(float x) {
    const uint32_t u = __float_as_uint(x), magnitude = u & 0x7fffffff;
    uint32_t rounded;
    if (magnitude > 0x7f800000) {
      bits = 0x7fff;
      return;
    }
    if (magnitude >= 0x47800000)  // 65536 and up; smaller numbers that round up to 65536 become infinity below
      rounded = 0x7c00;
    else if (magnitude >= 0x38800000)  // 2^-14, the smallest normal number: rebias the exponent, round off 13 bits
      rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    else  // subnormals are multiples of 2^-24, the last place of floats from 0.5 to 1: adding 0.5 rounds
      rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
    bits = uint16_t(u >> 16 & 0x8000) | uint16_t(rounded);
  }
  explicit operator float() const {
    // In a float's place, the bits are the number times 2^-112, even if that makes a subnormal float.
    const uint32_t magnitude = bits & 0x7fff, sign = (bits & 0x8000u) << 16;
    const uint32_t finite = __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
    return __uint_as_float(sign | (magnitude < 0x7c00 ? finite : 0x7f800000 | magnitude << 13));
  }
};
using half = __half;

inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
