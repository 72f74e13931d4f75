#include "ngram.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "error.h"
#include "files.h"
#include "shards.h"

namespace {

// A context of up to four tokens, packed 16 bits each, and the token that follows it.
struct Gram {
  uint64_t context;
  int next;
  bool operator==(const Gram&) const = default;
};
struct GramHash {
  size_t operator()(const Gram& g) const {
    uint64_t x = (g.context ^ uint64_t(g.next) << 47) * 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 32) * 0x9E3779B97F4A7C15ull;
    return size_t(x ^ x >> 29);
  }
};

// Calls visit(i, context, next) for each place i, from `first` on, that has k tokens before it: these are the context,
// and next is the token at that place.
template <class Visit>
void each_gram(std::span<const int> tokens, int k, size_t first, Visit visit) {
  const uint64_t mask = k == 0 ? 0 : ~uint64_t{0} >> (64 - 16 * k);
  uint64_t context = 0;
  for (size_t i = 0; i < tokens.size(); i++) {
    if (i >= std::max(size_t(k), first)) visit(i, context, tokens[i]);
    context = (context << 16 | uint64_t(tokens[i])) & mask;
  }
}

// How often each context was followed by something, by how many different tokens, and by which.
struct Counts {
  struct Context {
    uint64_t total = 0, distinct = 0;
  };
  std::unordered_map<uint64_t, Context> contexts;
  std::unordered_map<Gram, uint64_t, GramHash> grams;

  // Contexts that are never asked for are not kept: this bounds the memory by the scored text, whatever the vocabulary.
  Counts(std::span<const int> train, std::span<const int> scored, int k) {
    each_gram(scored, k, 1, [&](size_t, uint64_t context, int) { contexts[context]; });
    each_gram(train, k, 0, [&](size_t, uint64_t context, int next) {
      const auto found = contexts.find(context);
      if (found == contexts.end()) return;
      found->second.total++;
      if (grams[{context, next}]++ == 0) found->second.distinct++;
    });
  }
  double count(uint64_t context, int next) const {
    const auto found = grams.find({context, next});
    return found == grams.end() ? 0 : double(found->second);
  }
};

// P(c | the k tokens before) = (n(hc) + added) / (n(h) + added V).
double additive_loss(std::span<const int> train, std::span<const int> scored, int V, int k, double added) {
  const Counts counts(train, scored, k);
  double sum = 0;
  each_gram(scored, k, 1, [&](size_t, uint64_t context, int next) {
    const double total = double(counts.contexts.at(context).total);
    sum -= std::log((counts.count(context, next) + added) / (total + added * V));
  });
  return sum / double(scored.size() - 1);
}

}  // namespace

double uniform_loss(int V) { return std::log(double(V)); }

double unigram_loss(std::span<const int> train, std::span<const int> scored, int V) {
  std::vector<bool> seen(size_t(V), false);
  for (const int token : train) seen[size_t(token)] = true;
  const bool all_seen = std::find(seen.begin(), seen.end(), false) == seen.end();
  return additive_loss(train, scored, V, 0, all_seen ? 0 : 1);
}

double bigram_loss(std::span<const int> train, std::span<const int> scored, int V, double added) {
  return additive_loss(train, scored, V, 1, added);
}

double witten_bell_loss(std::span<const int> train, std::span<const int> scored, int V, int order) {
  if (order < 1 || order > 5) fail("an n-gram of order ", order, " is impossible: 1 to 5");
  // The recursion from the empty context up, for all places at once: only one length of context is in memory at a time.
  std::vector<double> p(scored.size(), 1.0 / V);
  for (int k = 0; k < order; k++) {
    const Counts counts(train, scored, k);
    each_gram(scored, k, 1, [&](size_t i, uint64_t context, int next) {
      const auto& [total, distinct] = counts.contexts.at(context);
      if (total == 0) return;  // never seen: the shorter context decides
      p[i] = (counts.count(context, next) + double(distinct) * p[i]) / double(total + distinct);
    });
  }
  double sum = 0;
  for (size_t i = 1; i < p.size(); i++) sum -= std::log(p[i]);
  return sum / double(p.size() - 1);
}

std::vector<Baseline> compute_baselines(const Tokens& train, const Tokens& val, int V) {
  constexpr uint64_t most = 2'000'000;
  std::vector<Baseline> baselines = {{"uniform", uniform_loss(V)}};
  if (val.size() < 2) return baselines;  // nothing to score
  std::vector<int> counted(std::min(train.size(), most)), scored(std::min(val.size(), most));
  train.copy(train.size() - counted.size(), counted.size(), counted.data());
  val.copy(0, scored.size(), scored.data());

  const std::string limits = train.size() > most || val.size() > most ? " of 2 M" : "";
  baselines.push_back({"unigram" + limits, unigram_loss(counted, scored, V)});
  baselines.push_back({"bigram" + limits, bigram_loss(counted, scored, V)});
  baselines.push_back({"5-gram" + limits, witten_bell_loss(counted, scored, V, 5)});
  return baselines;
}

void save_baselines(const std::string& path, const std::vector<Baseline>& baselines) {
  nlohmann::ordered_json json = {{"unit", "nats per character"}};
  nlohmann::ordered_json& list = json["baselines"] = nlohmann::ordered_json::array();
  for (const Baseline& b : baselines) list.push_back({{"name", b.name}, {"loss", b.loss}});
  write_file(path, json.dump(1) + "\n");
}

std::vector<Baseline> load_baselines(const std::string& path) {
  if (!std::filesystem::exists(path)) return {};
  const std::string content = read_file(path);
  refuse_other(path, content, "JSON", "run ./data_prep again");
  try {
    const nlohmann::json json = nlohmann::json::parse(content);
    std::vector<Baseline> baselines;
    for (const auto& b : json.at("baselines")) baselines.push_back({b.at("name"), b.at("loss")});
    return baselines;
  } catch (const nlohmann::json::exception& e) { fail(path, " is damaged: ", e.what(), " (run ./data_prep again)"); }
}
