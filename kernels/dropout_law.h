// The law of dropout, which CPU (dropout.h) and GPU (dropout.cuh) obey alike: with what probability an element is kept,
// and which random draw decides it. Their masks are therefore the same bit for bit.
// Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014, section 4.
// An element is kept with probability 1 - p and then scaled by 1 / (1 - p), so that evaluation needs no change. No mask
// is stored: forward and backward draw the same random numbers (host/random.h). Only attention's kernels for 16-bit
// types can store theirs instead (attention_masks in choices.cuh).
// defines: dropout_threshold, dropout_scale, Dropout, draw_of, attention_counter, attention_draw
#pragma once
#include <cstddef>
#include <cstdint>

#include "../host/random.h"

// Dropout decides with 16 random bits: keep iff draw < threshold. The probability of keeping is then threshold / 65536,
// not exactly 1 - p, and the scale is its exact inverse, so that the expectation of every activation is unchanged.
HOST_DEVICE inline uint32_t dropout_threshold(double p) { return uint32_t((1.0 - p) * 65536.0 + 0.5); }
HOST_DEVICE inline double dropout_scale(uint32_t threshold) { return 65536.0 / threshold; }

// Where a layer's masks come from.
struct Dropout {
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t site = 0;           // kind and layer, host/random.h
  uint32_t threshold = 65536;  // keep iff a 16-bit draw is below it
  int first_row = 0;  // row of the whole batch at which this one begins: gradient accumulation goes on counting

  HOST_DEVICE bool active() const { return threshold < 65536; }
  Dropout at(uint32_t kind, int layer) const {
    Dropout drop = *this;
    drop.site = kind + uint32_t(layer);
    return drop;
  }
};

// Draw i of the eight that one call of the generator gives: the low half of its first word first.
HOST_DEVICE inline uint32_t draw_of(const Philox4& r, int i) { return r.word[i / 2] >> (16 * (i & 1)) & 0xffff; }

// The numbering of attention's random draws is that of a tensor core's accumulators (the m16n8 fragment of the PTX
// manual's mma instructions), so that a GPU thread makes the mask for just the elements which it holds. Blocks of 16 x
// 16 weights are numbered over (batch row and head, query, key); a block has 32 counters, one for each lane of a warp;
// a lane's four words belong to the four 8 x 8 quarters, and a word's halves to two neighbouring keys.
constexpr int draw_block = 16;
HOST_DEVICE inline uint64_t attention_counter(uint64_t bh, int q, int kv, int T) {  // the first of the block's 32
  const uint64_t blocks = uint64_t(T + draw_block - 1) / draw_block;
  return ((bh * blocks + uint32_t(q) / draw_block) * blocks + uint32_t(kv) / draw_block) * 32;
}
HOST_DEVICE inline uint32_t attention_draw(const Dropout& drop, uint64_t bh, int q, int kv, int T) {
  const int lane = q % 8 * 4 + kv % 8 / 2;
  const Philox4 r = random4(drop.seed, drop.step, drop.site, attention_counter(bh, q, kv, T) + lane);
  const bool low = q & 8, right = kv & 8;  // of the quarters; asked one by one, so that the words can be in registers
  const uint32_t word = right ? (low ? r.word[3] : r.word[2]) : (low ? r.word[1] : r.word[0]);
  return word >> (16 * (kv & 1)) & 0xffff;
}
