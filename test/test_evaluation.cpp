// Which validation tokens decide which checkpoint is the best: fixed_loss in host/evaluation.h.
#include <algorithm>
#include <numeric>

#include "../host/evaluation.h"
#include "test.h"

namespace {

// Notes which targets it scores. The loss of a target is its number, so that sums are exact.
struct Counting final : Scorer {
  int T;
  std::vector<uint64_t> scored = {};
  int most_windows = 0;
  explicit Counting(int length) : T(length) {}
  int chunk() const override { return 1; }
  std::vector<double> random_losses(Split, int, int, int count) override { return std::vector<double>(size_t(count)); }
  ModelShape shape() const override {
    ModelShape shape;
    shape.T = T;
    return shape;
  }
  double window_losses(Split split, uint64_t at, int B, int n, uint64_t stride = 0) override {
    CHECK(split == Split::val);
    most_windows = std::max(most_windows, B);
    double sum = 0;
    for (int b = 0; b < B; b++)
      for (int t = 0; t < n; t++) {
        scored.push_back(at + uint64_t(b) * (stride ? stride : uint64_t(n)) + uint64_t(t) + 1);
        sum += double(scored.back());
      }
    return sum;
  }
};

}  // namespace

TEST_CASE("A short validation split is scored exactly, up to the bound") {
  for (const uint64_t tokens : {uint64_t(2), uint64_t(129), uint64_t(111'540), fixed_tokens + 1})
    for (const int batch_size : {1, 16}) {
      Counting scorer(128);
      const double loss = fixed_loss(scorer, Split::val, tokens, batch_size);
      std::vector<uint64_t> all(tokens - 1);
      std::iota(all.begin(), all.end(), 1);
      CHECK((scorer.scored == all));
      CHECK(loss == double(tokens) / 2);
      CHECK(fixed_name(tokens, 128) == "exact val loss");
    }
}

TEST_CASE("Windows that overlap score every target once, with at least T - stride tokens before it") {
  // The loss of a target is its number, so one that is left out or counted twice shows in the sum.
  for (const uint64_t tokens : {5, 17, 18, 33, 100, 111})
    for (const int stride : {1, 3, 8, 15, 16})
      for (const int batch_size : {1, 4}) {
        INFO(tokens << " tokens, stride " << stride);
        Counting scorer(16);
        CHECK(strided_loss(scorer, Split::val, tokens, batch_size, stride) == double(tokens) / 2);
      }
  // What a target has before it: the loss of a target at place t of its window is t.
  struct Places final : Scorer {
    int chunk() const override { return 1; }
    std::vector<double> random_losses(Split, int, int, int) override { return {}; }
    ModelShape shape() const override { return {1, 16, 1, 1, 1}; }
    double window_losses(Split, uint64_t, int B, int n, uint64_t) override { return B * (n * (n - 1) / 2); }
  } places;
  // 101 targets: 16 of the first window, then 21 windows of 4 at the places 12 to 15, then one target at the last place.
  CHECK(strided_loss(places, Split::val, 102, 4, 4) * 101 == Approx(120 + 21 * 54 + 15));
}

TEST_CASE("Of a long validation split the same windows are scored, evenly spaced, whatever the batch") {
  for (const int T : {128, 256, 1000, 200'000})
    for (const uint64_t tokens : {fixed_tokens + 2, uint64_t(1'000'003), uint64_t(5'000'000'000)}) {
      if (tokens <= uint64_t(T)) continue;
      INFO("T " << T << ", " << tokens << " tokens");
      Counting one(T), many(T);
      const double loss = fixed_loss(one, Split::val, tokens, 1);
      CHECK(fixed_loss(many, Split::val, tokens, 24) == loss);
      CHECK(many.most_windows == std::min<int>(24, int(many.scored.size() / size_t(T))));
      CHECK((one.scored == many.scored));
      const size_t windows = one.scored.size() / size_t(T);
      CHECK(one.scored.size() == windows * size_t(T));
      CHECK((windows == 1 || one.scored.size() <= fixed_tokens));
      CHECK((T > 1000 || one.scored.size() > fixed_tokens - uint64_t(T)));
      CHECK(fixed_name(tokens, T) == text("val loss of ", windows, " fixed windows"));
      CHECK(one.scored.front() == 1);
      CHECK(one.scored.back() < tokens);
      CHECK(std::is_sorted(one.scored.begin(), one.scored.end()));
      CHECK(std::adjacent_find(one.scored.begin(), one.scored.end()) == one.scored.end());  // no target is scored twice
      // The windows reach from the first token to the last: a larger stride would not fit.
      if (windows > 1) {
        const uint64_t stride = one.scored[size_t(T)] - one.scored[0];
        for (size_t k = 0; k < windows; k++) CHECK(one.scored[k * size_t(T)] == 1 + k * stride);
        CHECK(tokens - 1 - windows * stride < windows);
      }
    }
}

TEST_CASE("A loss is also told in bits") { CHECK(loss_text(1.5123) == "1.5123 (2.182 bits per character)"); }
