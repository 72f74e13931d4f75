// How fast this processor multiplies in each type: the product's innermost loop (kernels/matmul.h, tile) on numbers
// that stay in registers. `--dtype auto` takes the faster type, and the benchmark's shares are shares of this rate.
// defines: multiply_in_registers, flops_a_round, Rates, measure_rates, faster_dtype
#pragma once
#include <algorithm>
#include <chrono>
#include <string>

#include "matmul.h"

// As many independent sums as the tile has, each of them one multiply-add longer with every round. Returns the sum of
// all, so that the compiler must compute them; they begin with different numbers, so that it computes each. seed: any
// number that the compiler does not know.
template <class Factor>
[[gnu::noinline]] float multiply_in_registers(int rounds, float seed) {
  using namespace product;
  const Unit<Factor> x = Factors<Factor>::unit(seed, seed);
  Vec<Unit<Factor>> y[NV];
  Vec<float> sum[MR][NV];
  for (int j = 0; j < NV; j++) {
    y[j] = broadcast(Factors<Factor>::unit(seed + j, seed));
    for (int i = 0; i < MR; i++) sum[i][j] = broadcast(seed * i + j);
  }
  for (int r = 0; r < rounds; r++)
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NV; j++) sum[i][j] = multiply_add(sum[i][j], x, y[j]);
  Vec<float> all = {};
  for (const auto& row : sum)
    for (const Vec<float>& s : row) all += s;
  return horizontal_sum<float>(all);
}
template <class Factor>
constexpr double flops_a_round = 2.0 * product::MR* product::NV* lanes<float>* Factors<Factor>::terms;

// What one thread reaches in each type, in GFLOP/s.
struct Rates {
  double bfloat16, float32;
};

// Takes 4 ms. The types take turns and the fastest turn counts, so that neither another program nor a clock that is
// still rising makes one type look slower than the other.
inline Rates measure_rates() {
  const auto rate = []<class Factor>(Factor, int rounds) {
    volatile float number = 1;
    const auto start = std::chrono::steady_clock::now();
    number = multiply_in_registers<Factor>(rounds, number);
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    return rounds * flops_a_round<Factor> / time.count();
  };
  Rates best = {0, 0};
  for (int turn = 0; turn < 30; turn++) {
    best.bfloat16 = std::max(best.bfloat16, rate(bfloat16{}, 5000));
    best.float32 = std::max(best.float32, rate(float{}, 10000));
  }
  return best;
}

// bfloat16 must be clearly faster. Its instruction does twice the work of float32's: Zen 4 and 5 execute as many of them,
// so the ratio of the rates is 2; Emerald Rapids a quarter as many, and it is 0.5. 1.4 is far from both: noise does not
// decide, so that every run on a machine takes the same type and has the same result.
inline std::string faster_dtype(const Rates& rates) {
  return rates.bfloat16 > 1.4 * rates.float32 ? "bfloat16" : "float32";
}
