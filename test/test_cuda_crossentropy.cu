#include <limits>

#include "../kernels/crossentropy.cuh"
#include "../kernels/crossentropy.h"
#include "cuda.h"

namespace {

constexpr double a_nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

int padded(int V) { return (V + 7) / 8 * 8; }

// (rows, V) -> (rows, Vp), with NaN in the padding
std::vector<float> with_padding(const std::vector<float>& x, int rows, int V, int Vp) {
  std::vector<float> out(size_t(rows) * Vp, float(a_nan));
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < V; v++) out[r * Vp + v] = x[r * V + v];
  return out;
}

std::vector<int> some_targets(int rows, int V) {
  std::vector<int> out(rows);
  for (int r = 0; r < rows; r++) out[r] = int(random4(7, 0, 0, r).word[0] % V);
  out[0] = V - 1;
  out[rows - 1] = 0;
  return out;
}

// Appends targets for rows that do not exist: a kernel that writes a loss for such a row hits a guard.
std::vector<int> with_targets_behind(std::vector<int> targets) {
  targets.resize(targets.size() + 8, 0);
  return targets;
}

struct Reference {
  std::vector<double> losses, dlogits;  // (rows), (rows, V)
};
Reference reference(const std::vector<double>& logits, const std::vector<int>& targets, double dloss, int V) {
  const int rows = int(targets.size());
  Reference want = {std::vector<double>(rows), std::vector<double>(logits.size())};
  std::vector<double> probs(logits.size());
  crossentropy_forward(want.losses.data(), probs.data(), logits.data(), targets.data(), rows, V);
  crossentropy_backward(want.dlogits.data(), probs.data(), targets.data(), dloss, rows, V);
  return want;
}

template <class Real>
struct Result {
  std::vector<float> losses;
  std::vector<Real> dlogits;  // (rows, Vp)
};
template <class Real>
Result<Real> forward_backward(const std::vector<float>& logits, const std::vector<int>& targets, float dloss,
                              float loss_scale, int V, int Vp) {
  const int rows = int(targets.size());
  DeviceArray<float> losses(rows), scale(std::vector<float>{loss_scale});
  DeviceArray<Real> inout(with_padding(logits, rows, V, Vp));
  DeviceArray<int> y(with_targets_behind(targets));
  crossentropy_forward_backward(losses.data(), inout.data(), y.data(), dloss, scale.data(), rows, V, Vp, nullptr);
  return {losses.read(), inout.read()};
}

template <class Real>
std::vector<float> forward(const std::vector<float>& logits, const std::vector<int>& targets, int V, int Vp) {
  const int rows = int(targets.size());
  DeviceArray<float> losses(rows);
  DeviceArray<Real> in(with_padding(logits, rows, V, Vp));
  DeviceArray<int> y(with_targets_behind(targets));
  const std::vector<Real> before = in.read();
  crossentropy_forward(losses.data(), in.data(), y.data(), rows, V, Vp, nullptr);
  const std::vector<Real> after = in.read();
  CHECK(std::memcmp(before.data(), after.data(), before.size() * sizeof(Real)) == 0);
  return losses.read();
}

// A logit's distance from the largest, up to about 10 here, is rounded once: its exponential is off by 8 * 2^-24 of
// itself. A float sum of V exponentials adds about sqrt(V) * 2^-24.
double tolerance(int V) { return (8 + 2 * std::sqrt(V)) * 0x1p-24; }

template <class Real>
void check_shape(int rows, int V, int Vp) {
  INFO("rows " << rows << ", V " << V << ", Vp " << Vp);
  const std::vector<float> logits = noise(size_t(rows) * V, 1, 2);
  const std::vector<int> targets = some_targets(rows, V);
  const float dloss = 1.f / float(rows), loss_scale = 64;
  const Reference want = reference(rounded<Real>(logits), targets, double(dloss) * loss_scale, V);

  const std::vector<float> losses = forward<Real>(logits, targets, V, Vp);
  check_close(losses, want.losses, V == 1 ? 0 : tolerance(V));

  const Result<Real> got = forward_backward<Real>(logits, targets, dloss, loss_scale, V, Vp);
  CHECK((got.losses == losses));
  std::vector<float> inside, outside;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < Vp; v++) (v < V ? inside : outside).push_back(float(got.dlogits[r * Vp + v]));
  check_close(inside, want.dlogits, V == 1 ? 0 : tolerance(V) + rounding_of<Real>);
  CHECK((outside == std::vector<float>(outside.size(), 0)));

  const Result<Real> again = forward_backward<Real>(logits, targets, dloss, loss_scale, V, Vp);
  CHECK((again.losses == got.losses));
  CHECK(std::memcmp(again.dlogits.data(), got.dlogits.data(), got.dlogits.size() * sizeof(Real)) == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("Cross-entropy on the device", "[cuda]", float, bf16, fp16) {
  for (const int V : {1, 2, 8, 65, 120, 128, 129, 256, 300, 1000}) check_shape<TestType>(5, V, padded(V));
  for (const int rows : {1, 2, 8, 31}) check_shape<TestType>(rows, 65, 72);
  check_shape<TestType>(9, 200, 200);
  check_shape<TestType>(3, 65, 128);  // some groups of eight columns are all padding
  check_shape<TestType>(3, 65, 640);
}

TEMPLATE_TEST_CASE("Cross-entropy on the device: every column can be the target", "[cuda]", float, bf16, fp16) {
  for (const int V : {65, 300}) {
    std::vector<int> targets(V);
    for (int v = 0; v < V; v++) targets[v] = v;
    const std::vector<float> logits = noise(size_t(V) * V, 2);
    const Reference want = reference(rounded<TestType>(logits), targets, 1, V);
    const Result<TestType> got = forward_backward<TestType>(logits, targets, 1, 1, V, padded(V));
    check_close(got.losses, want.losses, tolerance(V));
    for (int v = 0; v < V; v++) CHECK(float(got.dlogits[size_t(v) * padded(V) + v]) < -0.5f);
  }
}

TEST_CASE("Cross-entropy on the device: logits far apart", "[cuda]") {
  const std::vector<float> logits = {1e38f,  -1e38f,
                                     0,      3e38f,  // one token has all the weight
                                     -3e38f, -3e38f,
                                     -3e38f, -3e38f,  // all tokens have the same weight
                                     0,      -float(infinity),
                                     0,      -float(infinity),  // two tokens are impossible
                                     1e4f,   1e4f,
                                     -1e4f,  0};
  const std::vector<int> targets = {3, 1, 2, 0};
  const Result<float> got = forward_backward<float>(logits, targets, 1, 1, 4, 8);
  const float log2 = std::log(2.f);
  check_close(got.losses, std::vector<float>{0, 2 * log2, log2, log2}, 0x1p-23);
  const float q = 0.25f, h = 0.5f;
  const std::vector<float> dlogits = {0, 0, 0,  0, 0, 0, 0, 0, q,  q - 1, q, q, 0, 0, 0, 0,
                                      h, 0, -h, 0, 0, 0, 0, 0, -h, h,     0, 0, 0, 0, 0, 0};
  check_close(got.dlogits, dlogits, 0x1p-23);
  // A lane's first columns may be impossible, or all of its later ones.
  std::vector<float> wide(300, -float(infinity));
  wide[0] = wide[299] = 1;
  CHECK(std::fabs(forward<float>(wide, {299}, 300, 304)[0] - log2) < 0x1p-22f);
  CHECK(forward<float>(wide, {5}, 300, 304)[0] == float(infinity));
}

TEST_CASE("Cross-entropy on the device: a logit that is not finite makes the loss NaN, in its row alone", "[cuda]") {
  for (const float bad : {float(a_nan), float(infinity)})
    for (const int V : {65, 300}) {
      std::vector<float> logits = noise(size_t(3) * V, 3);
      logits[V + 17] = bad;
      const std::vector<float> losses = forward<float>(logits, {1, 17, 2}, V, padded(V));
      CHECK(std::isfinite(losses[0]));
      CHECK(std::isnan(losses[1]));
      CHECK(std::isfinite(losses[2]));
      CHECK(std::isnan(forward<float>(logits, {1, 20, 2}, V, padded(V))[1]));
      const Result<float> got = forward_backward<float>(logits, {1, 17, 2}, 1, 1, V, padded(V));
      CHECK(got.dlogits[padded(V) + V] == 0);  // the padding's gradient is 0 even in a row of NaN
    }
}

TEST_CASE("Cross-entropy on the device refuses rows that it cannot load", "[cuda]") {
  DeviceArray<float> a(80);
  DeviceArray<int> y(1);
  CHECK_THROWS_WITH(crossentropy_forward(a.data(), a.data(), y.data(), 1, 65, 65, nullptr),
                    ContainsSubstring("65 elements"));
  CHECK_THROWS_WITH(crossentropy_forward(a.data(), a.data(), y.data(), 1, 65, 64, nullptr),
                    ContainsSubstring("64 elements for V = 65"));
}

TEST_CASE("The losses' sum on the device is that of doubles", "[cuda]") {
  for (const int rows : {1, 31, 1024, 5000}) {
    const std::vector<float> losses = noise(rows, 4);
    double want = 0, absolute = 0;
    for (const float loss : losses) want += loss, absolute += std::fabs(loss);
    DeviceArray<float> in(losses);
    DeviceArray<double> sum(1), again(1);
    sum_losses(sum.data(), in.data(), rows, nullptr);  // before, sum was NaN
    const double once = sum.read()[0];
    CHECK(std::fabs(once - want) <= 1e-15 * absolute);
    sum_losses(again.data(), in.data(), rows, nullptr);
    CHECK(again.read()[0] == once);
  }
}
