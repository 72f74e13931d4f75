#include <cmath>
#include <set>
#include <vector>

#include "../host/random.h"
#include "../kernels/residual.h"
#include "test.h"

// The known answers of Random123, the library of Philox's authors (kat_vectors, philox4x32 10).
TEST_CASE("Philox gives the published answers") {
  struct Known {
    Philox4 counter;
    uint32_t key0, key1;
    Philox4 answer;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       0xffffffff,
       0xffffffff,
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Known& k : known) {
    const Philox4 r = philox4x32_10(k.counter, k.key0, k.key1);
    for (int i = 0; i < 4; i++) CHECK(r.word[i] == k.answer.word[i]);
  }
}

TEST_CASE("Random numbers by lanes are those drawn one by one") {
  uint32_t words[4][32];
  const uint64_t first = 0xfffffff0;  // the index passes 2^32
  random4_lanes(words, 7, 8, site::fc_dropout + 3, first);
  for (int i = 0; i < 32; i++) {
    const Philox4 r = random4(7, 8, site::fc_dropout + 3, first + i);
    for (int w = 0; w < 4; w++) CHECK(words[w][i] == r.word[w]);
  }
}

TEST_CASE("Sites, steps, seeds and indices all change the numbers") {
  std::set<uint32_t> seen;
  for (const uint64_t seed : {1ull, 2ull, 1ull << 32})
    for (const uint32_t step : {0u, 1u})
      for (const uint32_t where : {site::init, site::batch, site::batch + 1})
        for (const uint64_t index : {0ull, 1ull, 1ull << 32}) seen.insert(random4(seed, step, where, index).word[0]);
  CHECK(seen.size() == 3 * 2 * 3 * 3);
}

TEST_CASE("below is the high half of the product") {
  CHECK(below(0, 0, 1000) == 0);
  CHECK(below(0xffffffff, 0xffffffff, 1000) == 999);
  CHECK(below(0x80000000, 0, 1000) == 500);
  CHECK(below(0xffffffff, 0xffffffff, ~0ull) == ~0ull - 1);
  CHECK(below(0x40000000, 0, 1ull << 40) == 1ull << 38);
  CHECK(below(0x12345678, 0x9abcdef0, 0xfedcba987) == 0x121fa00adull);  // 0x123456789abcdef0 * 0xfedcba987 >> 64
}

TEST_CASE("Normal numbers have the moments of N(0, 1)") {
  const int n = 400000;
  double sum = 0, squares = 0, cubes = 0, fourths = 0;
  for (int i = 0; i < n; i += 4) {
    double x[4];
    normal4(x, random4(1, 0, site::init, uint64_t(i / 4)));
    for (const double v : x) {
      sum += v;
      squares += v * v;
      cubes += v * v * v;
      fourths += v * v * v * v;
    }
  }
  // Each may be off by four standard errors: sqrt(1, 2, 15, 96) / sqrt(n).
  CHECK(std::fabs(sum / n) < 4 * std::sqrt(1.0 / n));
  CHECK(std::fabs(squares / n - 1) < 4 * std::sqrt(2.0 / n));
  CHECK(std::fabs(cubes / n) < 4 * std::sqrt(15.0 / n));
  CHECK(std::fabs(fourths / n - 3) < 4 * std::sqrt(96.0 / n));
}

TEST_CASE("Dropout keeps the share that it says, and its scale is the exact inverse") {
  CHECK(dropout_threshold(0) == 65536);
  CHECK(dropout_threshold(0.2) == 52429);
  for (const double p : {0.1, 0.2, 0.5}) {
    const uint32_t threshold = dropout_threshold(p);
    CHECK(dropout_scale(threshold) * threshold == Approx(65536).epsilon(1e-15));
    const int B = 4, T = 31, C = 48, count = B * T * C;
    const Dropout drop = {1, 2, site::proj_dropout, threshold, 0};
    std::vector<double> ones(count, 1), out(count);
    residual_backward<double>(out.data(), ones.data(), drop, B, T, C);
    int kept = 0;
    for (const double x : out) {
      CHECK((x == 0 || x == dropout_scale(threshold)));
      kept += x != 0;
    }
    CHECK(std::fabs(double(kept) / count - (1 - p)) < 4 * std::sqrt(p * (1 - p) / count));
  }
}

TEST_CASE("Dropout numbers its elements over the whole batch, whatever part of it is computed") {
  const int T = 5, C = 7, B = 12;  // T * C is no multiple of the eight elements that share a counter
  std::vector<float> ones(B * T * C, 1), whole(ones.size()), parts(ones.size());
  Dropout drop = {3, 4, site::fc_dropout + 1, dropout_threshold(0.3), 0};
  residual_backward<float>(whole.data(), ones.data(), drop, B, T, C);
  for (int b = 0; b < B; b += 3) {
    drop.first_row = b;
    residual_backward<float>(parts.data() + b * T * C, ones.data(), drop, 3, T, C);
  }
  CHECK((whole == parts));
}
