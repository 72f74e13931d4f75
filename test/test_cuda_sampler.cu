#include "../host/sampler.h"
#include "../kernels/sampler.cuh"
#include "cuda.h"

namespace {

// The device's token and the host's, for the logits rounded to Real. The padding is larger than all logits.
template <class Real>
std::pair<int, int> sample(const std::vector<float>& logits, double temperature, int top_k, double uniform) {
  const int V = int(logits.size());
  std::vector<float> row = logits;
  row.resize(V + 8, 6e4f);
  const Choice choice{temperature, top_k, uniform};
  DeviceArray<Real> in(row);
  DeviceArray<int> x(1), tokens(1), lengths(std::vector<int>{1}), drawn(std::vector<int>{0});
  DeviceArray<Choice> choices(std::vector<Choice>{choice});
  const Texts texts = {x.data(), lengths.data(), drawn.data(), choices.data(), tokens.data()};
  sample_token(texts, in.data(), 1, 1, V, V + 8, nullptr);
  const std::vector<float> seen = rounded<Real, float>(logits);
  return {tokens.read()[0], choose_token(seen.data(), V, choice)};
}

}  // namespace

TEMPLATE_TEST_CASE("The device draws the token that the host draws", "[cuda]", float, bf16, fp16) {
  uint64_t draw = 0;
  size_t different = 0, nonzero = 0, count = 0;
  for (const int V : {1, 2, 65, 300, 5000}) {
    // A scale of 0.3 gives many equal logits once they are rounded to 16 bits.
    for (const double scale : {0.3, 3.0}) {
      const std::vector<float> logits = noise(V, uint32_t(V), scale);
      for (const double temperature : {0.0, 0.1, 1.0, 3.0})
        for (const int top_k : {0, 1, 2, 10, V - 1, V, V + 1}) {
          if (V == 5000 && top_k != 0 && top_k != 10 && top_k != V - 1) continue;
          for (int i = 0; i < (V == 65 ? 2 : 1); i++) {
            const double uniform = unit_open(random4(5, 0, 0, draw++).word[0]);
            const auto [got, want] = sample<TestType>(logits, temperature, top_k, uniform);
            INFO("V " << V << ", scale " << scale << ", temperature " << temperature << ", top_k " << top_k
                      << ", uniform " << uniform << ": " << got << " instead of " << want);
            if (got != want) CHECK(got == want);
            different += got != want;
            nonzero += want != 0;
            count++;
          }
        }
    }
  }
  CHECK(different == 0);
  CHECK(nonzero > count / 2);
}

TEST_CASE("The device draws from both ends of the distribution", "[cuda]") {
  for (const int V : {2, 65, 257, 1000}) {
    const std::vector<float> equal(V, 0.25f);
    const auto check = [&](double uniform, int top_k, int want) {
      INFO("V " << V << ", uniform " << uniform << ", top_k " << top_k);
      const auto [got, host] = sample<float>(equal, 1, top_k, uniform);
      CHECK(got == want);
      CHECK(host == want);
    };
    check(1e-12, 0, 0);
    check(1 - 1e-12, 0, V - 1);
    check(1 - 1e-12, V / 2, V / 2 - 1);  // of equal logits, top_k keeps the first
    check(1 - 1e-12, 1, 0);
    for (const int v : {0, V / 3, V / 2, V - 1}) {
      check((v + 1e-6) / V, 0, v);
      check((v + 1 - 1e-6) / V, 0, v);
      check((v + 0.5) / V, V, v);
    }
  }
}

TEST_CASE("The device draws as the host does on both sides of a border between tokens", "[cuda]") {
  // Weights in float, or a float sum of them, would be off by 1e-7.
  for (const int V : {65, 700}) {
    const std::vector<float> logits = noise(V, 1);
    std::vector<double> borders;
    double sum = 0;
    for (const float x : logits) borders.push_back(sum += std::exp(x / 0.8));
    for (const int v : {0, V / 3, V / 2, V - 2})
      for (const int side : {0, 1}) {
        const auto [got, want] = sample<float>(logits, 0.8, 0, borders[v] / sum + (side ? 1e-11 : -1e-11));
        CHECK(got == want);
        CHECK(got == v + side);
      }
  }
  // A draw on the border itself, which is exact here, gives the token behind it.
  for (const int V : {2, 512})
    for (const int v : {1, V / 2, V - 1}) {
      const auto [got, want] = sample<float>(std::vector<float>(V, 0), 1, 0, double(v) / V);
      CHECK(got == want);
      CHECK(got == v);
    }
}

TEST_CASE("The device takes the first of the largest logits", "[cuda]") {
  const auto best = [](const std::vector<float>& logits, double temperature, int top_k) {
    const auto [got, want] = sample<float>(logits, temperature, top_k, 0.9);
    CHECK(got == want);
    return got;
  };
  for (const double temperature : {0.0, 1.0}) {
    CHECK(best({1, 3, 3}, temperature, 1) == 1);
    CHECK(best({-1, -3, -0.5f, -0.5f}, temperature, 1) == 2);
    CHECK(best({0.f, -0.f, -1}, temperature, 1) == 0);
    CHECK(best({-0.f, 0.f, -1}, temperature, 1) == 0);
    CHECK(best({-1e30f, 1e-40f, 0, -1e-40f}, temperature, 1) == 1);
  }
  CHECK(best({-1, 0.f, -0.f, 0.f, -2}, 1, 2) == 2);
  CHECK(best({1e30f, -1e30f, 0}, 1e-3, 0) == 0);
  std::vector<float> many(700, -2);
  many[600] = many[650] = 5;
  CHECK(best(many, 0, 0) == 600);
}

TEST_CASE("Tokens without weight are never drawn", "[cuda]") {
  std::vector<float> logits(300, -1e6f);
  logits[40] = logits[41] = 1;
  for (const double uniform : {1e-12, 0.3, 0.499999, 0.500001, 1 - 1e-12}) {
    const auto [got, want] = sample<float>(logits, 1, 0, uniform);
    CHECK(got == want);
    CHECK(got == (uniform < 0.5 ? 40 : 41));
  }
  // The draw must give the last token that has a weight. Pieces are four tokens here, the last one is three. In
  // some rows, a rounding error lets the sum of the last piece pass the draw while its tokens, one by one, do not.
  for (uint32_t row = 0; row < 40; row++) {
    logits = noise(1023, row);
    logits.back() = -1e6f;
    const auto [got, want] = sample<float>(logits, 1, 0, 1 - 0x1p-53);
    CHECK(got == want);
    CHECK(got == 1021);
  }
}

TEST_CASE("The device draws the same token twice, and refuses a vocabulary that is too large", "[cuda]") {
  const std::vector<float> logits = noise(1000, 3);
  CHECK(sample<bf16>(logits, 1, 50, 0.7).first == sample<bf16>(logits, 1, 50, 0.7).first);
  DeviceArray<float> in(8);
  CHECK_THROWS_WITH(sample_token(Texts{}, in.data(), 1, 1, (1 << 16) + 1, 1 << 17, nullptr),
                    ContainsSubstring("V = 65537"));
}

TEST_CASE("The windows of several texts grow until they are full, and then roll", "[cuda]") {
  constexpr int V = 65, Vp = 72, rounds = 4;
  for (const int T : {1, 2, 5, 256, 257, 258, 600})
    for (const int B : {1, 3}) {
      INFO("T " << T << ", B " << B);
      // Text b begins with T - b tokens, so that some windows are full at once and others become full.
      std::vector<int> x(size_t(B) * T), lengths, want_tokens;
      for (size_t i = 0; i < x.size(); i++) x[i] = int(i * 7 % V);
      for (int b = 0; b < B; b++) lengths.push_back(std::max(1, T - b));
      std::vector<Choice> choices;
      for (int i = 0; i < rounds * B; i++)
        choices.push_back({1 + i % B * 0.5, i % 2 * 9, unit_open(random4(5, 1, 0, uint64_t(i)).word[0])});
      const std::vector<float> logits = noise(size_t(B) * T * Vp, 7, 2);
      DeviceArray<float> in(logits);
      DeviceArray<int> device_x(x), device_lengths(lengths), drawn(std::vector<int>(B, 0)), tokens(choices.size());
      DeviceArray<Choice> device_choices(choices);
      const Texts texts = {device_x.data(), device_lengths.data(), drawn.data(), device_choices.data(), tokens.data()};
      for (int round = 0; round < rounds; round++) {
        sample_token(texts, in.data(), B, T, V, Vp, nullptr);
        for (int b = 0; b < B; b++) {
          int& n = lengths[size_t(b)];
          const auto window = x.begin() + long(b) * T;
          const int token = choose_token(&logits[(size_t(b) * T + n - 1) * Vp], V, choices[size_t(round * B + b)]);
          if (n == T)
            std::rotate(window, window + 1, window + T);
          else
            n++;
          window[n - 1] = token;
          want_tokens.push_back(token);
        }
      }
      CHECK(device_x.read() == x);
      CHECK(device_lengths.read() == lengths);
      CHECK(drawn.read() == std::vector<int>(B, rounds));
      CHECK(tokens.read() == want_tokens);
    }
}
