// CUDA on the CPU (see cuda_runtime.h): the type bf16, a float's upper half.
// defines: __nv_bfloat16, nv_bfloat16, __float2bfloat16, __bfloat162float
#pragma once
#include "cuda_runtime.h"

// Both conversions are explicit here, unlike the toolkit's, and there is no arithmetic: the toolkit's would round every
// sum to 8 bits. A kernel that forgets to say float(x) does not compile.
struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  // Rounded to the nearest, ties to even, which a carry into the upper half does, up to infinity.
  explicit __nv_bfloat16(float x) {
    const uint32_t u = __float_as_uint(x);
    bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
using nv_bfloat16 = __nv_bfloat16;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
