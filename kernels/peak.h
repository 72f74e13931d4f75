// How fast this processor multiplies in each type: the innermost loop of products (tile in product.h), on numbers that
// stay in registers. `--dtype auto` takes the faster type, and the benchmark gives its results as shares of this rate.
// defines: multiply_at_the_peak, Rates, measure_rates, faster_dtype
#pragma once
#include <algorithm>
#include <chrono>
#include <string>

#include "product.h"

// Keeps as many independent sums as the tile has, and adds one product to each of them in every round. Returns the sum
// of all, so that the compiler must compute them. They begin with different numbers, so that it computes each of them.
// seed is any number that the compiler does not know.
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

// The same for matrix registers: four independent sums, as in product::four_tiles.
[[gnu::noinline]] inline float multiply_in_tiles(int rounds, float seed) {
  const amx::Tiles registers;
  uint32_t factors[amx::area];
  std::fill(factors, factors + amx::area, Factors<bfloat16>::unit(seed, seed));
  amx::load<4>(factors, amx::side), amx::load<5>(factors, amx::side);
  amx::load<6>(factors, amx::side), amx::load<7>(factors, amx::side);
  amx::clear<0>(), amx::clear<1>(), amx::clear<2>(), amx::clear<3>();
  for (int r = 0; r < rounds; r++) {
    amx::multiply_add<0, 4, 6>(), amx::multiply_add<1, 4, 7>();
    amx::multiply_add<2, 5, 6>(), amx::multiply_add<3, 5, 7>();
  }
  float sums[amx::area], all = 0;
  const auto add = [&] {
    for (const float sum : sums) all += sum;
  };
  amx::store<0>(sums, amx::side), add(), amx::store<1>(sums, amx::side), add();
  amx::store<2>(sums, amx::side), add(), amx::store<3>(sums, amx::side), add();
  return all;
}

// Runs `rounds` rounds of the innermost loop of Factor's products, and returns how many operations these are.
template <class Factor>
double multiply_at_the_peak(int rounds, float seed, float& result) {
  if constexpr (product::tiles_possible<Factor>)
    if (amx::enabled) {
      result = multiply_in_tiles(rounds, seed);
      return rounds * 4.0 * 2 * amx::area * 2 * amx::side;
    }
  result = multiply_in_registers<Factor>(rounds, seed);
  return rounds * 2.0 * product::MR * product::NV * lanes<float> * Factors<Factor>::terms;
}

// The rate that one thread reaches in each type, in GFLOP/s.
struct Rates {
  double bfloat16, float32;
};

// Takes 4 ms. The types take turns and the fastest turn counts, so that neither another program nor a clock that is
// still rising makes one type look slower than the other.
inline Rates measure_rates() {
  const auto rate = []<class Factor>(Factor, int rounds) {
    volatile float seed = 1;
    float result;
    const auto start = std::chrono::steady_clock::now();
    const double operations = multiply_at_the_peak<Factor>(rounds, seed, result);
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    seed = result;
    return operations / time.count();
  };
  Rates best = {0, 0};
  for (int turn = 0; turn < 30; turn++) {
    best.bfloat16 = std::max(best.bfloat16, rate(bfloat16{}, 5000));
    best.float32 = std::max(best.float32, rate(float{}, 10000));
  }
  return best;
}

// bfloat16 must be clearly faster. The ratio of the rates is 2 on Zen 4 and 5, whose bfloat16 instruction does twice
// the work of a float32 instruction. On Emerald Rapids, which executes a quarter as many of them, it is 0.5, and in
// matrix registers 14. The limit of 1.4 is far from all three, so noise does not decide: every run on a machine takes
// the same type and has the same result.
inline std::string faster_dtype(const Rates& rates) {
  return rates.bfloat16 > 1.4 * rates.float32 ? "bfloat16" : "float32";
}
