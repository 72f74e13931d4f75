// N-gram losses against values counted by hand, and against the known losses of Tiny Shakespeare.
#include "test.h"

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "../host/error.h"
#include "../host/files.h"
#include "../host/ngram.h"
#include "../host/shards.h"
#include "../host/text.h"

// The text that the tests below count: a b a a b c, as 0 1 0 0 1 2.
//   alone    a 3, b 2, c 1                     N = 6, t = 3
//   after a  b 2, a 1                          n = 3, t = 2
//   after b  a 1, c 1                          n = 2, t = 2
//   after c  nothing: the text ends there      n = 0, t = 0
//   after ab a 1, c 1                          n = 2, t = 2
static const std::vector<int> counted = {0, 1, 0, 0, 1, 2};
static const std::vector<int> abc = {0, 1, 2};  // the losses of b after a and of c after ab

static double mean(std::vector<double> probabilities) {
  double sum = 0;
  for (const double p : probabilities) sum -= std::log(p);
  return sum / double(probabilities.size());
}

static Approx exactly(double value) { return Approx(value).epsilon(1e-12); }

TEST_CASE("ngram: uniform") { CHECK(uniform_loss(65) == exactly(std::log(65.0))); }

TEST_CASE("ngram: unigram, smoothed only when a character was never seen") {
  CHECK(unigram_loss(counted, abc, 3) == exactly(mean({2. / 6, 1. / 6})));
  CHECK(unigram_loss(counted, abc, 4) == exactly(mean({3. / 10, 2. / 10})));
  CHECK(unigram_loss(counted, std::vector<int>{0, 3}, 4) == exactly(mean({1. / 10})));
}

TEST_CASE("ngram: bigram") {
  CHECK(bigram_loss(counted, abc, 3) == exactly(mean({(2. + 1) / (3 + 3), (1. + 1) / (2 + 3)})));
  CHECK(bigram_loss(counted, abc, 3, 0.5) == exactly(mean({2.5 / 4.5, 1.5 / 3.5})));
  CHECK(bigram_loss(counted, std::vector<int>{2, 1}, 3) == exactly(mean({1. / 3})));  // the text ends at its only c
  // The best that a table can do on its own text. The pairs are ab, ba, aa, ab, bc.
  CHECK(bigram_loss(counted, counted, 3, 0) == exactly(mean({2. / 3, 1. / 2, 1. / 3, 2. / 3, 1. / 2})));
}

TEST_CASE("ngram: Witten-Bell") {
  // P(x)      = (n(x) + 3 * 1/3) / (6 + 3): a 4/9, b 3/9, c 2/9
  CHECK(witten_bell_loss(counted, abc, 3, 1) == exactly(mean({3. / 9, 2. / 9})));
  // P(b | a)  = (2 + 2 * 3/9) / (3 + 2) = 8/15
  // P(c | b)  = (1 + 2 * 2/9) / (2 + 2) = 13/36
  CHECK(witten_bell_loss(counted, abc, 3, 2) == exactly(mean({8. / 15, 13. / 36})));
  // P(c | ab) = (1 + 2 * 13/36) / (2 + 2) = 31/72, while b has no context longer than a
  CHECK(witten_bell_loss(counted, abc, 3, 3) == exactly(mean({8. / 15, 31. / 72})));
  // If a context was never seen, the shorter one decides: P(b | c) = P(b), P(a | cb) = P(a | b).
  CHECK(witten_bell_loss(counted, std::vector<int>{2, 1}, 3, 5) == exactly(mean({3. / 9})));
  CHECK(witten_bell_loss(counted, std::vector<int>{2, 1, 0}, 3, 5) ==
        exactly(mean({3. / 9, (1 + 2 * 4. / 9) / (2 + 2)})));
}

TEST_CASE("ngram: what may follow a context adds up to one") {
  for (const int V : {3, 4, 300}) {
    const std::vector<int> train = {0, 1, 2, V - 1, 0, 1, 2, V - 1, 0, 1, 2, 0, 0, 1, 2};
    const std::vector<int> before = {0, 1, 2};
    double bigram = 0, witten_bell = 0;
    for (int c = 0; c < V; c++) {
      const std::vector<int> after = {0, 1, 2, c};  // -ln P(c | 012) = total loss of `after` - total loss of `before`
      bigram += std::exp(2 * bigram_loss(train, before, V) - 3 * bigram_loss(train, after, V));
      witten_bell += std::exp(2 * witten_bell_loss(train, before, V, 5) - 3 * witten_bell_loss(train, after, V, 5));
    }
    CHECK(bigram == Approx(1).epsilon(1e-9));
    CHECK(witten_bell == Approx(1).epsilon(1e-9));
  }
}

TEST_CASE("ngram: ids that differ in their highest bits alone count like small ones") {
  const int V = 65535;
  std::vector<int> train, scored, train_high, scored_high;
  for (int i = 0; i < 500; i++) (i < 400 ? train : scored).push_back(i * i / 7 % 11);
  for (const int id : train) train_high.push_back(id * 4096);
  for (const int id : scored) scored_high.push_back(id * 4096);
  for (int order = 1; order <= 5; order++)
    CHECK(witten_bell_loss(train, scored, V, order) == exactly(witten_bell_loss(train_high, scored_high, V, order)));
  CHECK(bigram_loss(train, scored, V) == exactly(bigram_loss(train_high, scored_high, V)));
}

TEST_CASE("ngram: baselines survive the round trip, and none are none") {
  const std::string path = test_folder() + "/baselines.json";
  CHECK(load_baselines(path).empty());
  save_baselines(path, {{"uniform", std::log(65.0)}, {"5-gram of 2 M", 1.6687884524027297}});
  const std::vector<Baseline> loaded = load_baselines(path);
  REQUIRE(loaded.size() == 2);
  CHECK(loaded[0].name == "uniform");
  CHECK(loaded[0].loss == std::log(65.0));
  CHECK(loaded[1].name == "5-gram of 2 M");
  CHECK(loaded[1].loss == 1.6687884524027297);
  for (const char* bad : {"", "{}", R"({"baselines": [{"name": "uniform"}]})"}) {
    write_file(path, bad);
    CHECK_THROWS_AS(load_baselines(path), Error);
  }
}

static Tokens as_split(const char* split, const std::vector<uint16_t>& tokens, const Vocabulary& vocabulary) {
  const std::string folder = test_folder();
  ShardWriter writer(folder, split, tokens.size(), vocabulary);
  writer.write(tokens.data(), tokens.size());
  writer.finish();
  return Tokens(folder, split, vocabulary);
}

TEST_CASE("ngram: a long text is counted from its end, and the names say so") {
  // a a a ..., then 2 M characters a b a b ...: if the beginning counted, b after a would not be certain.
  const Vocabulary vocabulary({U'a', U'b'});
  std::vector<uint16_t> train(2'500'000, 0), val(2'000'001);
  for (size_t i = 500'000; i < train.size(); i++) train[i] = uint16_t(i % 2);
  for (size_t i = 0; i < val.size(); i++) val[i] = uint16_t(i % 2);
  val.back() = 1;  // scoring b after b would cost a lot
  const std::vector<Baseline> baselines =
      compute_baselines(as_split("train", train, vocabulary), as_split("val", val, vocabulary), 2);
  REQUIRE(baselines.size() == 4);
  CHECK(baselines[0].name == "uniform");
  CHECK(baselines[1].name == "unigram of 2 M");
  CHECK(baselines[3].name == "5-gram of 2 M");
  CHECK(baselines[1].loss == Approx(std::log(2.0)).epsilon(1e-9));  // the sum of two million terms is rounded
  CHECK(baselines[2].loss < 2e-6);

  val.resize(1);
  CHECK(compute_baselines(as_split("train", train, vocabulary), as_split("val", val, vocabulary), 2).size() == 1);
}

TEST_CASE("ngram: the known values for Tiny Shakespeare") {
  const char* path = std::getenv("MICROGPT_TEXT");
  if (!path) {
    skip("MICROGPT_TEXT does not name Tiny Shakespeare");
    return;
  }
  const std::string shakespeare = read_file(path);
  REQUIRE(shakespeare.size() == 1115394);
  std::vector<bool> seen(128, false);
  for (const char c : shakespeare) seen.at(size_t(c)) = true;
  std::vector<char32_t> characters;
  for (char32_t c = 0; c < 128; c++)
    if (seen[c]) characters.push_back(c);
  const Vocabulary vocabulary(characters);
  REQUIRE(vocabulary.size() == 65);
  const std::vector<uint16_t> ids = vocabulary.encode(shakespeare, path);
  const std::vector<int> train(ids.begin(), ids.begin() + 1003854), val(ids.begin() + 1003854, ids.end());
  CHECK(unigram_loss(train, val, 65) == Approx(3.3473).margin(5e-5));
  CHECK(bigram_loss(train, val, 65) == Approx(2.4819).margin(5e-5));
  CHECK(bigram_loss(train, train, 65, 0) == Approx(2.4519).margin(5e-5));
  CHECK(witten_bell_loss(train, val, 65, 4) == Approx(1.7738).margin(5e-5));
  CHECK(witten_bell_loss(train, val, 65, 5) == Approx(1.6688).margin(5e-5));
}
