// LayerNorm on the device, with and without the residual connection before it, against residual.h and layernorm.h in
// double.
#include <vector>

#include "../host/tensors.h"
#include "../kernels/layernorm.cuh"
#include "../kernels/layernorm.h"
#include "../kernels/residual.h"
#include "cuda.h"

namespace {

using Doubles = std::vector<double>;

struct Shape {
  int B, T, C;
};
// Every way to deal a row to lanes, full or in part; one row; blocks that are not full; one chunk; the longest row.
const std::vector<Shape> shapes = {{3, 31, 8},  {3, 31, 48},  {1, 1, 128}, {4, 33, 192},  {3, 23, 384},
                                   {1, 1, 384}, {1, 31, 400}, {1, 3, 640}, {2, 33, 1040}, {3, 1, layernorm_max_C}};

Dropout dropout(double p) { return {0x123456789abc, 4711, site::fc_dropout + 3, dropout_threshold(p), 5}; }

// What a launcher gets: the step is on the device, not in the struct. Without dropout the pointer to it is null.
struct OnDevice {
  Dropout drop;
  DeviceArray<int> step_memory;
  explicit OnDevice(const Dropout& d) : drop(d), step_memory(std::vector<int>{int(d.step)}) { drop.step = 99; }
  DeviceDropout device() const { return {drop, drop.active() ? step_memory.data() : nullptr}; }
};

Doubles doubles(const std::vector<float>& x) { return Doubles(x.begin(), x.end()); }

// How much a float sum of C terms may be off.
double rounding(int C) { return 4 * std::sqrt(C) * 0x1p-24; }

struct Normalised {
  Doubles norm, mean, rstd;
};
Normalised normalised(const Doubles& inp, const std::vector<float>& weight, const std::vector<float>& bias, int rows,
                      int C) {
  Normalised want = {Doubles(inp.size()), Doubles(rows), Doubles(rows)};
  layernorm_forward(want.norm.data(), want.mean.data(), want.rstd.data(), inp.data(), doubles(weight).data(),
                    doubles(bias).data(), rows, C);
  return want;
}

template <class Real>
void check_forward(const Shape& s, double p) {
  const auto [B, T, C] = s;
  INFO("B " << B << ", T " << T << ", C " << C << ", p " << p);
  const int rows = B * T;
  const size_t count = size_t(rows) * C;
  const std::vector<float> inp = noise(count, 1), branch = noise(count, 2), branch_bias = noise(C, 3),
                           weight = noise(C, 4), bias = noise(C, 5);
  const Dropout drop = dropout(p);

  Doubles biased = rounded<Real>(branch), want_stream(count);
  for (size_t i = 0; i < count; i++) biased[i] += double(branch_bias[i % C]);
  residual_forward(want_stream.data(), rounded<Real>(inp).data(), biased.data(), drop, B, T, C);

  const OnDevice d(drop);
  const DeviceArray<Real> inp_device(inp), branch_device(branch), stream_out(count), norm(count);
  const DeviceArray<float> branch_bias_device(branch_bias), weight_device(weight), bias_device(bias), mean(rows),
      rstd(rows);
  residual_layernorm_forward(stream_out.data(), norm.data(), mean.data(), rstd.data(), inp_device.data(),
                             branch_device.data(), branch_bias_device.data(), d.device(), weight_device.data(),
                             bias_device.data(), B, T, C, nullptr);
  // Rounded once, after three operations in float.
  check_close(stream_out.floats(), want_stream, rounding_of<Real> + 3 * 0x1p-24);

  // The kernel normalises the rounded numbers that it stores.
  const Normalised want = normalised(doubles(stream_out.floats()), weight, bias, rows, C);
  check_close(norm.floats(), want.norm, rounding_of<Real> + rounding(C));
  check_close(mean.read(), want.mean, rounding(C));
  check_close(rstd.read(), want.rstd, rounding(C));

  // In place and without statistics, as in an evaluation, we get the same bits.
  const DeviceArray<Real> in_place(inp), norm_again(count);
  residual_layernorm_forward<Real>(in_place.data(), norm_again.data(), nullptr, nullptr, in_place.data(),
                                   branch_device.data(), branch_bias_device.data(), d.device(), weight_device.data(),
                                   bias_device.data(), B, T, C, nullptr);
  CHECK((in_place.floats() == stream_out.floats()));
  CHECK((norm_again.floats() == norm.floats()));

  // The first LayerNorm of a model has no branch before it.
  const DeviceArray<Real> norm_alone(count), norm_eval(count);
  const DeviceArray<float> mean_alone(rows), rstd_alone(rows);
  layernorm_forward(norm_alone.data(), mean_alone.data(), rstd_alone.data(), stream_out.data(), weight_device.data(),
                    bias_device.data(), rows, C, nullptr);
  layernorm_forward<Real>(norm_eval.data(), nullptr, nullptr, stream_out.data(), weight_device.data(),
                          bias_device.data(), rows, C, nullptr);
  CHECK((norm_alone.floats() == norm.floats()));
  CHECK((mean_alone.read() == mean.read()));
  CHECK((rstd_alone.read() == rstd.read()));
  CHECK((norm_eval.floats() == norm.floats()));
}

template <class Real>
void check_backward(const Shape& s, double p, bool first) {
  const auto [B, T, C] = s;
  INFO("B " << B << ", T " << T << ", C " << C << ", p " << p << ", first " << first);
  const int rows = B * T;
  const size_t count = size_t(rows) * C;
  const std::vector<float> dnorm = noise(count, 1), inp = noise(count, 2), dstream_before = noise(count, 3),
                           weight = noise(C, 4);
  const Dropout drop = dropout(p);

  const Normalised forward = normalised(rounded<Real>(inp), weight, weight, rows, C);
  const std::vector<float> mean(forward.mean.begin(), forward.mean.end()),
      rstd(forward.rstd.begin(), forward.rstd.end());
  Doubles want_dstream = first ? Doubles(count) : rounded<Real>(dstream_before), want_dbranch(count), want_dweight(C),
          want_dbias(C), want_dbranch_bias(C);
  layernorm_backward(want_dstream.data(), want_dweight.data(), want_dbias.data(), rounded<Real>(dnorm).data(),
                     rounded<Real>(inp).data(), doubles(mean).data(), doubles(rstd).data(), doubles(weight).data(),
                     rows, C);
  residual_backward(want_dbranch.data(), want_dstream.data(), drop, B, T, C);
  for (size_t i = 0; i < count; i++) want_dbranch_bias[i % C] += want_dbranch[i];

  const OnDevice d(drop);
  const DeviceArray<Real> dnorm_device(dnorm), inp_device(inp), dbranch(count);
  const DeviceArray<float> mean_device(mean), rstd_device(rstd), weight_device(weight);
  const DeviceArray<Real> added_to(dstream_before), written(count);
  const DeviceArray<Real>& dstream = first ? written : added_to;
  const DeviceArray<float> partials(layernorm_partials(rows, C));
  residual_layernorm_backward(dstream.data(), dbranch.data(), partials.data(), dnorm_device.data(), inp_device.data(),
                              mean_device.data(), rstd_device.data(), weight_device.data(), first, d.device(), B, T, C,
                              nullptr);
  // Each is rounded once, after two sums of C terms: dbranch does not come from the rounded dstream.
  check_close(dstream.floats(), want_dstream, rounding_of<Real> + rounding(C));
  check_close(dbranch.floats(), want_dbranch, rounding_of<Real> + rounding(C));
  const std::vector<float> got_dbranch = dbranch.floats();
  size_t wrong = 0;
  for (size_t i = 0; i < count; i++) wrong += (got_dbranch[i] == 0) != (want_dbranch[i] == 0);
  CHECK(wrong == 0);

  // The parameters' gradients are sums over the rows, and each term carries the rounding of sums of C terms.
  const DeviceArray<float> dweight(C), dbias(C), dbranch_bias(C);
  add_partials({layernorm_sums(dweight.data(), dbias.data(), dbranch_bias.data(), partials.data(), rows, C)}, nullptr);
  const double tolerance = rounding(rows) + rounding(C);
  check_close(dweight.read(), want_dweight, tolerance);
  check_close(dbias.read(), want_dbias, tolerance);
  check_close(dbranch_bias.read(), want_dbranch_bias, tolerance);

  // If dbranch overwrites dnorm, we get the same bits.
  const DeviceArray<Real> dstream_again(dstream_before), dnorm_dbranch(dnorm);
  const DeviceArray<float> partials_again(layernorm_partials(rows, C));
  residual_layernorm_backward(dstream_again.data(), dnorm_dbranch.data(), partials_again.data(), dnorm_dbranch.data(),
                              inp_device.data(), mean_device.data(), rstd_device.data(), weight_device.data(), first,
                              d.device(), B, T, C, nullptr);
  CHECK((dstream_again.floats() == dstream.floats()));
  CHECK((dnorm_dbranch.floats() == got_dbranch));
  CHECK((partials_again.read() == partials.read()));

  // Without a branch, the gradients of stream and parameters are the same, and the kernel draws no mask.
  const DeviceArray<Real> dstream_alone(dstream_before);
  const DeviceArray<float> partials_alone(layernorm_partials(rows, C)), dweight_alone(C), dbias_alone(C);
  residual_layernorm_backward<Real>(dstream_alone.data(), nullptr, partials_alone.data(), dnorm_device.data(),
                                    inp_device.data(), mean_device.data(), rstd_device.data(), weight_device.data(),
                                    first, {d.drop, nullptr}, B, T, C, nullptr);
  add_partials({layernorm_sums(dweight_alone.data(), dbias_alone.data(), nullptr, partials_alone.data(), rows, C)},
               nullptr);
  CHECK((dstream_alone.floats() == dstream.floats()));
  CHECK((dweight_alone.read() == dweight.read()));
  CHECK((dbias_alone.read() == dbias.read()));
}

}  // namespace

TEMPLATE_TEST_CASE("residual and LayerNorm forward on the device", "[cuda]", float, bf16, fp16) {
  for (const Shape& s : shapes)
    for (const double p : {0.0, 0.2}) check_forward<TestType>(s, p);
}

TEMPLATE_TEST_CASE("residual and LayerNorm backward on the device", "[cuda]", float, bf16, fp16) {
  for (const Shape& s : shapes) {
    check_backward<TestType>(s, 0.2, false);
    check_backward<TestType>(s, 0.0, true);
  }
}

TEMPLATE_TEST_CASE("residual dropout on the device has the CPU's mask", "[cuda]", float, bf16, fp16) {
  using Real = TestType;
  for (const Shape s : {Shape{3, 31, 48}, {2, 3, 384}, {1, 2, 1040}})
    for (const bool at_threshold : {false, true}) {
      const auto [B, T, C] = s;
      INFO("B " << B << ", T " << T << ", C " << C << ", a draw equals the threshold: " << at_threshold);
      const size_t count = size_t(B) * T * C;
      const std::vector<float> zeros(count, 0), ones(count, 1), no_bias(C, 0), weight(C, 1);
      Dropout drop = dropout(0.3);
      const uint64_t counter = uint64_t(drop.first_row) * T * C / 8;
      if (at_threshold) drop.threshold = draw_of(random4(drop.seed, drop.step, drop.site, counter), 3);
      std::vector<float> want(count);
      residual_forward(want.data(), zeros.data(), ones.data(), drop, B, T, C);
      for (float& x : want) x = float(Real(x));
      const OnDevice d(drop);
      const DeviceArray<Real> inp(zeros), branch(ones), stream_out(count), norm(count);
      const DeviceArray<float> bias(no_bias), w(weight);
      residual_layernorm_forward<Real>(stream_out.data(), norm.data(), nullptr, nullptr, inp.data(), branch.data(),
                                       bias.data(), d.device(), w.data(), bias.data(), B, T, C, nullptr);
      CHECK((stream_out.floats() == want));
    }
}

TEST_CASE("LayerNorm on the device: a variance far below the square of the mean", "[cuda]") {
  const int rows = 9, C = 384;
  std::vector<float> inp = noise(size_t(rows) * C, 1);
  for (float& x : inp) x += 100;
  const std::vector<float> weight(C, 1), bias(C, 0);
  const Normalised want = normalised(doubles(inp), weight, bias, rows, C);
  const DeviceArray<float> inp_device(inp), weight_device(weight), bias_device(bias), norm(inp.size()), mean(rows),
      rstd(rows);
  layernorm_forward(norm.data(), mean.data(), rstd.data(), inp_device.data(), weight_device.data(), bias_device.data(),
                    rows, C, nullptr);
  check_close(norm.read(), want.norm, 4 * 100 * 0x1p-24);  // the mean's rounding; E[x^2] - E[x]^2 is 100 times worse
  check_close(rstd.read(), want.rstd, rounding(C));
}

TEST_CASE("LayerNorm on the device: rows without a variance", "[cuda]") {
  const int rows = 3, C = 48;
  const std::vector<float> weight = noise(C, 1), bias = noise(C, 2);
  const DeviceArray<float> inp(std::vector<float>(rows * C, 3)), weight_device(weight), bias_device(bias), mean(rows),
      rstd(rows), norm(rows * C);
  layernorm_forward(norm.data(), mean.data(), rstd.data(), inp.data(), weight_device.data(), bias_device.data(), rows,
                    C, nullptr);
  check_close(rstd.read(), Doubles(rows, 1 / std::sqrt(1e-5)), 0x1p-20);
}

TEST_CASE("LayerNorm on the device refuses rows that it cannot hold", "[cuda]") {
  const DeviceArray<float> some(64);
  for (const int C : {12, 2056})
    CHECK_THROWS_AS(
        layernorm_forward<float>(some.data(), nullptr, nullptr, some.data(), some.data(), some.data(), 1, C, nullptr),
        std::invalid_argument);
  CHECK_THROWS_AS(layernorm_forward<float>(some.data(), some.data(), nullptr, some.data(), some.data(), some.data(), 1,
                                           16, nullptr),
                  std::invalid_argument);
}
