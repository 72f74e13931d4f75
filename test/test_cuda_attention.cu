// Attention's CUDA kernels against the plain loops on the CPU, which compute in double from inputs rounded to Real.
#include <set>

#include "../kernels/attention.cuh"
#include "../kernels/attention.h"
#include "cuda.h"

namespace {

struct Shape {
  int B, T, NH, HS;
  int C() const { return NH * HS; }
  size_t rows() const { return size_t(B) * T; }
  size_t weights() const { return size_t(B) * NH * T; }
  size_t mask_bytes() const { return attention_counter(uint64_t(B) * NH, 0, 0, T); }
};

// The kernels that floats get until the end of the scope: those without tensor cores, those whose tensor cores make
// three products for one of floats, or those that make one, whose operands are rounded to TF32.
enum class FloatKernels { simple, three_products, one_product };
bool tf32 = false;  // what forward() and backward() below ask for
struct FloatVersion {
  const int before = choices().attention_float;
  explicit FloatVersion(FloatKernels kernels) {
    choices().attention_float = kernels == FloatKernels::simple ? 1 : 2;
    tf32 = kernels == FloatKernels::one_product;
  }
  ~FloatVersion() { choices().attention_float = before, tf32 = false; }
};
// A test that calls it runs with each in turn.
template <class Real>
FloatKernels every_float_version() {
  if constexpr (std::is_same_v<Real, float>)
    return GENERATE(FloatKernels::simple, FloatKernels::three_products, FloatKernels::one_product);
  else
    return FloatKernels::simple;
}
// Lets attention_backward take this version until the end of the scope.
struct BackwardVersion {
  const int before = choices().attention_backward;
  explicit BackwardVersion(int version) { choices().attention_backward = version; }
  ~BackwardVersion() { choices().attention_backward = before; }
};
// The versions that there are for these sizes, if the card has the shared memory.
template <class Real>
std::vector<int> backward_versions(const Shape& s) {
  const BackwardVersion second(2);
  return attention::takes_once<Real>(s.HS, s.T) ? std::vector{1, 2} : std::vector{1};
}

// The kernels' outputs.
template <class Real>
struct Results {
  std::vector<Real> out, dqkv;
  std::vector<float> lse, D;
  std::vector<unsigned char> mask = {};  // empty: backward draws the masks again
};

template <class Real>
void check_same_bits(const Real* a, const Real* b, size_t n) {
  CHECK(std::memcmp(a, b, n * sizeof(Real)) == 0);
}

// Takes a version of attention's forward pass until the end of the scope.
struct ForwardVersion {
  const int before = choices().attention_forward;
  explicit ForwardVersion(int version) { choices().attention_forward = version; }
  ~ForwardVersion() { choices().attention_forward = before; }
};

template <class Real>
Results<Real> forward(const Shape& s, const std::vector<float>& qkv, const Dropout& drop, int version,
                      bool stores = false) {
  const ForwardVersion chosen(version);
  const DeviceArray<Real> in(qkv), out(s.rows() * s.C());
  const DeviceArray<float> lse(s.weights());
  const DeviceArray<unsigned char> mask(stores ? s.mask_bytes() : 0);
  const DeviceArray<int> step(std::vector<int>{int(drop.step)});
  Dropout without_step = drop;
  without_step.step = 12345;  // the kernel must take the step on the device instead
  attention_forward(out.data(), lse.data(), stores ? mask.data() : nullptr, in.data(),
                    {without_step, drop.active() ? step.data() : nullptr}, s.B, s.T, s.C(), s.NH, nullptr, tf32);
  return {out.read(), {}, lse.read(), {}, mask.read()};
}
// Whatever the tests ask of the forward pass, both versions must do, with the same bits.
template <class Real>
Results<Real> forward(const Shape& s, const std::vector<float>& qkv, const Dropout& drop) {
  const Results<Real> one = forward<Real>(s, qkv, drop, 1);
  if (sizeof(Real) == 2) {
    CAPTURE(s.B, s.T, s.NH, s.HS, drop.threshold);
    const Results<Real> two = forward<Real>(s, qkv, drop, 2);
    check_same_bits(one.out.data(), two.out.data(), one.out.size());
    check_same_bits(one.lse.data(), two.lse.data(), one.lse.size());
  }
  return one;
}
template <class Real, class Out>
Results<Real> backward(const Shape& s, const std::vector<float>& qkv, const std::vector<float>& dout,
                       const std::vector<Out>& out, const std::vector<float>& lse, const Dropout& drop,
                       const std::vector<unsigned char>& mask = {}) {
  const DeviceArray<Real> in(qkv), d(dout), from(out), dqkv(s.rows() * 3 * s.C());
  const DeviceArray<float> sums(lse), D(s.weights());
  const DeviceArray<unsigned char> stored(mask);
  const DeviceArray<int> step(std::vector<int>{int(drop.step)});
  Dropout without_step = drop;
  without_step.step = 12345;
  attention_backward(dqkv.data(), D.data(), d.data(), in.data(), from.data(), sums.data(),
                     mask.empty() ? nullptr : stored.data(), {without_step, drop.active() ? step.data() : nullptr}, s.B,
                     s.T, s.C(), s.NH, nullptr, tf32);
  return {{}, dqkv.read(), {}, D.read()};
}

Dropout dropout(double p, int first_row = 0) {
  return {5, 6, site::attention_dropout + 2, dropout_threshold(p), first_row};
}

std::vector<float> random_qkv(const Shape& s, double scale = 1) { return noise(s.rows() * 3 * s.C(), 1, scale); }
std::vector<float> random_dout(const Shape& s) { return noise(s.rows() * s.C(), 2); }

// How far from the exact numbers the kernels may be. A weight rounded to Real is off by up to half a unit, which is
// more than two standard deviations. A weight in float is off because exp enlarges the rounding of a score as large as
// `scores`. The errors of a sum's terms are independent, so their squares add up: the budget is twice the square root,
// and half a unit of the result.
// TF32 rounds both operands of every product by up to 2^-11 of themselves, weights and dS among them.
constexpr double of_operands = 1.5 * 0x1p-11;  // of both, a little more than sqrt(2)
struct Budgets {
  std::vector<double> out, dqkv;
};
template <class Real>
Budgets budgets(const Shape& s, const std::vector<double>& qkv, const std::vector<double>& dout,
                const std::vector<double>& out, const std::vector<double>& lse, const std::vector<double>& dqkv,
                const Dropout& drop, double scores) {
  const bool is_float = std::is_same_v<Real, float>, is_fp16 = std::is_same_v<Real, fp16>;
  const double half_unit = is_float ? 0x1p-24 : is_fp16 ? 0x1p-11 : 0x1p-8, of_weight = is_float ? 0 : half_unit;
  const double of_product = tf32 ? of_operands : 0;
  const double smallest = is_fp16 ? 0x1p-25 : 0x1p-126;  // below it, errors are absolute
  const double in_float = 0x1p-24 * (scores / 2 + 1) * std::sqrt(double(std::max(s.T, s.HS)));
  const double scale = 1 / std::sqrt(double(s.HS)), kept = dropout_scale(drop.threshold);
  Budgets x{std::vector<double>(out.size()), std::vector<double>(dqkv.size())};
  const auto add = [](double& to, double y) { to += y * y; };
  for (int b = 0; b < s.B; b++)
    for (int h = 0; h < s.NH; h++)
      for (int q = 0; q < s.T; q++)
        for (int kv = 0; kv <= q; kv++) {
          const size_t at_q = size_t(b * s.T + q) * 3 * s.C() + h * s.HS, row = size_t(b * s.T + q) * s.C() + h * s.HS;
          const size_t at_k = size_t(b * s.T + kv) * 3 * s.C() + s.C() + h * s.HS, at_v = at_k + s.C();
          const bool keep = attention_draw(drop, uint64_t(drop.first_row + b) * s.NH + h, q, kv, s.T) < drop.threshold;
          const double m = keep ? kept : 0;
          double dot = 0, products = 0, difference = 0, terms = 0;  // difference, terms: of m * dP - D
          for (int i = 0; i < s.HS; i++) {
            dot += qkv[at_q + i] * qkv[at_k + i];
            add(products, qkv[at_q + i] * qkv[at_k + i]);
            difference += dout[row + i] * (m * qkv[at_v + i] - out[row + i]);
            add(terms, m * dout[row + i] * qkv[at_v + i]);
            add(terms, dout[row + i] * out[row + i]);
          }
          const double P = std::exp(dot * scale - lse[size_t(b * s.NH + h) * s.T + q]);
          const double of_score = of_product * scale * std::sqrt(products), relative = of_weight + in_float + of_score;
          const double of_P = m * ((relative + of_product) * P + smallest);
          const double of_dS =
              scale *
              (P * ((relative + of_product) * std::abs(difference) + (in_float + of_product) * std::sqrt(terms)) +
               smallest);
          for (int i = 0; i < s.HS; i++) {
            add(x.out[row + i], of_P * qkv[at_v + i]);
            add(x.out[row + i], of_score * P * out[row + i]);  // through the denominator
            add(x.dqkv[at_v + i], of_P * dout[row + i]);
            add(x.dqkv[at_q + i], of_dS * qkv[at_k + i]);
            add(x.dqkv[at_k + i], of_dS * qkv[at_q + i]);
          }
        }
  for (size_t i = 0; i < out.size(); i++) x.out[i] = 2 * std::sqrt(x.out[i]) + half_unit * std::abs(out[i]) + smallest;
  for (size_t i = 0; i < dqkv.size(); i++)
    x.dqkv[i] = 2 * std::sqrt(x.dqkv[i]) + half_unit * std::abs(dqkv[i]) + smallest;
  return x;
}

template <class Real>
void check_within(const std::vector<Real>& got, const std::vector<double>& want, const std::vector<double>& budget) {
  REQUIRE(got.size() == want.size());
  size_t worst = 0;
  double share = 0;
  for (size_t i = 0; i < got.size(); i++) {
    const double error = std::abs(double(float(got[i])) - want[i]);
    const double x = error == 0 ? 0 : std::isfinite(error) ? error / budget[i] : INFINITY;
    if (x > share) share = x, worst = i;
  }
  INFO("element " << worst << " of " << got.size() << " is " << double(float(got[worst])) << " instead of "
                  << want[worst]);
  CHECK(share <= 1);
}

// Forward and backward against the reference. Backward gets the rounded out and lse of the reference, so that errors of
// forward do not count twice.
template <class Real>
void check_against_reference(const Shape& s, const Dropout& drop, double scale = 1, double scores = 4) {
  CAPTURE(s.B, s.T, s.NH, s.HS, drop.threshold, drop.first_row, sizeof(Real));
  const std::vector<float> qkv = random_qkv(s, scale), dout = random_dout(s);
  const std::vector<double> qkv64 = rounded<Real>(qkv), dout64 = rounded<Real>(dout);
  std::vector<double> out(s.rows() * s.C()), lse(s.weights()), dqkv(qkv.size());
  reference::attention_forward(out.data(), lse.data(), qkv64.data(), drop, s.B, s.T, s.C(), s.NH);
  const std::vector<float> out32 = rounded<Real, float>({out.begin(), out.end()}), lse32(lse.begin(), lse.end());
  const std::vector<double> out_of_Real(out32.begin(), out32.end()), lse_of_float(lse32.begin(), lse32.end());
  reference::attention_backward(dqkv.data(), dout64.data(), qkv64.data(), out_of_Real.data(), lse_of_float.data(), drop,
                                s.B, s.T, s.C(), s.NH);
  const Budgets budget = budgets<Real>(s, qkv64, dout64, out_of_Real, lse, dqkv, drop, scores);

  const Results<Real> f = forward<Real>(s, qkv, drop);
  check_within(f.out, out, budget.out);
  check_close(f.lse, lse, 4 * std::sqrt(double(std::max(s.T, s.HS))) * 0x1p-24 + (tf32 ? 2 * of_operands : 0));
  for (const int version : backward_versions<Real>(s)) {
    CAPTURE(version);
    const BackwardVersion chosen(version);
    check_within(backward<Real>(s, qkv, dout, out32, lse32, drop).dqkv, dqkv, budget.dqkv);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("attention on the device: the CPU's numbers", "[cuda]", float, bf16, fp16) {
  const FloatVersion float_kernels(every_float_version<TestType>());
  const bool plain = std::is_same_v<TestType, float> &&
                     choices().attention_float == 1;  // its kernels are slow here, and only whole warps of T matter
  for (const int T : plain ? std::vector{1, 31, 33, 65} : std::vector{1, 15, 16, 17, 31, 33, 64, 65, 100, 130, 195}) {
    check_against_reference<TestType>({2, T, 1, 64}, dropout(0.2, 3));
    check_against_reference<TestType>({1, T, 2, 64}, dropout(0));
  }
  for (const int HS : {16, 32, 128})
    for (const int T : plain ? std::vector{1, 34, 65} : std::vector{1, 33, 100, 130, HS == 16 ? 300 : 17})
      check_against_reference<TestType>({1, T, 2, HS}, dropout(T % 2 ? 0.2 : 0, 1));
}

// Version 2 of backward at the largest size that it takes, and version 1 beyond it. Only version 1 writes D, which
// shows who has worked.
TEMPLATE_TEST_CASE("attention on the device: backward in one kernel, if a head fits", "[cuda]", bf16, fp16) {
  check_against_reference<TestType>({1, 256, 1, 64}, dropout(0.2, 3));
  CHECK(attention::once::fits(64, 256, 163 << 10));       // A100
  CHECK_FALSE(attention::once::fits(64, 256, 99 << 10));  // GeForce
  CHECK(attention::once::fits(64, 256, attention::once::smem_bytes + attention::once::mask_bytes));
  CHECK_FALSE(attention::once::fits(64, 257, 227 << 10));
  CHECK_FALSE(attention::once::fits(32, 256, 227 << 10));
  const BackwardVersion second(2);
  for (const Shape& s : {Shape{1, 1, 1, 64}, Shape{1, 257, 1, 64}, Shape{1, 20, 1, 32}, Shape{1, 20, 1, 128}}) {
    CAPTURE(s.T, s.HS);
    const std::vector<TestType> out(s.rows() * s.C());
    const std::vector<float> lse(s.weights(), 3);
    const Results<TestType> b = backward<TestType>(s, random_qkv(s), random_dout(s), out, lse, {});
    CHECK(std::isnan(b.D[0]) == attention::takes_once<TestType>(s.HS, s.T));
    const BackwardVersion first(1);
    const Results<TestType> a = backward<TestType>(s, random_qkv(s), random_dout(s), out, lse, {});
    CHECK_FALSE(std::isnan(a.D[0]));
    if (!attention::takes_once<TestType>(s.HS, s.T)) check_same_bits(a.dqkv.data(), b.dqkv.data(), a.dqkv.size());
  }
}

// Scores so large that small weights underflow, and that later keys raise the running softmax's maximum.
TEMPLATE_TEST_CASE("attention on the device: scores of 80", "[cuda]", float, bf16, fp16) {
  const FloatVersion float_kernels(every_float_version<TestType>());
  for (const int HS : {64, 128}) check_against_reference<TestType>({1, 70, 1, HS}, dropout(0.2), 5, 100);
}

// Inputs that make weights visible. With one-hot values, out (q, c) is the weight of key first_key + c. With one-hot
// dout, dv (kv, c) is the weight of query first_query + c. With D = 0, dout . v = 1 and one-hot keys and queries, dq
// and dk show dS the same way. They must be exactly zero where the CPU drops a weight, and nowhere else.
TEMPLATE_TEST_CASE("attention on the device: the CPU's masks", "[cuda]", float, bf16, fp16) {
  const FloatVersion float_kernels(every_float_version<TestType>());
  const bool plain = std::is_same_v<TestType, float> && choices().attention_float == 1;
  const Shape s{plain ? 1 : 2, plain ? 70 : 130, 1, 64};
  const Dropout drop = dropout(0.3, 5);
  const auto kept = [&](int b, int q, int kv) {
    return kv <= q && attention_draw(drop, drop.first_row + b, q, kv, s.T) < drop.threshold;
  };
  const auto one_hot = [&](std::vector<float>& to, int part, int parts, int first) {
    for (int b = 0; b < s.B; b++)
      for (int t = first; t < std::min(first + s.HS, s.T); t++)
        to[(size_t(b * s.T + t) * parts + part) * s.HS + t - first] = 1;
  };
  const auto at = [&](const std::vector<TestType>& x, int b, int t, int part, int parts, int c) {
    return float(x[(size_t(b * s.T + t) * parts + part) * s.HS + c]) != 0;
  };
  const std::vector<float> none(s.rows() * s.HS);
  std::vector<float> lse(s.weights());
  int wrong = 0, dropped = 0, all = 0;
  for (int first_key = 0; first_key < s.T; first_key += s.HS) {
    std::vector<float> qkv(s.rows() * 3 * s.HS);
    one_hot(qkv, 2, 3, first_key);
    const std::vector<TestType> out = forward<TestType>(s, qkv, drop).out;
    for (int b = 0; b < s.B; b++)
      for (int q = 0; q < s.T; q++)
        for (int c = 0; c < s.HS && first_key + c < s.T; c++) {
          wrong += at(out, b, q, 0, 1, c) != kept(b, q, first_key + c);
          all += first_key + c <= q;
          dropped += first_key + c <= q && !kept(b, q, first_key + c);
        }
    for (int first_query = first_key; first_query < s.T; first_query += s.HS) {
      std::vector<float> dout(s.rows() * s.HS);
      std::fill(qkv.begin(), qkv.end(), 0.0f);
      one_hot(dout, 0, 1, first_query);
      one_hot(qkv, 0, 3, first_query);
      one_hot(qkv, 1, 3, first_key);
      for (size_t row = 0; row < s.rows(); row++) std::fill_n(qkv.begin() + (row * 3 + 2) * s.HS, s.HS, 1.0f);
      for (const int version : backward_versions<TestType>(s)) {
        const BackwardVersion chosen(version);
        const std::vector<TestType> dqkv = backward<TestType>(s, qkv, dout, none, lse, drop).dqkv;
        for (int b = 0; b < s.B; b++)
          for (int q = first_query; q < std::min(first_query + s.HS, s.T); q++)
            for (int kv = first_key; kv < std::min(first_key + s.HS, s.T); kv++) {
              const bool keep = kept(b, q, kv);
              wrong += at(dqkv, b, q, 0, 3, kv - first_key) != keep;
              wrong += at(dqkv, b, kv, 1, 3, q - first_query) != keep;
              wrong += at(dqkv, b, kv, 2, 3, q - first_query) != keep;
            }
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(std::abs(dropped - 0.3 * all) < 0.02 * all);
}

namespace {

// What forward must store: in the byte of the lane that holds a weight, the bit of the lane's element. Bytes of squares
// above the diagonal are as they were, all ones.
std::vector<unsigned char> expected_mask(const Shape& s, const Dropout& drop) {
  std::vector<unsigned char> out(s.mask_bytes(), 0xff);
  const int squares = (s.T + 15) / 16;
  size_t at = 0;
  for (int bh = 0; bh < s.B * s.NH; bh++)
    for (int square = 0; square < squares * squares; square++, at += 32) {
      const int q0 = square / squares * 16, kv0 = square % squares * 16;
      for (int q = q0; q < q0 + 16 && kv0 <= q0; q++)
        for (int kv = kv0; kv < kv0 + 16; kv++) {
          const int lane = q % 8 * 4 + kv % 8 / 2, element = kv % 2 + q / 8 % 2 * 2 + kv / 8 % 2 * 4;
          if (attention_draw(drop, uint64_t(drop.first_row) * s.NH + bh, q, kv, s.T) >= drop.threshold)
            out[at + lane] &= ~(1 << element);
        }
    }
  return out;
}

}  // namespace

TEMPLATE_TEST_CASE("attention on the device: forward stores the CPU's masks, backward takes them", "[cuda]", bf16,
                   fp16) {
  for (const int HS : {16, 32, 64, 128})
    for (const int T : {1, 31, 33, 100, 195}) {
      if (T > 100 && HS != 64) continue;  // only version 2 of backward has tiles so late
      const Shape s{T == 33 ? 2 : 1, T, T > 100 ? 1 : 2, HS};
      const Dropout drop = dropout(0.2, T % 2 * 3);
      const std::vector<float> qkv = random_qkv(s), dout = random_dout(s);
      const std::vector<unsigned char> want = expected_mask(s, drop);
      const Results<TestType> drawn = forward<TestType>(s, qkv, drop, 1);
      for (const int forward_version : {1, 2}) {
        CAPTURE(T, HS, forward_version);
        const Results<TestType> stored = forward<TestType>(s, qkv, drop, forward_version, true);
        CHECK(stored.mask == want);
        check_same_bits(stored.out.data(), drawn.out.data(), drawn.out.size());
        check_same_bits(stored.lse.data(), drawn.lse.data(), drawn.lse.size());
      }
      for (const int version : backward_versions<TestType>(s)) {
        CAPTURE(T, HS, version);
        const BackwardVersion chosen(version);
        const Results<TestType> a = backward<TestType>(s, qkv, dout, drawn.out, drawn.lse, drop);
        const Results<TestType> b = backward<TestType>(s, qkv, dout, drawn.out, drawn.lse, drop, want);
        check_same_bits(a.dqkv.data(), b.dqkv.data(), a.dqkv.size());
      }
    }
}

// A step of 32 keys reaches above the diagonal. There all stored bits are one here, and key 16 has an infinite value.
// Whoever took these bits for a mask would get 0 * infinity as dS of queries 0 ... 15.
TEST_CASE("attention on the device: stored masks above the diagonal are not read", "[cuda]") {
  for (const int HS : {16, 32, 64, 128}) {
    const Shape s{1, 32, 1, HS};
    std::vector<float> qkv = random_qkv(s);
    qkv[(16 * 3 + 2) * HS] = INFINITY;
    const std::vector<bf16> out(s.rows() * HS);
    const std::vector<unsigned char> ones(s.mask_bytes(), 0xff);
    const std::vector<bf16> dqkv =
        backward<bf16>(s, qkv, random_dout(s), out, std::vector<float>(s.weights(), 3), dropout(0.2), ones).dqkv;
    int infinite = 0;
    for (int q = 0; q < 16; q++)
      for (int c = 0; c < HS; c++) infinite += !std::isfinite(float(dqkv[q * 3 * HS + c]));
    CHECK(infinite == 0);
  }
}

// Two runs give the same bits, and a batch row does not depend on its neighbours.
TEMPLATE_TEST_CASE("attention on the device: the same bits", "[cuda]", float, bf16, fp16) {
  const FloatVersion float_kernels(every_float_version<TestType>());
  const bool plain = std::is_same_v<TestType, float>;
  for (const int HS : plain ? std::vector{32} : std::vector{32, 64}) {
    const Shape all{3, 66, 2, HS}, one{1, 66, 2, HS};
    const std::vector<float> qkv = random_qkv(all), dout = random_dout(all);
    const auto row = [&](const std::vector<float>& x) {
      return std::vector<float>(x.begin() + x.size() / 3, x.begin() + 2 * x.size() / 3);
    };
    const auto run = [](const Shape& s, const std::vector<float>& in, const std::vector<float>& d, int first_row) {
      const Results<TestType> f = forward<TestType>(s, in, dropout(0.2, first_row));
      const Results<TestType> b = backward<TestType>(s, in, d, f.out, f.lse, dropout(0.2, first_row));
      return Results<TestType>{f.out, b.dqkv, f.lse, b.D};
    };
    for (const int version : backward_versions<TestType>(all)) {
      CAPTURE(version);
      const BackwardVersion chosen(version);
      const Results<TestType> a = run(all, qkv, dout, 4), b = run(all, qkv, dout, 4);
      const Results<TestType> c = run(one, row(qkv), row(dout), 5);
      check_same_bits(a.out.data(), b.out.data(), a.out.size());
      check_same_bits(a.lse.data(), b.lse.data(), a.lse.size());
      check_same_bits(a.dqkv.data(), b.dqkv.data(), a.dqkv.size());
      check_same_bits(a.D.data(), b.D.data(), a.D.size());
      check_same_bits(a.out.data() + c.out.size(), c.out.data(), c.out.size());
      check_same_bits(a.lse.data() + c.lse.size(), c.lse.data(), c.lse.size());
      check_same_bits(a.dqkv.data() + c.dqkv.size(), c.dqkv.data(), c.dqkv.size());
    }
  }
}

TEMPLATE_TEST_CASE("attention on the device: evaluation needs no lse, and sees no later query", "[cuda]", float, bf16,
                   fp16) {
  const FloatVersion float_kernels(every_float_version<TestType>());
  const Shape s{1, 70, 1, 64}, shorter{1, 33, 1, 64};
  const std::vector<float> qkv = random_qkv(s);
  const DeviceArray<TestType> in(qkv), out(s.rows() * s.C());
  const std::vector<TestType> got = forward<TestType>(s, qkv, {}).out;
  for (const int version : {1, 2}) {
    const ForwardVersion chosen(version);
    attention_forward(out.data(), nullptr, nullptr, in.data(), {}, s.B, s.T, s.C(), s.NH, nullptr, tf32);
    const std::vector<TestType> without_lse = out.read();
    check_same_bits(got.data(), without_lse.data(), got.size());
  }
  const std::vector<TestType> first = forward<TestType>(shorter, {qkv.begin(), qkv.begin() + 33 * 3 * 64}, {}).out;
  check_same_bits(got.data(), first.data(), first.size());
}

// What T is to version 2: one or several of its eight tiles, the last full or not; 257 is for version 1 again.
TEMPLATE_TEST_CASE("attention on the device: version 2 of forward, up to its last tile", "[cuda]", bf16, fp16) {
  for (const int T : {129, 160, 193, 224, 255, 256, 257})
    for (const int HS : {32, 64}) {
      const Shape s{1, T, T % 2 ? 1 : 2, HS};
      forward<TestType>(s, random_qkv(s), dropout(HS == 64 ? 0.2 : 0));
    }
}

// Version 1 multiplies a square's hidden weights, which are 0, by their values, and 0 * infinity is not a number.
// Version 2 leaves such squares out. So we can tell from the results which of them ran.
TEST_CASE("attention on the device: which version of forward runs", "[cuda]") {
  const auto ran = [](int version, int T, int HS) {
    const Shape s{1, T, 1, HS};
    std::vector<float> qkv = random_qkv(s);
    qkv[(16 * 3 + 2) * HS] = INFINITY;  // value 16
    return std::isnan(float(forward<bf16>(s, qkv, {}, version).out[0])) ? 1 : 2;
  };
  CHECK(ran(1, 256, 64) == 1);
  for (const int T : {17, 256, 257})
    for (const int HS : {16, 32, 64, 128}) {
      CAPTURE(T, HS);
      CHECK(ran(2, T, HS) == (T <= 256 && (HS == 32 || HS == 64) ? 2 : 1));
    }
}

// They add up in another order, and round otherwise. So we can tell from the bits which of them ran.
TEST_CASE("attention on the device: which kernels of floats run", "[cuda]") {
  if (current_card().major < 8) return skip("needs a card with TF32");
  const Shape s{1, 40, 1, 32};
  const std::vector<float> qkv = random_qkv(s), dout = random_dout(s);
  const Results<float> given = forward<float>(s, qkv, {}, 1);
  std::set<std::vector<float>> outs, gradients;
  for (const FloatKernels kernels : {FloatKernels::simple, FloatKernels::three_products, FloatKernels::one_product}) {
    const FloatVersion chosen(kernels);
    outs.insert(forward<float>(s, qkv, {}, 1).out);
    gradients.insert(backward<float>(s, qkv, dout, given.out, given.lse, {}).dqkv);
  }
  CHECK(outs.size() == 3);
  CHECK(gradients.size() == 3);
}

TEST_CASE("attention on the device: what fits the card's shared memory", "[cuda]") {
  using namespace attention;
  constexpr size_t turing = 64 << 10, ada = 99 << 10, hopper = 227 << 10;
  CHECK(whole_head_fits(64, 256, ada));
  CHECK(!whole_head_fits(64, 256, turing));
  CHECK(whole_head_fits(64, 256, head_smem(64)));  // exactly
  CHECK(!whole_head_fits(64, 256, head_smem(64) - 1));
  CHECK(whole_head_fits(32, 256, turing));
  CHECK(!whole_head_fits(32, 257, hopper));
  CHECK(!whole_head_fits(16, 17, hopper));
  CHECK(!whole_head_fits(128, 17, hopper));
  constexpr size_t needed = once::smem_bytes + once::mask_bytes;
  CHECK(once::fits(64, 256, hopper));
  CHECK(once::fits(64, 256, needed));
  CHECK(!once::fits(64, 256, needed - 1));
  CHECK(!once::fits(64, 257, hopper));
  CHECK(!once::fits(32, 256, hopper));
}

TEST_CASE("attention on the device refuses what it cannot do", "[cuda]") {
  const auto message = [](int B, int T, int C, int NH, const Dropout& drop) {
    try {
      attention_forward<bf16>(nullptr, nullptr, nullptr, nullptr, {drop, nullptr}, B, T, C, NH, nullptr);
    } catch (const std::invalid_argument& e) { return std::string(e.what()); }
    return std::string("no error");
  };
  CHECK(contains(message(1, 8, 96, 2, {}), "head size 48"));
  CHECK(contains(message(1, 8, 100, 3, {}), "C = 100"));
  CHECK(contains(message(65536, 8, 64, 1, {}), "B = 65536"));
  CHECK(contains(message(1, 8, 64, 1, dropout(0.2)), "step"));
  CHECK_THROWS_AS(attention_backward<float>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, {}, 1, 8, 24,
                                            1, nullptr),
                  std::invalid_argument);
}
