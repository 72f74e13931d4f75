// What counting alone achieves: the losses a model is compared with. All are mean cross-entropies in nats per
// character.
//
// They score what the exact validation loss scores: every character of a text but its first counts once. A context
// never reaches back beyond the start of that text, so near the start it is shorter.
// defines: uniform_loss, unigram_loss, bigram_loss, witten_bell_loss, Baseline, compute_baselines, save_baselines,
//          load_baselines
#pragma once
#include <span>
#include <string>
#include <vector>

class Tokens;

double uniform_loss(int V);  // ln V

// P(c) = n(c) / N. Only when a character of the vocabulary never occurs in `train` is one added to every count.
double unigram_loss(std::span<const int> train, std::span<const int> scored, int V);

// P(c | b) = (n(bc) + added) / (n(b) + added V), n(b) counted where something follows. One added is Laplace's rule.
// With nothing added and `train` itself scored it is the best that any table of bigrams can do there.
double bigram_loss(std::span<const int> train, std::span<const int> scored, int V, double added = 1);

// Interpolates all contexts h of 0 to order - 1 characters, each with its shorter one h':
//   P(c | h) = (n(hc) + t(h) P(c | h')) / (n(h) + t(h)),  below the empty context P = 1 / V,
// where t(h) counts the different characters seen after h: what has had many continuations may well have another one.
// Method C of Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991.
double witten_bell_loss(std::span<const int> train, std::span<const int> scored, int V, int order);

struct Baseline {
  std::string name;
  double loss;
};

// All of the above, the last with order 5. Of a long text the last 2 M characters to train on are counted and the first
// 2 M to validate are scored, and the names say so: "5-gram of 2 M".
std::vector<Baseline> compute_baselines(const Tokens& train, const Tokens& val, int V);

// baselines.json: {"unit": "nats per character", "baselines": [{"name": "uniform", "loss": 4.174}, ...]}
void save_baselines(const std::string& path, const std::vector<Baseline>& baselines);
std::vector<Baseline> load_baselines(const std::string& path);  // none, if there is no such file
