// Vectors of whatever width the target has, in the compiler's vector extensions: one source for AVX-512, AVX2, NEON and
// plain machines. Vectors live in registers only. Memory is loaded and stored through memcpy, so that you need not
// think about alignment and aliasing.
// defines: worth_threads, lanes, Vec, load, store, broadcast, fused_multiply_add, shuffle, repeat, horizontal_sum,
//          horizontal_max, transpose, exp_vec, multiply_low_halves, scratch
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#ifdef __SSE2__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Waking the other threads costs some microseconds, so a loop of fewer elementary operations than this runs on one
// thread. Results do not depend on it.
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

// sum + a * b, rounded once where the machine can. Left to itself, a compiler takes the one instruction or two depending
// on the code around (g++ -mtune=znver3 takes two where a single sum grows in a loop), and then the bits of a row would
// depend on how many rows are computed with it.
template <class Real>
inline Vec<Real> fused_multiply_add(const Vec<Real>& sum, const Vec<Real>& a, const Vec<Real>& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4)
    return Vec<Real>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(sum)));
  else
    return Vec<Real>(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(sum)));
#elif defined(__AVX__) && defined(__FMA__)
  if constexpr (sizeof(Real) == 4)
    return Vec<Real>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(sum)));
  else
    return Vec<Real>(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(sum)));
#elif defined(__aarch64__)
  if constexpr (sizeof(Real) == 4)
    return Vec<Real>(vfmaq_f32(float32x4_t(sum), float32x4_t(a), float32x4_t(b)));
  else
    return Vec<Real>(vfmaq_f64(float64x2_t(sum), float64x2_t(a), float64x2_t(b)));
#else
  return sum + a * b;
#endif
}

// Lane i of the result is lane index(i) of a and b, one behind the other: 0 ... W - 1 are a's lanes, W ... 2 W - 1 are
// b's.
// index is a lambda without captures, so that the compiler knows its results.
template <class V, class Index, size_t... i>
inline V shuffle(const V& a, const V& b, Index index, std::index_sequence<i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, index(i)...);
#else
  using Lane = std::remove_cvref_t<decltype(a[0])>;
  typedef std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t> Lanes __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Lanes{index(i)...});
#endif
}
template <class Real, class Index>
inline Vec<Real> shuffle(const Vec<Real>& a, const Vec<Real>& b, Index index) {
  return shuffle(a, b, index, std::make_index_sequence<lanes<Real>>());
}

// Calls work(0), work(1), ..., work(n - 1), written out one after the other. Each index is a constant, so the vectors
// of an array become registers. A compiler unrolls a loop as well, but only after it has decided where the array lives:
// it keeps the array in memory before and behind the loop.
template <class Work, int... i>
[[gnu::always_inline]] inline void repeat(const Work& work, std::integer_sequence<int, i...>) {
  (work(std::integral_constant<int, i>()), ...);
}
template <int n, class Work>
[[gnu::always_inline]] inline void repeat(const Work& work) {
  repeat(work, std::make_integer_sequence<int, n>());
}

// Combines all lanes to one number, by halves: 16 lanes take four steps, not fifteen.
template <class Real, int distance = lanes<Real> / 2, class Combine>
inline Real horizontal(const Vec<Real>& v, Combine combine) {
  if constexpr (distance == 0)
    return v[0];
  else
    return horizontal<Real, distance / 2>(combine(v, shuffle<Real>(
                                                         v, v, [](int i) constexpr { return i ^ distance; })),
                                          combine);
}
template <class Real>
inline Real horizontal_sum(const Vec<Real>& v) {
  return horizontal<Real>(v, [](const Vec<Real>& a, const Vec<Real>& b) { return a + b; });
}
template <class Real>
inline Real horizontal_max(const Vec<Real>& v) {
  return horizontal<Real>(v, [](const Vec<Real>& a, const Vec<Real>& b) { return a > b ? a : b; });
}

// Transposes v, a square of W x W numbers, in place. Step n = 1, 2, 4, ... looks at squares of 2 n x 2 n and swaps
// their upper right quarter with the lower left one.
template <class Real, int n = 1>
inline void transpose(Vec<Real> v[lanes<Real>]) {
  constexpr int W = lanes<Real>;
  if constexpr (n < W) {
    for (int i = 0; i < W; i++) {
      if (i & n) continue;
      const Vec<Real> a = v[i], b = v[i + n];
      v[i] = shuffle<Real>(
          a, b, [](int l) constexpr { return l & n ? W + l - n : l; });
      v[i + n] = shuffle<Real>(
          a, b, [](int l) constexpr { return l & n ? W + l : l + n; });
    }
    transpose<Real, 2 * n>(v);
  }
}

// e^x for each lane. For float it is within 1.1 units in the last place of the exact value on [-87.3, 88.3], 0 below,
// and e^88.3 above. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial in r, the Taylor series' first eight
// terms, which are enough for such an r; and n is added to the exponent's bits, which multiplies by 2^n. For double the
// library computes it.
inline Vec<float> exp_vec(const Vec<float>& x) {
  typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.3f);
  Vec<float> y = x < low ? low : x;
  y = y > high ? high : y;
  const float magic = 0x1.8p23f;  // adding it to y rounds y to an integer, whose bits are then the sum's low bits
  const Vec<float> shifted = y * 1.44269504088896f + magic, n = shifted - magic;
  Vec<float> r = y - n * 0.693359375f;  // ln 2 in two parts: the first has nine bits, so its product with n is exact
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

// For each lane of 64 bits, the product of a's and b's low halves. The high halves are ignored.
inline Vec<uint64_t> multiply_low_halves(const Vec<uint64_t>& a, const Vec<uint64_t>& b) {
#if defined(__AVX512F__)
  return Vec<uint64_t>(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));  // without a mask, g++ warns
#elif defined(__AVX2__)
  return Vec<uint64_t>(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__) && !defined(__AVX__)  // with AVX alone vectors are wider, but not these products
  return Vec<uint64_t>(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Working memory of a kernel, `count` numbers of undefined content. There is one buffer for each (thread, Use, Real),
// where Use is any type, a tag. A buffer grows to the largest size asked for and is then reused: no step after the
// first allocates.
template <class Use, class Real>
Real* scratch(size_t count) {
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<Real, Free> buffer;
  static thread_local size_t capacity = 0;
  if (count > capacity) {
    buffer.reset();  // before we ask for the new one, so that we never hold both
    capacity = 0;
    const size_t bytes = (count * sizeof(Real) + 63) / 64 * 64;
    buffer.reset(static_cast<Real*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    capacity = count;
  }
  return buffer.get();
}
