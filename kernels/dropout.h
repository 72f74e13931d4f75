// Dropout: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014,
// section 4. An element is kept with probability 1 - p and then scaled by 1 / (1 - p), so that evaluation needs no
// change. No mask is stored: forward and backward draw the same random numbers (host/random.h).
// defines: random4_lanes, dropout_draws, dropout_apply
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "masks.h"
#include "simd.h"

// random4 for 32 indices in a row, word by word: a loop over lanes that compilers turn into vector code.
inline void random4_lanes(uint32_t words[4][32], uint64_t seed, uint32_t step, uint32_t site, uint64_t first_index) {
#pragma omp simd
  for (int i = 0; i < 32; i++) {
    const Philox4 r = random4(seed, step, site, first_index + i);
    words[0][i] = r.word[0];
    words[1][i] = r.word[1];
    words[2][i] = r.word[2];
    words[3][i] = r.word[3];
  }
}

// The draws of 32 consecutive counters, eight of 16 bits each: counter i gives draws[8 * i ... 8 * i + 7], the low half
// of its first word first.
constexpr int draws_at_once = 256;
inline void dropout_draws(uint16_t draws[draws_at_once], const Dropout& drop, uint64_t first_counter) {
  uint32_t words[4][32];
  random4_lanes(words, drop.seed, drop.step, drop.site, first_counter);
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < 4; w++) std::memcpy(draws + 8 * i + 2 * w, &words[w][i], 4);  // both halves: little-endian
}

// out (count) = base + dropout(inp); base may be null (0), and out may be inp. The arrays are a piece of a tensor that
// begins at its element `first`, counted over the whole batch: element e has draw e.
template <class Real>
void dropout_apply(Real* out, const Real* base, const Real* inp, const Dropout& drop, uint64_t first, size_t count) {
  if (!drop.active()) {
    for (size_t i = 0; i < count; i++) out[i] = base ? base[i] + inp[i] : inp[i];
    return;
  }
  const Real scale = Real(dropout_scale(drop.threshold));
  for (uint64_t start = first / draws_at_once * draws_at_once; start < first + count; start += draws_at_once) {
    uint16_t draws[draws_at_once];
    dropout_draws(draws, drop, start / 8);
    const int begin = int(std::max(first, start) - start),
              end = int(std::min(first + count - start, uint64_t{draws_at_once}));
    const size_t shift = start - first;  // may wrap around in the first block; shift + begin does not
    // One expression, so that it becomes the same fused multiply-add wherever an element comes to lie in a piece.
    for (int j = begin; j < end; j++) {
      const Real factor = draws[j] < drop.threshold ? scale : Real(0);
      out[shift + j] = base ? inp[shift + j] * factor + base[shift + j] : inp[shift + j] * factor;
    }
  }
}
