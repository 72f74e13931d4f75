// Dropout on the CPU. dropout_law.h says what is kept and which draw decides it. This file makes the draws, 256 at a
// time.
// defines: random4_lanes, dropout_draws, dropout_apply, attention::block_draws, attention::zero_dropped
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dropout_law.h"
#include "simd.h"

// random4 for 32 indices in a row, word by word. A lane of 64 bits holds a word in its low half and anything in the high
// one, so that a round is two products, two shifts and the exclusive ors.
inline void random4_lanes(uint32_t words[4][32], uint64_t seed, uint32_t step, uint32_t site, uint64_t first_index) {
  using Words = Vec<uint64_t>;
  typedef uint32_t Narrow __attribute__((vector_size(vector_bytes / 2)));
  constexpr int W = lanes<uint64_t>, together = vector_bytes == 64 ? 4 : 2;  // vectors, which hide each other's latency
  Words lane;
  for (int i = 0; i < W; i++) lane[i] = uint64_t(i);
  for (int first = 0; first < 32; first += together * W) {
    Words c[together][4];
    for (int i = 0; i < together; i++) {
      const Words index = lane + (first_index + uint64_t(first + i * W));
      c[i][0] = index, c[i][1] = index >> 32, c[i][2] = broadcast<uint64_t>(step), c[i][3] = broadcast<uint64_t>(site);
    }
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < philox::rounds; round++) {
      for (auto& w : c) {
        const Words p0 = multiply_low_halves(w[0], broadcast<uint64_t>(philox::multiplier0)),
                    p1 = multiply_low_halves(w[2], broadcast<uint64_t>(philox::multiplier1));
        w[0] = (p1 >> 32) ^ w[1] ^ key0;
        w[1] = p1;
        w[2] = (p0 >> 32) ^ w[3] ^ key1;
        w[3] = p0;
      }
      key0 += philox::weyl0;
      key1 += philox::weyl1;
    }
    for (int i = 0; i < together; i++)
      for (int w = 0; w < 4; w++) {
        const Narrow narrow = __builtin_convertvector(c[i][w], Narrow);
        std::memcpy(&words[w][first + i * W], &narrow, sizeof narrow);
      }
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

// Attention's weights: the draws of a block of queries at once, and the mask that they make.
namespace attention {

// draws (rows, draws_row(T)) = the draws for queries q0 ... q0 + rows - 1 and the keys up to the last of these queries.
// q0 is a multiple of 16. Whole blocks of 16 keys are written, so vectors of any width can read a row to its end.
// bh: the head's number in the whole batch
inline size_t draws_row(int T) { return size_t(T + draw_block - 1) / draw_block * draw_block; }
inline void block_draws(uint16_t* draws, const Dropout& drop, uint64_t bh, int q0, int rows, int T) {
  for (int q = q0; q < q0 + rows; q += draw_block)
    for (int kv = 0; kv < std::min(q + draw_block, q0 + rows); kv += draw_block) {
      uint32_t words[4][32];
      random4_lanes(words, drop.seed, drop.step, drop.site, attention_counter(bh, q, kv, T));
      for (int i = 0; i < std::min(draw_block, q0 + rows - q); i++) {  // four words hold eight neighbouring keys
        uint16_t* row = draws + (q - q0 + i) * draws_row(T) + kv;
        std::memcpy(row, &words[i / 8][i % 8 * 4], 16);
        std::memcpy(row + 8, &words[2 + i / 8][i % 8 * 4], 16);
      }
    }
}

// x, with 0 in the lanes whose draw is not below the threshold. draws (W)
template <class Real>
inline Vec<Real> zero_dropped(const Vec<Real>& x, const uint16_t* draws, uint32_t threshold) {
  typedef uint16_t Draws __attribute__((vector_size(vector_bytes / sizeof(Real) * 2)));
  Draws drawn;
  std::memcpy(&drawn, draws, sizeof drawn);
  return __builtin_convertvector(drawn, Vec<Real>) < Real(threshold) ? x : Vec<Real>{};
}

}  // namespace attention
