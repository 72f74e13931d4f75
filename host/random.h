// Random numbers without state: every number is a pure function of (seed, step, site, index).
// Nothing has to be stored, ordered or locked: backward makes a dropout mask again instead of keeping it, any number of
// threads draws the same numbers, a resumed run goes on exactly, and a GPU kernel agrees with the CPU bit for bit.
// defines: Philox4, philox4x32_10, random4, site, unit_open, normal4, below
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

struct Philox4 {
  uint32_t word[4];
};

// The high half of a * b. On a GPU this is one instruction; from a shift of the 64-bit product the compiler makes two.
HOST_DEVICE inline uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return uint32_t(uint64_t{a} * b >> 32);
#endif
}

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
namespace philox {
constexpr int rounds = 10;
constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;  // added to the keys
}  // namespace philox
HOST_DEVICE inline Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < philox::rounds; round++) {
    const uint32_t high0 = multiply_high(philox::multiplier0, c0), low0 = philox::multiplier0 * c0;
    const uint32_t high1 = multiply_high(philox::multiplier1, c2), low1 = philox::multiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += philox::weyl0;
    key1 += philox::weyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Who draws. A site owns its counters alone: no two purposes ever share one. The low 24 bits number the layer, or the
// tensor that is initialised.
namespace site {
constexpr uint32_t init = 1u << 24;               // index: four elements of tensor (low bits)
constexpr uint32_t batch = 2u << 24;              // index: row of the batch, counted over gradient accumulation
constexpr uint32_t eval_train = 3u << 24;         // index: row, counted over the batches of one evaluation
constexpr uint32_t eval_val = 4u << 24;           // index: as above
constexpr uint32_t attention_dropout = 5u << 24;  // index: see kernels/dropout_law.h
constexpr uint32_t proj_dropout = 6u << 24;       // index: eight elements of the (B*T, C) tensor
constexpr uint32_t fc_dropout = 7u << 24;         // index: as above
constexpr uint32_t sampler = 8u << 24;            // step: position in the text, index: number of the sample
constexpr uint32_t cut = 9u << 24;                // step: the epoch; where it cuts the text into windows
constexpr uint32_t order = 10u << 24;             // step: the epoch, index: half of a window's number, and a round
}  // namespace site

// Four random words for one (seed, step, site, index).
HOST_DEVICE inline Philox4 random4(uint64_t seed, uint32_t step, uint32_t site, uint64_t index) {
  return philox4x32_10({{uint32_t(index), uint32_t(index >> 32), step, site}}, uint32_t(seed), uint32_t(seed >> 32));
}

// A uniform integer in [0, n) from two random words: the high half of their 128-bit product with n. The bias is below
// n / 2^64.
HOST_DEVICE inline uint64_t below(uint32_t high, uint32_t low, uint64_t n) {
#ifdef __CUDA_ARCH__
  return __umul64hi(uint64_t{high} << 32 | low, n);
#else
  const uint64_t n_high = n >> 32, n_low = n & 0xffffffffu;  // (high * 2^32 + low) * n, schoolbook
  const uint64_t low_low = low * n_low, low_high = low * n_high, high_low = high * n_low;
  const uint64_t middle = (low_low >> 32) + (low_high & 0xffffffffu) + (high_low & 0xffffffffu);
  return high * n_high + (low_high >> 32) + (high_low >> 32) + (middle >> 32);
#endif
}

// A uniform number in (0, 1): never 0, so its logarithm is finite.
HOST_DEVICE inline double unit_open(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// Four independent N(0, 1) numbers from four words (Box and Muller 1958). Host only: devices round sin and log
// otherwise.
inline void normal4(double out[4], const Philox4& r) {
  constexpr double two_pi = 6.283185307179586476925;
  for (int i = 0; i < 4; i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(unit_open(r.word[i]))), angle = two_pi * unit_open(r.word[i + 1]);
    out[i] = radius * std::cos(angle);
    out[i + 1] = radius * std::sin(angle);
  }
}
