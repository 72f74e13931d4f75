// The types of numbers that products multiply. Sums always have the caller's type, float or double. Factors have the
// same type or are bfloat16: each number is rounded to the upper half of a float, and vdpbf16ps, an instruction of
// AVX512_BF16, multiplies and adds two pairs at a time. Elsewhere that is emulated, for tests; it is slower than float.
// defines: bfloat16, bfloat16_bits, Factors, Unit, Sum, units_along, units_across, multiply_add
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "simd.h"

struct bfloat16 {
  uint16_t bits;
};

// Rounds to the nearest, ties to even. NaN stays NaN.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t((x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16);
}

// How factors lie in a product's packed operands: in units of `terms` neighbours in k, one number or a pair.
template <class Factor>
struct Factors {
  using Unit = Factor;
  using Sum = Factor;
  static constexpr int terms = 1;
  static Unit unit(Factor x, Factor) { return x; }
};
template <>
struct Factors<bfloat16> {
  using Unit = uint32_t;  // a pair, the first number in the low half
  using Sum = float;
  static constexpr int terms = 2;
  static Unit unit(float x, float y) { return bfloat16_bits(x) | uint32_t(bfloat16_bits(y)) << 16; }
};
template <class Factor>
using Unit = typename Factors<Factor>::Unit;
template <class Factor>
using Sum = typename Factors<Factor>::Sum;

// A vector of units from memory in which neighbours are neighbours in k: x (W * terms).
template <class Factor>
inline Vec<Unit<Factor>> units_along(const Sum<Factor>* x) {
  if constexpr (Factors<Factor>::terms == 1)
    return load(x);
  else {
#ifdef __AVX512BF16__
    return Vec<uint32_t>(_mm512_cvtne2ps_pbh(__m512(load(x + lanes<float>)), __m512(load(x))));
#else
    Vec<uint32_t> out{};
    for (int i = 0; i < lanes<float>; i++) out[i] = Factors<bfloat16>::unit(x[2 * i], x[2 * i + 1]);
    return out;
#endif
  }
}
// A vector of units from two vectors that are neighbours in k: unit i is the pair x[i], y[i]. Without pairs it is x.
template <class Factor>
inline Vec<Unit<Factor>> units_across(const Vec<Sum<Factor>>& x, const Vec<Sum<Factor>>& y) {
  if constexpr (Factors<Factor>::terms == 1)
    return x;
  else {
#ifdef __AVX512BF16__
    typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
    const auto bits = [](const Vec<float>& v) {
      return __builtin_convertvector(Halves(_mm512_cvtneps_pbh(__m512(v))), Vec<uint32_t>);
    };
    return bits(x) | bits(y) << 16;
#else
    Vec<uint32_t> out{};
    for (int i = 0; i < lanes<float>; i++) out[i] = Factors<bfloat16>::unit(x[i], y[i]);
    return out;
#endif
  }
}

// sum + a * b for each lane of b. A pair of bfloat16 adds both its products.
template <class Real>
inline Vec<Real> multiply_add(const Vec<Real>& sum, Real a, const Vec<Real>& b) {
  return fused_multiply_add<Real>(sum, broadcast(a), b);
}
inline Vec<float> multiply_add(const Vec<float>& sum, uint32_t a, const Vec<uint32_t>& b) {
#ifdef __AVX512BF16__
  return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(broadcast(a)), __m512bh(b)));
#else
  const auto halves = [](const Vec<uint32_t>& v, Vec<float>& low, Vec<float>& high) {
    const Vec<uint32_t> low_bits = v << 16, high_bits = v & 0xffff0000u;
    std::memcpy(&low, &low_bits, sizeof low);
    std::memcpy(&high, &high_bits, sizeof high);
  };
  Vec<float> a_low, a_high, b_low, b_high;
  halves(broadcast(a), a_low, a_high);
  halves(b, b_low, b_high);
  return fused_multiply_add<float>(fused_multiply_add<float>(sum, a_high, b_high), a_low, b_low);
#endif
}
