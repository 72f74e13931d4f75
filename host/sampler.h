// From logits to text, one token at a time.
// defines: Choice, choose_token, Sampling, generate
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "random.h"

// How a token is drawn, and the random number for it.
struct Choice {
  double temperature = 1;
  int top_k = 0;         // 0: all
  double uniform = 0.5;  // in (0, 1)
};

// Draws from softmax(logits (V) / temperature), restricted to the top_k likeliest (0: all); temperature 0 takes the
// likeliest, the first of equals.
inline int choose_token(const float* logits, int V, const Choice& choice) {
  const auto [temperature, top_k, uniform] = choice;
  std::vector<int> order(V);
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](int i, int j) { return logits[i] != logits[j] ? logits[i] > logits[j] : i < j; };
  if (temperature == 0) return *std::min_element(order.begin(), order.end(), likelier);
  if (top_k > 0 && top_k < V) {
    std::nth_element(order.begin(), order.begin() + top_k, order.end(), likelier);
    order.resize(top_k);
    std::sort(order.begin(), order.end());
  }
  const double max = logits[*std::min_element(order.begin(), order.end(), likelier)];
  std::vector<double> cumulated;
  double sum = 0;
  for (const int i : order) cumulated.push_back(sum += std::exp((logits[i] - max) / temperature));
  const auto at = std::upper_bound(cumulated.begin(), cumulated.end(), uniform * sum);
  return order[std::min<size_t>(at - cumulated.begin(), order.size() - 1)];
}

struct Sampling {
  int count;      // tokens to add to each text
  Choice choice;  // for every token, but for its random number
  uint64_t seed;
  int first;        // number of the first sample: every sample has random numbers of its own
  int samples = 1;  // texts that grow side by side

  Choice choice_of(int i, int k = 0) const {  // of the i-th new token of text k
    const Philox4 r = random4(seed, uint32_t(i), site::sampler, uint64_t(first) + uint64_t(k));
    return {choice.temperature, choice.top_k, unit_open(r.word[0])};
  }
};

// Goes on from the tokens of a prompt, which is not empty, with s.samples texts side by side: each is the text that it
// would be alone. emit(k, token) is called for every new token of text k; it returns false to stop all of them.
//
// model.next_tokens(contexts, n, known, s, i) draws new tokens from number i on, at least one of each text and at most
// those that are missing. It returns them in that order: number i of each text, then number i + 1 of each. They follow
// contexts (samples, n), n <= T. The first `known` tokens of each row stood at the same positions in the call before, so
// the model may still have their keys and values.
template <class Model, class Emit>
void generate(Model& model, const std::vector<int>& prompt, const Sampling& s, Emit emit) {
  const size_t T = model.shape().T, samples = size_t(s.samples);
  std::vector<std::vector<int>> texts(samples, prompt);
  size_t known = 0;
  for (int i = 0; i < s.count;) {
    const size_t n = std::min(texts[0].size(), T);
    std::vector<int> contexts;
    for (const std::vector<int>& text : texts) contexts.insert(contexts.end(), text.end() - long(n), text.end());
    const std::vector<int> drawn = model.next_tokens(contexts.data(), int(n), int(known), s, i);
    for (size_t j = 0; j < drawn.size(); j++) {
      if (!emit(int(j % samples), drawn[j])) return;
      texts[j % samples].push_back(drawn[j]);
    }
    i += int(drawn.size() / samples);
    known = texts[0].size() <= T ? n : 0;  // once the window rolls, every token moves to another position
  }
}
