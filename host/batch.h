// Batches: B independent windows of the text, each begun at random. Which ones is a function of seed, step and row.
// defines: random_batch
#pragma once
#include <cstdint>
#include <vector>

#include "random.h"
#include "shards.h"

// x (B, T): windows of T tokens whose starts are uniform in [0, n - T); y (B, T): each token's successor. `first_row`
// is the number of the first window: gradient accumulation, and the batches of one evaluation, go on counting.
inline void random_batch(int* x, int* y, const Tokens& tokens, uint64_t seed, uint32_t step, uint32_t site,
                         uint64_t first_row, int B, int T) {
  std::vector<int> window(size_t(T) + 1);
  for (int b = 0; b < B; b++) {
    const Philox4 r = random4(seed, step, site, first_row + b);
    tokens.copy(below(r.word[0], r.word[1], tokens.size() - T), window.size(), window.data());
    for (int t = 0; t < T; t++) {
      x[size_t(b) * T + t] = window[t];
      y[size_t(b) * T + t] = window[t + 1];
    }
  }
}
