// CUDA on the CPU (see cuda_runtime.h): the type bf16, a float's upper half.
// defines: __nv_bfloat16, nv_bfloat16, __float2bfloat16, __bfloat162float
#pragma once
#include "cuda_runtime.h"

// Unlike the toolkit's type, this one has only explicit conversions and no arithmetic, because the toolkit's arithmetic
// rounds every sum to 8 bits. A kernel that forgets to say float(x) does not compile.
struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  // Rounds to the nearest, ties to even: the addition carries into the upper half, up to infinity.
  explicit __nv_bfloat16(float x) {
    const uint32_t u = __float_as_uint(x);
    bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
using nv_bfloat16 = __nv_bfloat16;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
