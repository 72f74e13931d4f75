// host/batch.h: where the windows of a batch begin.
#include "../host/batch.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <vector>

#include "test.h"

TEST_CASE("A random order has each element once, and is another one for each epoch and seed", "[batch]") {
  for (const uint64_t n : {1, 2, 3, 4, 5, 16, 17, 1000, 4096, 7842}) {
    INFO("n " << n);
    std::vector<uint64_t> order, other, third;
    for (uint64_t i = 0; i < n; i++) {
      order.push_back(shuffled(i, n, 1, 0));
      other.push_back(shuffled(i, n, 1, 1));
      third.push_back(shuffled(i, n, 2, 0));
    }
    if (n > 16) CHECK((order != other && order != third && other != third));
    for (std::vector<uint64_t>* elements : {&order, &other, &third}) {
      std::sort(elements->begin(), elements->end());
      std::vector<uint64_t> all(n);
      std::iota(all.begin(), all.end(), 0);
      CHECK((*elements == all));
    }
  }
}

TEST_CASE("In a random order each place has each element equally often", "[batch]") {
  constexpr int n = 40, epochs = 20000;
  int count[n][n] = {};
  for (uint32_t epoch = 0; epoch < epochs; epoch++)
    for (uint64_t i = 0; i < n; i++) count[i][shuffled(i, n, 3, epoch)]++;
  double chi_squared = 0;  // with (n - 1)^2 = 1521 degrees of freedom
  for (const auto& row : count)
    for (const int c : row) chi_squared += (c - epochs / n) * (c - epochs / n) / double(epochs / n);
  CHECK(chi_squared < 1521 + 4 * 55);  // mean and four standard deviations
}

TEST_CASE("An epoch takes each of its windows once; the next cuts elsewhere", "[batch]") {
  struct Text {
    uint64_t n;
    int T;
  };
  for (const Text text : {Text{1000, 31}, {1000, 1}, {2, 1}, {50, 49}, {97, 49}, {98, 49}, {99, 49}, {147, 49}}) {
    const uint64_t T = uint64_t(text.T), windows = std::max<uint64_t>(text.n / T, 2) - 1;
    INFO("n " << text.n << ", T " << T);
    const uint64_t possible = text.n - windows * T;
    std::set<uint64_t> cuts;
    for (uint64_t epoch = 0; epoch < 12 * possible; epoch++) {
      std::set<uint64_t> starts;
      for (uint64_t i = 0; i < windows; i++) starts.insert(shuffled_start(text.n, text.T, 9, epoch * windows + i));
      REQUIRE(starts.size() == windows);
      CHECK(*starts.rbegin() + T < text.n);  // the last token has a successor
      CHECK(*starts.rbegin() - *starts.begin() == (windows - 1) * T);
      for (const uint64_t start : starts) CHECK((start - *starts.begin()) % T == 0);
      cuts.insert(*starts.begin());
    }
    CHECK(cuts.size() == possible);  // so each token is read in some epoch, the first and the last too
  }
}

TEST_CASE("A shuffled run's windows depend on how many rows have gone before, not on how they were divided",
          "[batch]") {
  const uint64_t n = 5000, seed = 4;
  const int T = 16;
  std::vector<uint64_t> whole, divided;
  for (uint32_t step = 0; step < 100; step++)
    for (uint64_t row = 0; row < 12; row++) whole.push_back(window_start(n, T, seed, step, site::batch, row, 12));
  for (uint32_t step = 0; step < 400; step++)
    for (uint64_t row = 0; row < 3; row++) divided.push_back(window_start(n, T, seed, step, site::batch, row, 3));
  CHECK((whole == divided));

  // An evaluation draws at random, and so does a run whose rows are not counted.
  const uint64_t random = random_start(n, T, seed, 7, site::eval_val, 2);
  CHECK(window_start(n, T, seed, 7, site::eval_val, 2, 12) == random);
  CHECK(window_start(n, T, seed, 7, site::batch, 2, 0) == random_start(n, T, seed, 7, site::batch, 2));
}
