// Vectors of whatever width the target has, in the compiler's vector extensions: one source for AVX-512, AVX2, NEON and
// plain machines. A vector is only ever a register: memory is loaded and stored through memcpy, so that alignment and
// aliasing need no thought.
// defines: worth_threads, lanes, Vec, load, store, broadcast, horizontal_sum, horizontal_max, exp_vec, scratch
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Waking the other threads costs some microseconds: a loop of fewer elementary operations than this runs on one.
// Results do not depend on it.
constexpr size_t worth_threads = 1 << 15;

template <class Real>
constexpr int lanes = vector_bytes / int(sizeof(Real));

template <class Real>
struct VecOf {
  typedef Real type __attribute__((vector_size(vector_bytes)));
};
template <class Real>
using Vec = typename VecOf<Real>::type;

template <class Real>
inline Vec<Real> load(const Real* from) {
  Vec<Real> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class Real>
inline void store(Real* to, const Vec<Real>& v) {
  std::memcpy(to, &v, sizeof v);
}
template <class Real>
inline Vec<Real> broadcast(Real x) {
  return x - Vec<Real>{};
}

template <class Real>
inline Real horizontal_sum(const Vec<Real>& v) {
  Real sum = v[0];
  for (int i = 1; i < lanes<Real>; i++) sum += v[i];
  return sum;
}
template <class Real>
inline Real horizontal_max(const Vec<Real>& v) {
  Real max = v[0];
  for (int i = 1; i < lanes<Real>; i++) max = v[i] > max ? v[i] : max;
  return max;
}

// e^x, elementwise. For float within 1.1 units in the last place of the exact value on [-87.3, 88.3], 0 below and
// saturating above: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and 2^n put into the exponent's bits. The
// coefficients are the Taylor series' first eight, enough at this |r|. For double: the library's.
inline Vec<float> exp_vec(const Vec<float>& x) {
  typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.3f);
  Vec<float> y = x < low ? low : x;
  y = y > high ? high : y;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  const Vec<float> shifted = y * 1.44269504088896f + magic, n = shifted - magic;
  Vec<float> r = y - n * 0.693359375f;  // ln 2 in two parts: the first is exact in nine bits, so that n * it is exact
  r = r - n * -2.12194440e-4f;
  Vec<float> p = broadcast(1.f / 5040.f);
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  Ints bits, n_bits;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&n_bits, &shifted, sizeof n_bits);
  bits += n_bits << 23;
  std::memcpy(&p, &bits, sizeof p);
  return x < low ? Vec<float>{} : p;
}
inline Vec<double> exp_vec(const Vec<double>& x) {
  Vec<double> y{};
  for (int i = 0; i < lanes<double>; i++) y[i] = std::exp(x[i]);
  return y;
}

// Working memory of a kernel: one buffer for each (thread, use, type), which grows to the largest size asked for and is
// then reused, so that no step after the first allocates. The content is undefined.
template <class Use, class Real>
Real* scratch(size_t count) {
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<Real, Free> buffer;
  static thread_local size_t capacity = 0;
  if (count > capacity) {
    buffer.reset();  // before the new one is asked for, so that only one is held
    capacity = 0;
    const size_t bytes = (count * sizeof(Real) + 63) / 64 * 64;
    buffer.reset(static_cast<Real*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    capacity = count;
  }
  return buffer.get();
}
