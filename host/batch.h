// Batches: B windows of the text, T tokens each. The seed, the step and the row decide which, on the CPU and on the GPU.
// defines: random_start, shuffled, shuffled_start, window_start, random_batch
#pragma once
#include <cstdint>

#include "random.h"
#include "shards.h"

// Where a window begins in a text of n tokens: anywhere in [0, n - T), so that each token has a successor.
HOST_DEVICE inline uint64_t random_start(uint64_t n, int T, uint64_t seed, uint32_t step, uint32_t site, uint64_t row) {
  const Philox4 r = random4(seed, step, site, row);
  return below(r.word[0], r.word[1], n - uint64_t(T));
}

// Element i of a random order of 0 ... n - 1, computed from i alone: nobody keeps a list of n numbers, and a block of a GPU
// or a resumed run finds its window by itself. A Feistel network permutes the numbers of an even count of bits, whatever its
// rounds compute. A result of n or more is permuted again, until it is below n. Each number still comes once: a permutation
// runs in cycles, and we go on along the cycle of i to its next number below n.
HOST_DEVICE inline uint64_t shuffled(uint64_t i, uint64_t n, uint64_t seed, uint32_t which) {
  int bits = 1;  // of half a number
  while (bits < 32 && (n - 1) >> (2 * bits)) bits++;
  const uint32_t mask = uint32_t((uint64_t{1} << bits) - 1);
  do {
    uint32_t left = uint32_t(i >> bits), right = uint32_t(i) & mask;
    for (uint32_t round = 0; round < 6; round++) {
      const uint32_t next = left ^ (random4(seed, which, site::order, uint64_t{right} * 8 + round).word[0] & mask);
      left = right;
      right = next;
    }
    i = uint64_t{left} << bits | right;
  } while (i >= n);
  return i;
}

// Where a window begins if none is to come twice: an epoch cuts the text into windows and takes each of them once, in random
// order. Each epoch has its own order and its own first token, `cut`. It leaves out T to 2 T - 1 tokens, `cut` of them at the
// start of the text and the others at its end (more if the text is shorter than two windows); other epochs read those.
// window: its number in the run, counted from 0
HOST_DEVICE inline uint64_t shuffled_start(uint64_t n, int T, uint64_t seed, uint64_t window) {
  const uint64_t length = uint64_t(T), windows = n < 2 * length ? 1 : n / length - 1;
  const uint32_t epoch = uint32_t(window / windows);
  const Philox4 r = random4(seed, epoch, site::cut, 0);
  const uint64_t cut = below(r.word[0], r.word[1], n - windows * length);  // the last token needs a successor
  return cut + shuffled(window % windows, windows, seed, epoch) * length;
}

// Where the window of a row begins. Rows are counted through all batches of a step, and through all of an evaluation, which
// always draws at random. rows_of_step: for --batches shuffled, how many windows a step trains on; otherwise 0. All earlier
// steps are taken to have had as many: a run that goes on with another --batch_size jumps in the order, and some windows then
// come twice in an epoch or not at all.
HOST_DEVICE inline uint64_t window_start(uint64_t n, int T, uint64_t seed, uint32_t step, uint32_t site, uint64_t row,
                                         uint64_t rows_of_step) {
  if (site == site::batch && rows_of_step > 0) return shuffled_start(n, T, seed, step * rows_of_step + row);
  return random_start(n, T, seed, step, site, row);
}

// x (B, T): windows of T tokens; y (B, T): each token's successor. `first_row` is the number of the first window.
inline void random_batch(int* x, int* y, const Tokens& tokens, uint64_t seed, uint32_t step, uint32_t site,
                         uint64_t first_row, int B, int T, uint64_t rows_of_step = 0) {
  for (int b = 0; b < B; b++) {
    const uint64_t start = window_start(tokens.size(), T, seed, step, site, first_row + b, rows_of_step);
    tokens.copy(start, T, x + size_t(b) * T);
    tokens.copy(start + 1, T, y + size_t(b) * T);
  }
}
