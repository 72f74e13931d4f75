#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "../host/sampler.h"
#include "../host/schedule.h"
#include "test.h"

TEST_CASE("Tokens are drawn with the probabilities of the softmax") {
  const std::vector<float> logits = {std::log(1.f), std::log(2.f), std::log(5.f)};  // 1/8, 2/8, 5/8
  const auto choose = [&](double uniform, double temperature = 1, int top_k = 0) {
    return choose_token(logits.data(), 3, {temperature, top_k, uniform});
  };
  CHECK(choose(0.124) == 0);
  CHECK(choose(0.126) == 1);
  CHECK(choose(0.374) == 1);
  CHECK(choose(0.376) == 2);
  CHECK(choose(1 - 1e-12) == 2);
  // temperature 1/2 squares the weights: 1/30, 4/30, 25/30
  CHECK(choose(0.9 / 30, 0.5) == 0);
  CHECK(choose(1.1 / 30, 0.5) == 1);
  CHECK(choose(5.1 / 30, 0.5) == 2);
  // the two likeliest: 2/7, 5/7
  CHECK(choose(0.001, 1, 2) == 1);
  CHECK(choose(1.9 / 7, 1, 2) == 1);
  CHECK(choose(2.1 / 7, 1, 2) == 2);
  CHECK(choose(0.001, 1, 1) == 2);
  CHECK(choose(0.001, 1, 99) == 0);  // top_k above V keeps all
  CHECK(choose(0.001, 0) == 2);
  const std::vector<float> equal = {1, 3, 3};
  CHECK(choose_token(equal.data(), 3, {0, 0, 0.5}) == 1);
  CHECK(choose_token(equal.data(), 3, {1, 1, 0.99}) == 1);
  const std::vector<float> huge = {1e30f, -1e30f, 0};
  CHECK(choose_token(huge.data(), 3, {1e-3, 0, 0.999}) == 0);
}

namespace {

// Notes every call; its next token is the sum of the last T = 4 tokens modulo V. It draws at_once tokens of each text.
struct Recorder {
  int at_once = 1;
  ModelShape shape_ = {10, 4, 1, 1, 1};
  std::vector<std::vector<int>> asked;
  const ModelShape& shape() const { return shape_; }
  std::vector<int> next_tokens(const int* contexts, int n, int known, const Sampling& s, int i) {
    asked.push_back({contexts, contexts + s.samples * n});
    asked.back().push_back(-known);
    std::vector<std::vector<int>> texts;
    for (int k = 0; k < s.samples; k++) texts.push_back({contexts + k * n, contexts + (k + 1) * n});
    std::vector<int> tokens;
    for (int j = 0; j < std::min(at_once, s.count - i); j++)
      for (std::vector<int>& text : texts) {
        const auto window = text.size() > 4 ? text.end() - 4 : text.begin();
        text.push_back(std::accumulate(window, text.end(), 0) % 10);
        tokens.push_back(text.back());
      }
    return tokens;
  }
};

}  // namespace

TEST_CASE("Generation rolls a window of the last T tokens and says which of them are known") {
  Recorder model;
  std::vector<int> out;
  generate(model, {1, 2}, {5, {}, 1, 0}, [&](int, int token) { return out.push_back(token), true; });
  CHECK(out == std::vector<int>{3, 6, 2, 3, 4});  // 1+2, 1+2+3, 1+2+3+6, then 2+3+6+2, 3+6+2+3
  const std::vector<std::vector<int>> expected = {
      {1, 2, 0}, {1, 2, 3, -2}, {1, 2, 3, 6, -3}, {2, 3, 6, 2, 0}, {3, 6, 2, 3, 0}};
  CHECK(model.asked == expected);

  out.clear();
  generate(model, {1, 2}, {5, {}, 1, 0}, [&](int, int token) { return out.push_back(token), out.size() < 2; });
  CHECK(out.size() == 2);
}

TEST_CASE("Generation takes several tokens at once, of several texts") {
  Recorder model;
  model.at_once = 2;
  std::vector<int> out[2];
  generate(model, {1, 2}, {5, {}, 1, 0, 2}, [&](int k, int token) { return out[k].push_back(token), true; });
  for (const std::vector<int>& text : out) CHECK(text == std::vector<int>{3, 6, 2, 3, 4});
  const std::vector<std::vector<int>> expected = {
      {1, 2, 1, 2, 0}, {1, 2, 3, 6, 1, 2, 3, 6, -2}, {3, 6, 2, 3, 3, 6, 2, 3, 0}};
  CHECK(model.asked == expected);
}

TEST_CASE("Every token of every sample has a random number of its own") {
  const Sampling s = {10, {0.5, 3}, 42, 7, 3};
  CHECK(s.choice_of(4).temperature == 0.5);
  CHECK(s.choice_of(4).top_k == 3);
  CHECK(s.choice_of(4, 2).uniform == Sampling{10, {}, 42, 9}.choice_of(4).uniform);
  CHECK(s.choice_of(4, 2).uniform == unit_open(random4(42, 4, site::sampler, 9).word[0]));
  std::set<double> different;
  for (int i = 0; i < 10; i++)
    for (int k = 0; k < 3; k++) different.insert(s.choice_of(i, k).uniform);
  CHECK(different.size() == 30);
}

TEST_CASE("The learning rate warms up, decays and stays") {
  Config c;
  c.learning_rate = 1;
  c.min_lr = 0.1;
  c.warmup_iters = 9;
  c.max_iters = 109;
  CHECK(learning_rate_at(c, 0) == Approx(0.1));
  CHECK(learning_rate_at(c, 8) == Approx(0.9));
  CHECK(learning_rate_at(c, 9) == 1);
  CHECK(learning_rate_at(c, 100) == 1);
  c.decay_lr = true;
  CHECK(learning_rate_at(c, 9) == 1);
  CHECK(learning_rate_at(c, 59) == Approx(0.55));
  CHECK(learning_rate_at(c, 34) == Approx(0.1 + 0.45 * (1 + std::sqrt(0.5))));
  CHECK(learning_rate_at(c, 109) == 0.1);
  CHECK(learning_rate_at(c, 1000) == 0.1);
  c.lr_decay = "linear";
  CHECK(learning_rate_at(c, 9) == 1);
  CHECK(learning_rate_at(c, 34) == Approx(0.1 + 0.75 * 0.9));
  CHECK(learning_rate_at(c, 108) == Approx(0.1 + 0.01 * 0.9));
  CHECK(learning_rate_at(c, 109) == 0.1);
  c.lr_decay = "cosine";
  c.lr_decay_iters = 59;
  CHECK(learning_rate_at(c, 34) == Approx(0.55));
  CHECK(learning_rate_at(c, 59) == 0.1);
  c.warmup_iters = 0;
  CHECK(learning_rate_at(c, 0) == 1);
}

TEST_CASE("A warm-up as long as the decay, or longer, ends at min_lr") {
  for (const std::string decay : {"cosine", "linear"})
    for (const int warmup : {100, 150}) {
      Config c;
      c.learning_rate = 1;
      c.min_lr = 0.1;
      c.decay_lr = true;
      c.lr_decay = decay;
      c.lr_decay_iters = 100;
      c.warmup_iters = warmup;
      INFO(decay << ", warm-up " << warmup);
      CHECK(learning_rate_at(c, 0) == Approx(1.0 / (warmup + 1)));
      CHECK(learning_rate_at(c, warmup - 1) == Approx(double(warmup) / (warmup + 1)));
      CHECK(learning_rate_at(c, warmup) == 0.1);
      CHECK(learning_rate_at(c, warmup + 1) == 0.1);
    }
}
