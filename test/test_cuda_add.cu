#include "../kernels/add.cuh"
#include "../kernels/add.h"
#include "cuda.h"

TEST_CASE("Gradients and losses are added on the device as on the CPU", "[cuda]") {
  for (const size_t count : {8, 2040, 2048, 2056, 100'000}) {  // part of a block, a block, many
    CAPTURE(count);
    const std::vector<float> a = noise(count, 1), b = noise(count, 2);
    std::vector<float> want = a;
    add(want.data(), b.data(), count);
    const DeviceArray<float> sum(a), x(b);
    const DeviceArray<double> loss_sum(std::vector<double>{1.25}), loss(std::vector<double>{2});
    add(sum.data(), x.data(), count, loss_sum.data(), loss.data(), nullptr);
    CHECK((sum.read() == want));
    CHECK(loss_sum.read()[0] == 3.25);
    CHECK((x.read() == b));
  }
}

TEMPLATE_TEST_CASE("Parameters are rounded for the products", "[cuda]", bf16, fp16) {
  for (const size_t count : {8, 2048, 2056}) {
    const std::vector<float> x = noise(count, 1);
    const DeviceArray<float> from(x);
    const DeviceArray<TestType> to(count);
    round_to(to.data(), from.data(), count, nullptr);
    CHECK((to.floats() == rounded<TestType, float>(x)));
  }
  const DeviceArray<TestType> to(16);
  const DeviceArray<float> from(16);
  CHECK_THROWS_WITH(round_to(to.data(), from.data(), 12, nullptr), ContainsSubstring("12 is not a multiple of 8"));
}

TEST_CASE("Gradients on the device are added by eights", "[cuda]") {
  const DeviceArray<float> a(16);
  const DeviceArray<double> loss(1);
  CHECK_THROWS_WITH(add(a.data(), a.data(), 12, loss.data(), loss.data(), nullptr),
                    ContainsSubstring("12 is not a multiple of 8"));
}
