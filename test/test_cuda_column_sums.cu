#include <limits>

#include "../host/tensors.h"
#include "../kernels/column_sums.cuh"
#include "../kernels/relu.cuh"
#include "../kernels/relu.h"
#include "cuda.h"

namespace {

using Doubles = std::vector<double>;

double rounding(int terms) { return 4 * std::sqrt(double(terms)) * 0x1p-24; }

}  // namespace

TEMPLATE_TEST_CASE("A bias's gradient: columns are summed in a fixed order", "[cuda]", float, bf16, fp16) {
  using Real = TestType;
  struct Shape {
    int rows, OC, ld;
  };
  // One row; rows and columns that do not fill their blocks; many blocks of rows; several blocks of columns.
  const Shape s =
      GENERATE(Shape{1, 65, 72}, Shape{33, 72, 72}, Shape{64, 8, 16}, Shape{4200, 65, 72}, Shape{130, 600, 608});
  CAPTURE(s.rows, s.OC);
  const std::vector<float> x = noise(size_t(s.rows) * s.OC, 1);
  Doubles want(s.OC);
  const Doubles rounded_x = rounded<Real>(x);
  for (size_t i = 0; i < x.size(); i++) want[i % s.OC] += rounded_x[i];

  std::vector<float> padded(size_t(s.rows) * s.ld, std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < x.size(); i++) padded[i / s.OC * s.ld + i % s.OC] = x[i];
  const DeviceArray<Real> in(padded);
  std::vector<float> first;
  for (int run = 0; run < 2; run++) {
    const DeviceArray<float> partials(partials_size(s.rows, s.OC)), sums(s.OC);
    column_partials(partials.data(), in.data(), s.rows, s.OC, s.ld, nullptr);
    add_partials({sums_of(sums.data(), partials.data(), s.rows, s.OC)}, nullptr);
    partials.read();
    if (run == 0)
      check_close(first = sums.read(), want, rounding(s.rows));
    else
      CHECK((sums.read() == first));
  }
}

TEMPLATE_TEST_CASE("ReLU going back, with the sums for its bias", "[cuda]", float, bf16, fp16) {
  using Real = TestType;
  const auto [rows, OC] = GENERATE(std::pair{1, 8}, std::pair{31, 136}, std::pair{200, 264});
  CAPTURE(rows, OC);
  const size_t count = size_t(rows) * OC;
  const std::vector<float> dx = noise(count, 3);
  std::vector<float> out = noise(count, 4);
  out[7] = 0;
  Doubles want = rounded<Real>(dx), sums(partials_size(rows, OC));
  relu_backward(want.data(), rounded<Real>(out).data(), count);
  for (size_t i = 0; i < count; i++) sums[i / OC / sums_block_rows * OC + i % OC] += want[i];

  const DeviceArray<Real> d(dx), o(out);
  const DeviceArray<float> partials(sums.size());
  relu_backward(d.data(), partials.data(), o.data(), rows, OC, nullptr);
  CHECK((rounded<Real>(d.floats()) == want));
  CHECK(d.floats()[7] == 0);
  check_close(partials.read(), sums, rounding(sums_block_rows));

  // Outputs that no layer wrote are NaN, which lets the gradient pass.
  const DeviceArray<Real> lost(count), finite(dx);
  relu_backward(finite.data(), partials.data(), lost.data(), rows, OC, nullptr);
  CHECK((finite.floats() == rounded<Real, float>(dx)));
}

TEST_CASE("Partial sums of several tensors and layers are added in one launch", "[cuda]") {
  const int layers = 3, rows = 70 * 64 - 3, blocks = 70, C = 48;  // more blocks than the kernel loads at once
  const size_t stride = 128, three_stride = partials_size(rows, 3 * C) + 16, one_stride = partials_size(rows, C) + 8;
  const std::vector<float> three = noise(layers * three_stride, 1), one = noise(layers * one_stride, 2);
  const auto sum = [&](const std::vector<float>& partials, int l, size_t layer_stride, int width, int column) {
    double total = 0;
    for (int k = 0; k < blocks; k++) total += double(partials[l * layer_stride + size_t(k) * width + column]);
    return total;
  };

  const std::vector<float> before(layers * stride, NAN);
  const DeviceArray<float> a(before), c(before), d(before), alone(before), three_device(three), one_device(one);
  const auto slices = [](const DeviceArray<float>& x, size_t apart) { return Slices<float>{x.data(), apart}; };
  const Sums list[] = {
      {blocks, C, layers, 3, three_device.data(), three_stride, {a.data(), nullptr, c.data()}, {stride, 0, stride}},
      sums_of(slices(d, stride), slices(one_device, one_stride), rows, C, layers),
      sums_of(slices(a, stride), slices(one_device, one_stride), rows, C, 0),  // no layers: writes nothing
      sums_of(alone.data() + stride, one_device.data() + one_stride, rows, C),
  };
  add_partials(list, nullptr);
  const auto check = [&](const DeviceArray<float>& x, int first, int last, auto want) {
    const std::vector<float> got = x.read();
    for (int l = 0; l < layers; l++)
      for (size_t i = 0; i < stride; i++) {
        const size_t at = l * stride + i;
        const bool written = l >= first && l < last && i < size_t(C);
        if (written ? !(std::fabs(got[at] - want(l, int(i))) < 20 * rounding(blocks))
                    : std::memcmp(&got[at], &before[at], 4) != 0)
          FAIL("layer " << l << ", element " << i << ": " << got[at]);
      }
  };
  check(a, 0, layers, [&](int l, int i) { return sum(three, l, three_stride, 3 * C, i); });
  check(c, 0, layers, [&](int l, int i) { return sum(three, l, three_stride, 3 * C, 2 * C + i); });
  check(d, 0, layers, [&](int l, int i) { return sum(one, l, one_stride, C, i); });
  check(alone, 1, 2, [&](int l, int i) { return sum(one, l, one_stride, C, i); });
}

TEST_CASE("A list may hold as many sums as there is room for", "[cuda]") {
  const int rows = sums_block_rows + 1, C = 40;  // two rows of partials, and columns for two thread blocks
  const size_t count = partials_size(rows, C);
  const std::vector<float> partials = noise(max_sums * count, 1);
  const DeviceArray<float> device(partials), sums(max_sums * C);
  Sums list[max_sums];
  std::vector<float> want;
  for (int i = 0; i < max_sums; i++) {
    list[i] = sums_of(sums.data() + i * C, device.data() + i * count, rows, C);
    for (int c = 0; c < C; c++) want.push_back(partials[i * count + c] + partials[i * count + C + c]);
  }
  add_partials(list, nullptr);
  CHECK((sums.read() == want));
}
