// Every layer: the blocked version against the plain loops, the backward pass against finite differences in double. The
// sizes fit no tile. Outputs that a layer sets (=) hold NaN before, outputs that it adds to (+=) hold noise.
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../kernels/adamw.h"
#include "../kernels/attention.h"
#include "../kernels/crossentropy.h"
#include "../kernels/embedding.h"
#include "../kernels/layernorm.h"
#include "../kernels/matmul.h"
#include "../kernels/relu.h"
#include "../kernels/residual.h"
#include "gradient.h"
#include "test.h"
#include "tiles.h"

namespace {

using Doubles = std::vector<double>;
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

template <class Real = double>
std::vector<Real> noise(size_t count, uint32_t which, double scale = 1) {
  std::vector<Real> out(count);
  for (size_t i = 0; i < count; i++) {
    double x[4];
    normal4(x, random4(99, which, 0, i));
    out[i] = Real(scale * x[0]);
  }
  return out;
}

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
  return sum;
}

void check_gradient(Doubles& x, const Doubles& grad, const std::function<double()>& f, double tolerance = 1e-7) {
  REQUIRE(x.size() == grad.size());
  ::check_gradient(x.data(), grad.data(), x.size(), f, tolerance);
}

// How much a float sum of K terms may be off.
double rounding(int K) { return 4 * std::sqrt(double(K)) * 0x1p-24; }

}  // namespace

TEST_CASE("matmul: gradients") {
  const int rows = 14, C = 19, OC = 17;  // more than one tile and one vector of doubles, but no multiple of either
  Doubles inp = noise(rows * C, 1), weight = noise(OC * C, 2), bias = noise(OC, 3), dout = noise(rows * OC, 4);
  Doubles out(rows * OC), dinp(rows * C, nan_value), dweight(OC * C), dbias(OC);
  matmul_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(), weight.data(), rows, C, OC);
  const auto f = [&] {
    matmul_forward(out.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
    return dot(out, dout);
  };
  check_gradient(inp, dinp, f);
  check_gradient(weight, dweight, f);
  check_gradient(bias, dbias, f);
}

TEST_CASE("matmul: the blocked product is the plain one") {
  struct Size {
    int rows, C, OC;
  };
  // One element, less than a tile, more than a tile, V = 65, tasks of 48 rows of dweight; then more than one block of k
  // in forward, in dinp, and in dweight by rows and by columns.
  constexpr int long_k = product::KC + 3;
  for (const Size s : {Size{1, 1, 1},
                       {1, 48, 65},
                       {13, 31, 33},
                       {31, 65, 144},
                       {100, 400, 65},
                       {97, 801, 130},
                       {50, 96, 96},
                       {27, long_k, 34},
                       {27, 34, long_k},
                       {long_k, 27, 34},
                       {long_k, 34, 27}}) {
    INFO("rows " << s.rows << ", C " << s.C << ", OC " << s.OC);
    const auto inp = noise<float>(s.rows * s.C, 1), weight = noise<float>(s.OC * s.C, 2), bias = noise<float>(s.OC, 3),
               dout = noise<float>(s.rows * s.OC, 4);
    for (const bool with_bias : {true, false}) {
      std::vector<float> out(s.rows * s.OC, float(nan_value)), expected = out;
      const float* b = with_bias ? bias.data() : nullptr;
      matmul_forward(out.data(), inp.data(), weight.data(), b, s.rows, s.C, s.OC);
      reference::matmul_forward(expected.data(), inp.data(), weight.data(), b, s.rows, s.C, s.OC);
      check_close(out, expected, rounding(s.C));
    }
    std::vector<float> dinp(s.rows * s.C, float(nan_value)), expected_dinp = dinp;
    auto dweight = noise<float>(s.OC * s.C, 5), expected_dweight = dweight, dbias = noise<float>(s.OC, 6),
         expected_dbias = dbias;
    matmul_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(), weight.data(), s.rows, s.C,
                    s.OC);
    reference::matmul_backward(expected_dinp.data(), expected_dweight.data(), expected_dbias.data(), dout.data(),
                               inp.data(), weight.data(), s.rows, s.C, s.OC);
    check_close(dinp, expected_dinp, rounding(s.OC));
    check_close(dweight, expected_dweight, rounding(s.rows));
    check_close(dbias, expected_dbias, rounding(s.rows));
  }
}

TEMPLATE_TEST_CASE("matmul: what happens to the output after it is what would happen later", "", float, bfloat16) {
  for (const bool tiles : ways_of<TestType>())
    for (const int rows : {7, 200}) {  // with 7 rows the tasks divide the columns, with 200 they do not
      const TakeTiles take(tiles);
      const int C = 2 * product::KC + 1, OC = 260, T = rows;  // more than one block of k
      const Dropout drop = {5, 6, site::fc_dropout, dropout_threshold(0.3), 1};
      const auto inp = noise<float>(rows * C, 1), weight = noise<float>(OC * C, 2), bias = noise<float>(OC, 3),
                 stream = noise<float>(rows * OC, 4), dout = noise<float>(rows * OC, 5),
                 hidden = noise<float>(rows * C, 6);
      std::vector<float> product(rows * OC), got(rows * OC, float(nan_value)), want(rows * OC);
      matmul_forward<float, TestType>(product.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
      matmul_forward<float, TestType>(got.data(), inp.data(), weight.data(), bias.data(), rows, C, OC,
                                      apply_relu(got.data()));
      want = product;
      relu_forward(want.data(), want.size());
      CHECK((got == want));
      matmul_forward<float, TestType>(got.data(), inp.data(), weight.data(), bias.data(), rows, C, OC,
                                      add_residual(got.data(), stream.data(), drop, T, OC));
      residual_forward(want.data(), stream.data(), product.data(), drop, 1, T, OC);
      CHECK((got == want));
      std::vector<float> dgot(rows * C, float(nan_value)), dwant(rows * C), dweight(OC * C);
      matmul_backward<float, TestType>(dwant.data(), dweight.data(), nullptr, dout.data(), inp.data(), weight.data(),
                                       rows, C, OC);
      relu_backward(dwant.data(), hidden.data(), dwant.size());
      matmul_backward<float, TestType>(dgot.data(), dweight.data(), nullptr, dout.data(), inp.data(), weight.data(),
                                       rows, C, OC, apply_relu_backward(dgot.data(), hidden.data()));
      CHECK((dgot == dwant));
    }
}

// x rounded to bfloat16, as the products of that type use it.
template <class From>
std::vector<double> as_bfloat16(const std::vector<From>& x) {
  std::vector<double> out;
  for (const From v : x) out.push_back(std::bit_cast<float>(uint32_t(bfloat16_bits(float(v))) << 16));
  return out;
}

TEST_CASE("bfloat16: rounding") {
  const auto rounded = [](float x) { return float(as_bfloat16(std::vector<float>{x})[0]); };
  for (const float x : {0.f, 1.f, -2.5f, 0x1.fep127f, 0x1p-126f, std::numeric_limits<float>::infinity()})
    CHECK(rounded(x) == x);
  CHECK(rounded(1 + 0x1p-8f) == 1);  // ties go to the even one
  CHECK(rounded(1 + 0x3p-8f) == 1 + 0x1p-6f);
  CHECK(rounded(1 + 0x1p-8f + 0x1p-20f) == 1 + 0x1p-7f);
  CHECK(rounded(0x1.ffp127f) == std::numeric_limits<float>::infinity());
  CHECK(std::isnan(rounded(float(nan_value))));
  CHECK(std::isnan(rounded(std::bit_cast<float>(0x7f800001u))));
  CHECK(std::isnan(rounded(std::bit_cast<float>(0xffffffffu))));
}

TEST_CASE("bfloat16: products of rounded operands, summed in float") {
  struct Size {
    int rows, C, OC;
  };
  // Sums with an odd number of terms, whose last pair is half empty; more than one block of pairs.
  constexpr int long_k = 2 * product::KC + 3;
  for (const Size s : {Size{1, 1, 1},
                       {1, 48, 65},
                       {13, 31, 33},
                       {31, 65, 144},
                       {97, 801, 131},
                       {801, 97, 20},
                       {27, long_k, 34},
                       {27, 34, long_k},
                       {long_k, 27, 34},
                       {long_k, 34, 27}}) {
    for (const bool tiles : ways_of<bfloat16>()) {
      const TakeTiles take(tiles);
      INFO("rows " << s.rows << ", C " << s.C << ", OC " << s.OC << (tiles ? ", matrix registers" : ""));
      const auto inp = noise<float>(s.rows * s.C, 1), weight = noise<float>(s.OC * s.C, 2),
                 bias = noise<float>(s.OC, 3), dout = noise<float>(s.rows * s.OC, 4);
      std::vector<float> out(s.rows * s.OC, float(nan_value)), dinp(s.rows * s.C, float(nan_value)),
          dweight = noise<float>(s.OC * s.C, 5), dbias = noise<float>(s.OC, 6);
      Doubles dw(dweight.begin(), dweight.end()), db(dbias.begin(), dbias.end());
      matmul_forward<float, bfloat16>(out.data(), inp.data(), weight.data(), bias.data(), s.rows, s.C, s.OC);
      matmul_backward<float, bfloat16>(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(),
                                       weight.data(), s.rows, s.C, s.OC);
      const Doubles x = as_bfloat16(inp), w = as_bfloat16(weight), d = as_bfloat16(dout), b(bias.begin(), bias.end());
      Doubles want(out.size()), dx(dinp.size());
      reference::matmul_forward(want.data(), x.data(), w.data(), b.data(), s.rows, s.C, s.OC);
      reference::matmul_backward<double>(dx.data(), dw.data(), nullptr, d.data(), x.data(), w.data(), s.rows, s.C,
                                         s.OC);
      for (int r = 0; r < s.rows; r++)
        for (int o = 0; o < s.OC; o++) db[o] += dout[r * s.OC + o];  // no product computes db, so dout is not rounded
      check_close(out, want, rounding(s.C));
      check_close(dinp, dx, rounding(s.OC));
      check_close(dweight, dw, rounding(s.rows));
      check_close(dbias, db, rounding(s.rows));
    }
  }
}

TEST_CASE("bfloat16: attention stays within its rounding") {
  const int B = 2, T = 131, C = 96, NH = 3;
  const size_t n = size_t(B) * T * C;
  for (const bool tiles : ways_of<bfloat16>())
    for (const double p : {0.0, 0.2}) {
      const TakeTiles take(tiles);
      const Dropout drop = {5, 6, site::attention_dropout, dropout_threshold(p), 2};
      const auto qkv = noise<float>(3 * n, 1), dout = noise<float>(n, 2);
      std::vector<float> out(n, float(nan_value)), lse(B * NH * T, float(nan_value)), dqkv(3 * n, float(nan_value));
      attention_forward<float, bfloat16>(out.data(), lse.data(), qkv.data(), drop, B, T, C, NH);
      attention_backward<float, bfloat16>(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), drop, B, T, C,
                                          NH);
      const Doubles qkv64(qkv.begin(), qkv.end()), dout64(dout.begin(), dout.end());
      Doubles out64(n), lse64(lse.size()), dqkv64(3 * n);
      reference::attention_forward(out64.data(), lse64.data(), qkv64.data(), drop, B, T, C, NH);
      reference::attention_backward(dqkv64.data(), dout64.data(), qkv64.data(), out64.data(), lse64.data(), drop, B, T,
                                    C, NH);
      // Rounding changes an operand by up to 2^-8 of itself. Early queries see few values, so their errors do not
      // average out, and the first query's gradients cancel to zero: the worst elements are off by a multiple of 2^-8.
      check_close(out, out64, 0x1p-6);
      check_close(lse, lse64, 0x1p-8);
      check_close(dqkv, dqkv64, 0x1p-4);
    }
}

TEST_CASE("matmul: a row does not depend on which others are computed with it") {
  const int rows = 61, C = product::KC + 500, OC = 70;
  const auto inp = noise<float>(rows * C, 1), weight = noise<float>(OC * C, 2), bias = noise<float>(OC, 3);
  std::vector<float> all(rows * OC), one(OC);
  matmul_forward(all.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
  for (int r = 0; r < rows; r++) {
    matmul_forward(one.data(), inp.data() + r * C, weight.data(), bias.data(), 1, C, OC);
    CHECK((std::vector<float>(all.begin() + r * OC, all.begin() + (r + 1) * OC) == one));
  }
}

TEST_CASE("attention: gradients") {
  for (const int T : {1, 2, 19})
    for (const double p : {0.0, 0.4}) {
      const int B = 2, NH = 3, C = 12;
      const Dropout drop = {5, 6, site::attention_dropout + 1, dropout_threshold(p), 7};
      Doubles qkv = noise(B * T * 3 * C, 1), dout = noise(B * T * C, 2);
      Doubles out(B * T * C, nan_value), lse(B * NH * T, nan_value), dqkv(qkv.size(), nan_value);
      const auto f = [&] {
        attention_forward(out.data(), lse.data(), qkv.data(), drop, B, T, C, NH);
        return dot(out, dout);
      };
      f();
      attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), drop, B, T, C, NH);
      check_gradient(qkv, dqkv, f);
    }
}

TEST_CASE("attention: the blocked version is the plain one") {
  struct Size {
    int B, T, C, NH;
  };
  // T = 1, 31, whole and broken blocks of queries; head sizes 5, 16, 64, 33
  for (const Size s :
       {Size{1, 1, 16, 1}, {2, 31, 15, 3}, {1, 96, 32, 2}, {2, 100, 128, 2}, {1, 250, 33, 1}, {3, 17, 48, 3}})
    for (const double p : {0.0, 0.2}) {
      INFO("B " << s.B << ", T " << s.T << ", C " << s.C << ", NH " << s.NH << ", p " << p);
      const Dropout drop = {5, 6, site::attention_dropout, dropout_threshold(p), 2};
      const size_t n = size_t(s.B) * s.T * s.C;
      const auto qkv = noise<float>(3 * n, 1, 2), dout = noise<float>(n, 2);
      std::vector<float> out(n, float(nan_value)), lse(s.B * s.NH * s.T, float(nan_value)),
          dqkv(3 * n, float(nan_value));
      const std::vector<double> qkv64(qkv.begin(), qkv.end()), dout64(dout.begin(), dout.end());
      std::vector<double> out64(n), lse64(lse.size()), dqkv64(3 * n);
      attention_forward(out.data(), lse.data(), qkv.data(), drop, s.B, s.T, s.C, s.NH);
      reference::attention_forward(out64.data(), lse64.data(), qkv64.data(), drop, s.B, s.T, s.C, s.NH);
      attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), drop, s.B, s.T, s.C, s.NH);
      reference::attention_backward(dqkv64.data(), dout64.data(), qkv64.data(), out64.data(), lse64.data(), drop, s.B,
                                    s.T, s.C, s.NH);
      std::vector<double> blocked(n), blocked_lse(lse.size()), blocked_dqkv(3 * n, nan_value);
      attention_forward(blocked.data(), blocked_lse.data(), qkv64.data(), drop, s.B, s.T, s.C, s.NH);
      attention_backward(blocked_dqkv.data(), dout64.data(), qkv64.data(), blocked.data(), blocked_lse.data(), drop,
                         s.B, s.T, s.C, s.NH);
      check_close(blocked, out64, 1e-12);
      check_close(blocked_lse, lse64, 1e-12);
      check_close(blocked_dqkv, dqkv64, 1e-12);
      // float against double; exp carries the rounding of the scores into the weights: we saw errors up to 3e-6
      check_close(out, out64, 1e-5);
      check_close(lse, lse64, 1e-5);
      check_close(dqkv, dqkv64, 2e-5);
    }
}

TEST_CASE("attention: later queries alone give the same numbers as all together") {
  const int T = 77, NH = 2, C = 32;
  const auto qkv = noise<float>(T * 3 * C, 1);
  std::vector<float> all(T * C), lse(NH * T);
  attention_forward(all.data(), lse.data(), qkv.data(), {}, 1, T, C, NH);
  for (int first = 0; first < T; first += 19) {
    std::vector<float> some((T - first) * C, float(nan_value));
    attention_forward(some.data(), lse.data(), qkv.data(), {}, 1, T, C, NH, first);
    CHECK((std::vector<float>(all.begin() + first * C, all.end()) == some));
  }
}

TEST_CASE("layernorm: values and gradients") {
  for (const int rows : {1, 3, 130})  // more rows than one chunk of the sums over rows
    for (const int C : {2, 5, 48}) {
      Doubles inp = noise(rows * C, 1, 3), weight = noise(C, 2), bias = noise(C, 3), dout = noise(rows * C, 4);
      Doubles out(rows * C, nan_value), mean(rows, nan_value), rstd(rows, nan_value);
      const auto f = [&] {
        layernorm_forward(out.data(), mean.data(), rstd.data(), inp.data(), weight.data(), bias.data(), rows, C);
        return dot(out, dout);
      };
      f();
      for (int r = 0; r < rows; r += 50) {
        double m = 0, variance = 0;
        for (int c = 0; c < C; c++) m += inp[r * C + c] / C;
        for (int c = 0; c < C; c++) variance += (inp[r * C + c] - m) * (inp[r * C + c] - m) / C;
        for (int c = 0; c < C; c++)
          CHECK(out[r * C + c] == Approx((inp[r * C + c] - m) / std::sqrt(variance + 1e-5) * weight[c] + bias[c])
                                      .epsilon(1e-10)
                                      .margin(1e-12));
      }
      const Doubles before = noise(rows * C, 5), before_w = noise(C, 6), before_b = noise(C, 7);
      Doubles dinp = before, dweight = before_w, dbias = before_b;
      layernorm_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(), mean.data(), rstd.data(),
                         weight.data(), rows, C);
      for (int i = 0; i < rows * C; i++) dinp[i] -= before[i];
      for (int c = 0; c < C; c++) dweight[c] -= before_w[c], dbias[c] -= before_b[c];
      check_gradient(inp, dinp, f, 1e-6);  // C = 2: out is nearly +-1 whatever the input, and the gradient nearly 0
      check_gradient(weight, dweight, f);
      check_gradient(bias, dbias, f);
    }
}

TEST_CASE("embedding: values and gradients") {
  const int B = 3, T = 5, C = 37, V = 4;
  std::vector<int> x;
  for (int i = 0; i < B * T; i++) x.push_back(int(random4(1, 1, 1, i).word[0] % V));
  Doubles wte = noise(V * C, 1), wpe = noise(T * C, 2), dout = noise(B * T * C, 3), out(B * T * C, nan_value);
  Doubles dwte = noise(V * C, 4), dwpe = noise(T * C, 5), before_t = dwte, before_p = dwpe;
  const auto f = [&] {
    embedding_forward(out.data(), x.data(), wte.data(), wpe.data(), B, T, C);
    return dot(out, dout);
  };
  f();
  CHECK(out[(1 * T + 2) * C + 3] == wte[x[1 * T + 2] * C + 3] + wpe[2 * C + 3]);
  embedding_backward(dwte.data(), dwpe.data(), dout.data(), x.data(), B, T, C);
  for (size_t i = 0; i < dwte.size(); i++) dwte[i] -= before_t[i];
  for (size_t i = 0; i < dwpe.size(); i++) dwpe[i] -= before_p[i];
  check_gradient(wte, dwte, f);
  check_gradient(wpe, dwpe, f);
}

TEST_CASE("relu: values and gradients") {
  Doubles x = noise(1001, 1), dout = noise(1001, 2), out = x;
  x[7] = out[7] = 0;
  relu_forward(out.data(), out.size());
  for (size_t i = 0; i < x.size(); i++) CHECK(out[i] == std::max(x[i], 0.0));
  Doubles dx = dout;
  relu_backward(dx.data(), out.data(), dx.size());
  for (size_t i = 0; i < x.size(); i++) CHECK(dx[i] == (x[i] > 0 ? dout[i] : 0));

  std::vector<float> lost(100, NAN), dlost(100, 1);
  relu_forward(lost.data(), lost.size());
  relu_backward(dlost.data(), lost.data(), lost.size());
  for (size_t i = 0; i < lost.size(); i++) CHECK((std::isnan(lost[i]) && dlost[i] == 1));
}

TEST_CASE("residual: values and gradients") {
  const int B = 2, T = 31, C = 13, count = B * T * C;
  for (const double p : {0.0, 0.25}) {
    const Dropout drop = {1, 2, site::proj_dropout, dropout_threshold(p), 1};
    Doubles inp = noise(count, 1), branch = noise(count, 2), dout = noise(count, 3), out(count, nan_value),
            dbranch = out;
    const auto f = [&] {
      residual_forward(out.data(), inp.data(), branch.data(), drop, B, T, C);
      return dot(out, dout);
    };
    f();
    residual_backward(dbranch.data(), dout.data(), drop, B, T, C);
    check_gradient(branch, dbranch, f);
    check_gradient(inp, dout, f);
  }
}

TEST_CASE("cross-entropy: values and gradients") {
  for (const int V : {1, 2, 65}) {
    const int rows = 3;
    std::vector<int> targets = {0, V - 1, V / 2};
    Doubles logits = noise(rows * V, 1, 4), losses(rows, nan_value), probs(rows * V, nan_value),
            dlogits(rows * V, nan_value);
    const auto f = [&] {
      crossentropy_forward(losses.data(), probs.data(), logits.data(), targets.data(), rows, V);
      return 0.3 * (losses[0] + losses[1] + losses[2]);
    };
    f();
    for (int r = 0; r < rows; r++) {
      double sum = 0;
      for (int v = 0; v < V; v++) sum += std::exp(logits[r * V + v]);
      CHECK(losses[r] == Approx(std::log(sum) - logits[r * V + targets[r]]).margin(1e-14));
    }
    crossentropy_backward(dlogits.data(), probs.data(), targets.data(), 0.3, rows, V);
    check_gradient(logits, dlogits, f);
  }
  // Vectors of floats, with and without a remainder, against sums in double. Rounding moves the distance of a logit
  // from the highest one (up to 32 here) by up to 1e-6, and exp turns that into a relative error.
  for (const int V : {64, 65, 1000, 1007}) {
    const Doubles exact = noise(V, 2, 4);
    const std::vector<float> logits(exact.begin(), exact.end());
    std::vector<float> loss(1), probs(V);
    const int target = V - 1;
    crossentropy_forward(loss.data(), probs.data(), logits.data(), &target, 1, V);
    double sum = 0;
    for (const float x : logits) sum += std::exp(double(x));
    CHECK(loss[0] == Approx(std::log(sum) - logits[target]).margin(1e-6));
    for (int v = 0; v < V; v++) CHECK(probs[v] == Approx(std::exp(double(logits[v])) / sum).epsilon(2e-6));
  }
  // logits far beyond exp's range
  const std::vector<float> logits = {1000, -1000, 0};
  std::vector<float> loss(1), probs(3);
  const int target = 1;
  crossentropy_forward(loss.data(), probs.data(), logits.data(), &target, 1, 3);
  CHECK(loss[0] == 2000);
  std::vector<float> many(100), many_probs(100);
  many[3] = 1000;
  crossentropy_forward(loss.data(), many_probs.data(), many.data(), &target, 1, 100);
  CHECK(loss[0] == 1000);
}

TEST_CASE("AdamW does what algorithm 2 says") {
  Doubles p = noise(37, 1), m(37), v(37), p2 = p, m2 = m, v2 = v;
  const double lr = 0.01, b1 = 0.9, b2 = 0.99, eps = 1e-8, decay = 0.1, scale = 0.5;
  for (int t = 1; t <= 5; t++) {
    const Doubles grad = noise(37, uint32_t(10 + t));
    adamw_update(p.data(), m.data(), v.data(), grad.data(), p.size(), {lr, b1, b2, eps, decay, t, scale});
    for (size_t i = 0; i < p2.size(); i++) {
      const double g = grad[i] * scale;
      m2[i] = b1 * m2[i] + (1 - b1) * g;
      v2[i] = b2 * v2[i] + (1 - b2) * g * g;
      const double m_hat = m2[i] / (1 - std::pow(b1, t)), v_hat = v2[i] / (1 - std::pow(b2, t));
      p2[i] = p2[i] - lr * decay * p2[i] - lr * m_hat / (std::sqrt(v_hat) + eps);
    }
  }
  check_close(p, p2, 1e-13);
  check_close(m, m2, 1e-13);
  check_close(v, v2, 1e-13);
}

TEST_CASE("the vector exp is within 1.1 units in the last place, and ends in 0") {
  constexpr int W = lanes<float>;
  double worst = 0;
  for (double at = -87.3; at < 88.3; at += 0.0007) {
    const float x = float(at);
    const Vec<float> y = exp_vec(broadcast(x));
    const double exact = std::exp(double(x)), ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    for (int i = 0; i < W; i++) worst = std::max(worst, std::fabs(y[i] - exact) / ulp);
  }
  INFO("worst error " << worst << " units");
  CHECK(worst < 1.1);
  CHECK(exp_vec(broadcast(-88.f))[0] == 0);
  CHECK(exp_vec(broadcast(-std::numeric_limits<float>::infinity()))[W - 1] == 0);
  CHECK(exp_vec(broadcast(0.f))[0] == 1);
  CHECK(std::isfinite(exp_vec(broadcast(1000.f))[0]));
}
