#include <limits>

#include "../kernels/adamw.cuh"
#include "../kernels/adamw.h"
#include "cuda.h"

namespace {

constexpr float a_nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0;
}

std::vector<double> doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }
std::vector<float> absolute(std::vector<float> x) {
  for (float& y : x) y = std::fabs(y);
  return x;
}

// Large values, so that an update is about as large as the parameter and every term of it shows.
constexpr double beta1 = 0.9, beta2 = 0.99, eps = 1e-2, weight_decay = 0.3;
double learning_rate_of(int iteration) { return 0.5 / (1 + iteration); }

std::vector<AdamWStep> make_table(int iterations) {
  std::vector<AdamWStep> table;
  for (int i = 0; i < iterations; i++)
    table.push_back(adamw_step(learning_rate_of(i), beta1, beta2, weight_decay, i + 1));
  return table;
}

// Everything that one training run holds.
template <class Real>
struct Training {
  DeviceArray<float> params, m, v, grads, ring{std::vector<float>(4, 0)};
  DeviceArray<Real> working;
  DeviceArray<AdamWStep> table{make_table(8)};
  DeviceArray<TrainState> state;
  Real* copy = nullptr;

  Training(const std::vector<float>& p, const std::vector<float>& m0, const std::vector<float>& v0,
           const std::vector<float>& g, const TrainState& s = {})
      : params(p), m(m0), v(v0), grads(g), working(p.size()), state(std::vector<TrainState>{s}) {
    if (!std::is_same_v<Real, float>) copy = working.data();
  }
  void update() {
    adamw_update(params.data(), m.data(), v.data(), copy, grads.data(), params.size(), beta1, beta2, eps, table.data(),
                 8, state.data(), nullptr);
  }
  void step() {
    update();
    end_step(state.data(), ring.data(), 4, 1, false, nullptr);
  }
};

TrainState run_end_step(TrainState s, bool loss_scaling, int times = 1) {
  DeviceArray<TrainState> state(std::vector<TrainState>{s});
  DeviceArray<float> ring(3);
  for (int i = 0; i < times; i++) end_step(state.data(), ring.data(), 3, 1, loss_scaling, nullptr);
  return state.read()[0];
}

}  // namespace

TEMPLATE_TEST_CASE("AdamW on the device", "[cuda]", float, bf16, fp16) {
  for (const size_t count : {4, 1000, 1024, 2500}) {
    const std::vector<float> p = noise(count, 1), m0 = noise(count, 2), v0 = absolute(noise(count, 3)),
                             g = noise(count, 4);
    const TrainState state = {.gradient_scale = 0.75f};
    std::vector<double> want_p = doubles(p), want_m = doubles(m0), want_v = doubles(v0), want_g = doubles(g);
    std::vector<float> twin_p = p, twin_m = m0, twin_v = v0;
    Training<TestType> a(p, m0, v0, g, state), b(p, m0, v0, g, state);
    for (int i = 0; i < 5; i++) {
      const AdamW o = {learning_rate_of(i), beta1, beta2, eps, weight_decay, i + 1, 0.75};
      adamw_update(want_p.data(), want_m.data(), want_v.data(), want_g.data(), count, o);
      adamw_update(twin_p.data(), twin_m.data(), twin_v.data(), g.data(), count, o);
      a.step();
      b.step();
    }
    // Five steps, each rounds a few times.
    const double tolerance = 8 * 0x1p-24;
    check_close(a.params.read(), want_p, tolerance);
    check_close(a.m.read(), want_m, tolerance);
    check_close(a.v.read(), want_v, tolerance);
    check_close(a.params.read(), twin_p, tolerance);
    check_close(a.m.read(), twin_m, tolerance);
    check_close(a.v.read(), twin_v, tolerance);
    CHECK(same_bits(a.grads.read(), g));
    const std::vector<TestType> working = a.working.read();
    if (a.copy)
      CHECK((a.working.floats() == rounded<TestType, float>(a.params.read())));
    else
      CHECK(std::isnan(float(working[0])));  // nobody wrote it
    CHECK(same_bits(a.params.read(), b.params.read()));
    CHECK(same_bits(a.m.read(), b.m.read()));
    CHECK(same_bits(a.v.read(), b.v.read()));
    CHECK(same_bits(working, b.working.read()));
    CHECK(a.state.read()[0].step == 5);
  }
}

TEST_CASE("AdamW on the device with the constants of a real run", "[cuda]") {
  // Parameters of 0 show the update alone.
  const size_t count = 400;
  const std::vector<float> p(count, 0), m0 = noise(count, 1, 1e-3), v0 = absolute(noise(count, 2, 1e-6)),
                                        g = noise(count, 3, 1e-3);
  for (const int iteration : {0, 1, 99, 4999, 1999999999}) {
    std::vector<double> want_p = doubles(p), want_m = doubles(m0), want_v = doubles(v0), want_g = doubles(g);
    adamw_update(want_p.data(), want_m.data(), want_v.data(), want_g.data(), count,
                 AdamW{3e-4, 0.9, 0.999, 1e-8, 0.01, iteration + 1, 1});
    std::vector<AdamWStep> rows(50);
    rows[iteration % 50] = adamw_step(3e-4, 0.9, 0.999, 0.01, iteration + 1);
    DeviceArray<float> params(p), m(m0), v(v0), grads(g);
    DeviceArray<AdamWStep> table(rows);
    DeviceArray<TrainState> state(std::vector<TrainState>{{.step = iteration}});
    adamw_update<float>(params.data(), m.data(), v.data(), nullptr, grads.data(), count, 0.9, 0.999, 1e-8, table.data(),
                        50, state.data(), nullptr);
    check_close(params.read(), want_p, 8 * 0x1p-24);
    check_close(m.read(), want_m, 4 * 0x1p-24);
    check_close(v.read(), want_v, 4 * 0x1p-24);
  }
}

TEST_CASE("AdamW on the device: 1 - beta is that of doubles", "[cuda]") {
  // m = (1 - beta1) * g: if we rounded beta1 to float first, 1 - 0.9 would be 4 units in the last place too large.
  const std::vector<float> zeros(4, 0), ones(4, 1);
  Training<float> a(zeros, zeros, zeros, ones);
  a.update();
  CHECK(a.m.read()[0] == float(1 - beta1));
  CHECK(a.v.read()[0] == float(1 - beta2));
}

TEMPLATE_TEST_CASE("AdamW on the device leaves everything alone after an overflow", "[cuda]", float, bf16, fp16) {
  const size_t count = 1000;
  const std::vector<float> p = noise(count, 1), v0 = absolute(noise(count, 3));
  Training<TestType> a(p, p, v0, std::vector<float>(count, infinity), {.overflow = 1});
  a.update();
  CHECK(same_bits(a.params.read(), p));
  CHECK(same_bits(a.m.read(), p));
  CHECK(same_bits(a.v.read(), v0));
  CHECK(same_bits(a.working.read(), DeviceArray<TestType>(count).read()));
}

TEST_CASE("AdamW on the device: a gap between tensors harms nobody and stays NaN", "[cuda]") {
  const size_t count = 256;
  std::vector<float> p = noise(count, 1), m0 = noise(count, 2), v0 = absolute(noise(count, 3)), g = noise(count, 4);
  const auto gap = [](size_t i) { return i >= 65 && i < 130; };
  std::vector<float> p_gap = p, g_gap = g;
  for (size_t i = 0; i < count; i++)
    if (gap(i)) p_gap[i] = g_gap[i] = a_nan;
  Training<bf16> with(p_gap, m0, v0, g_gap), without(p, m0, v0, g);
  with.step();
  without.step();
  const std::vector<float> got = with.params.read(), want = without.params.read();
  const std::vector<float> working = with.working.floats(), want_working = without.working.floats();
  size_t wrong = 0;
  for (size_t i = 0; i < count; i++)
    wrong += gap(i) ? !std::isnan(got[i]) : got[i] != want[i] || working[i] != want_working[i];
  CHECK(wrong == 0);
}

TEST_CASE("AdamW on the device refuses a count that is not a multiple of 4", "[cuda]") {
  const std::vector<float> x(6, 1);
  Training<float> a(x, x, x, x);
  CHECK_THROWS_WITH(a.update(), ContainsSubstring("count = 6"));
}

namespace {

size_t units_of(size_t count) { return ceil_div(count, norm_unit(count)); }

// Each unit's sum of squares, in two launches: as two ranks compute them.
void norm_of(const DeviceArray<double>& partials, const DeviceArray<float>& grads) {
  const size_t units = units_of(grads.size()), first = units / 2;
  CHECK(partials.size() == units);
  CHECK(units <= gradient_norm_partials);
  gradient_norm(partials.data(), grads.data(), grads.size(), {first, units - first}, nullptr);
  gradient_norm(partials.data(), grads.data(), grads.size(), {0, first}, nullptr);
}

// The state after prepare_update has computed the norm of the gradients. The last block gets fewer of them.
TrainState prepare(const std::vector<float>& gradients, double grad_clip, bool loss_scaling, float loss_scale = 1) {
  DeviceArray<float> grads(gradients);
  DeviceArray<double> partials(units_of(gradients.size()));
  DeviceArray<TrainState> state(
      std::vector<TrainState>{{.loss_scale = loss_scale, .overflow = 7, .gradient_scale = a_nan}});
  norm_of(partials, grads);
  prepare_update(state.data(), partials.data(), gradients.size(), grad_clip, loss_scaling, nullptr);
  double sum = 0;
  for (const double partial : partials.read()) sum += partial;
  const double want = gradient_norm_squared(gradients.data(), gradients.size());
  // A sum of equal terms may round in the same direction each time: 5000 * 2^-53.
  if (std::isfinite(want)) CHECK(std::fabs(sum - want) <= 1e-12 * want);
  return state.read()[0];
}

}  // namespace

TEST_CASE("The gradient's norm on the device decides about clipping", "[cuda]") {
  const std::vector<float> gradients = noise(11716, 1);
  const double norm = std::sqrt(gradient_norm_squared(gradients.data(), gradients.size()));
  const auto scale = [&](double grad_clip, float loss_scale = 1) {
    const TrainState s = prepare(gradients, grad_clip, loss_scale != 1, loss_scale);
    CHECK(s.overflow == 0);
    CHECK(s.loss_scale == loss_scale);
    CHECK(s.step == 0);
    return s.gradient_scale;
  };
  CHECK(scale(0) == 1);
  CHECK(scale(norm * 1.0001) == 1);
  // Another order of the sum may change the last bit after rounding to float, but no more.
  CHECK(std::fabs(scale(norm * 0.9999) - 0.9999) < 0x1p-23);
  CHECK(std::fabs(scale(1) * norm - 1) < 0x1p-23);
  CHECK(scale(0, 1024) == 1.f / 1024);
  CHECK(scale(norm, 1024) == 1.f / 1024);  // the true norm is norm / 1024
  CHECK(std::fabs(scale(1, 16) * norm - 1) < 0x1p-23);
  CHECK(scale(1, 16) == scale(1, 16));
}

TEST_CASE("The gradient's norm on the device: more gradients than the blocks have threads", "[cuda]") {
  const size_t count = 4 * 256 * gradient_norm_partials + 68;
  std::vector<float> gradients(count, 0);
  for (const size_t i : {size_t{0}, size_t{777}, count - 69, count - 68, count - 1}) gradients[i] = 3;
  CHECK(std::fabs(prepare(gradients, 1, false).gradient_scale * std::sqrt(45.0) - 1) < 0x1p-23);
}

TEST_CASE("A gradient that is not finite is found wherever it is", "[cuda]") {
  const size_t count = 5000;
  for (const auto& [at, bad] : {std::pair{size_t{0}, infinity}, {1, a_nan}, {1026, -infinity}, {count - 1, a_nan}}) {
    std::vector<float> gradients = noise(count, 1);
    gradients[at] = bad;
    CHECK(prepare(gradients, 0, true, 8).overflow == 1);
  }
  // Without loss scaling NaN is no overflow: the update goes on, as on the CPU, and training stops.
  std::vector<float> gradients = noise(count, 1);
  gradients[200] = a_nan;
  CHECK(prepare(gradients, 1, false).overflow == 0);
  CHECK(prepare(gradients, 1, false).gradient_scale == 1);
  // The squares of large floats overflow a float, but they are finite.
  gradients.assign(count, 1e30f);
  CHECK(prepare(gradients, 1, true).overflow == 0);
  CHECK(std::fabs(prepare(gradients, 1, true).gradient_scale * 1e30 * std::sqrt(double(count)) - 1) < 0x1p-22);
}

TEST_CASE("A scaled loss leads to the same update, bit for bit", "[cuda]") {
  const size_t count = 5000;
  const std::vector<float> gradients = noise(count, 1);
  std::vector<float> scaled = gradients;
  for (float& x : scaled) x *= 4096;
  const std::vector<float> p = noise(count, 5), zeros(count, 0);
  const auto run = [&](const std::vector<float>& grads, float loss_scale) {
    Training<float> a(p, zeros, zeros, grads, {.loss_scale = loss_scale});
    DeviceArray<double> partials(units_of(count));
    norm_of(partials, a.grads);
    prepare_update(a.state.data(), partials.data(), count, 1, true, nullptr);
    a.update();
    return a.params.read();
  };
  CHECK(same_bits(run(scaled, 4096), run(gradients, 1)));
}

TEST_CASE("The end of a step records the loss and counts", "[cuda]") {
  DeviceArray<TrainState> state(std::vector<TrainState>{{.loss_sum = {12}, .step = 4}});
  DeviceArray<float> ring(3);
  end_step(state.data(), ring.data(), 3, 0.25, false, nullptr);
  const std::vector<float> losses = ring.read();
  CHECK(std::isnan(losses[0]));
  CHECK(losses[1] == 3);
  CHECK(std::isnan(losses[2]));
  const TrainState s = state.read()[0];
  CHECK(s.step == 5);
  CHECK(s.loss_scale == 1);
  CHECK(s.steps_since_overflow == 0);
  CHECK(s.gradient_scale == 1);
}

TEST_CASE("The loss scale follows the gradients", "[cuda]") {
  CHECK(initial_state(false).loss_scale == 1);
  TrainState start = initial_state(true);
  start.step = 10;
  start.steps_since_overflow = loss_scale_interval - 3;
  TrainState s = run_end_step(start, true, 2);
  CHECK(s.loss_scale == loss_scale_start);
  CHECK(s.steps_since_overflow == loss_scale_interval - 1);
  s = run_end_step(s, true);
  CHECK(s.loss_scale == 2 * loss_scale_start);
  CHECK(s.steps_since_overflow == 0);
  CHECK(s.step == 13);

  s.steps_since_overflow = 1500;
  s.overflow = 1;
  s = run_end_step(s, true);
  CHECK(s.loss_scale == loss_scale_start);
  CHECK(s.steps_since_overflow == 0);
  CHECK(s.overflow == 0);
  CHECK(s.step == 14);  // an overflow does not keep the step from counting

  s.loss_scale = 1;
  s.overflow = 1;
  CHECK(run_end_step(s, true).loss_scale == 1);
  s.overflow = 0;
  s.loss_scale = loss_scale_largest;
  s.steps_since_overflow = loss_scale_interval - 1;
  CHECK(run_end_step(s, true).loss_scale == loss_scale_largest);
  s.loss_scale = 4;
  CHECK(run_end_step(s, false).loss_scale == 4);
}
