// From logits to text, one token at a time.
// defines: choose_token, Choice, Sampling, generate
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "random.h"

// Draws from softmax(logits (V) / temperature), restricted to the top_k likeliest (0: all); temperature 0 takes the
// likeliest, the first of equals. uniform is in (0, 1).
inline int choose_token(const float* logits, int V, double temperature, int top_k, double uniform) {
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

// How a token is drawn, and the random number for it.
struct Choice {
  double temperature = 1;
  int top_k = 0;  // 0: all
  double uniform = 0.5;
};

struct Sampling {
  int count;  // tokens to add
  Choice choice;
  uint64_t seed;
  int sample;  // its number: every sample has random numbers of its own
};

// Goes on from the tokens of a prompt, which is not empty. model.next_token(context, n, known, choice) draws the token
// that follows the n <= T tokens of context, the first `known` of which, and their positions, are those of the call
// before: the model may still have their keys and values. emit(token) is called for every new token; it returns false to
// stop.
template <class Model, class Emit>
void generate(Model& model, std::vector<int> tokens, const Sampling& s, Emit emit) {
  const size_t T = model.shape().T;
  size_t known = 0;
  for (int i = 0; i < s.count; i++) {
    const size_t n = std::min(tokens.size(), T);
    Choice choice = s.choice;
    choice.uniform = unit_open(random4(s.seed, uint32_t(i), site::sampler, uint64_t(s.sample)).word[0]);
    const int token = model.next_token(tokens.data() + tokens.size() - n, int(n), int(known), choice);
    known = tokens.size() < T ? n : 0;  // once the window rolls, every token moves to another position
    if (!emit(token)) return;
    tokens.push_back(token);
  }
}
