// Batches: B independent windows of the text, each begun at random. The seed, the step and the row decide where.
// defines: random_batch
#pragma once
#include <cstdint>

#include "random.h"
#include "shards.h"

// x (B, T): windows of T tokens whose starts are uniform in [0, n - T); y (B, T): each token's successor. `first_row`
// is the number of the first window: gradient accumulation, and the batches of one evaluation, go on counting.
inline void random_batch(int* x, int* y, const Tokens& tokens, uint64_t seed, uint32_t step, uint32_t site,
                         uint64_t first_row, int B, int T) {
  for (int b = 0; b < B; b++) {
    const Philox4 r = random4(seed, step, site, first_row + b);
    const uint64_t start = below(r.word[0], r.word[1], tokens.size() - T);
    tokens.copy(start, T, x + size_t(b) * T);
    tokens.copy(start + 1, T, y + size_t(b) * T);
  }
}
