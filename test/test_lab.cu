// The kernel lab: each version of each operation is right, and the lab notices one that is not.
#include <cstdlib>

#include "../dev/kernels/lab.cuh"
#include "cuda.h"

TEST_CASE("lab: every version of every operation is right", "[cuda]") {
  for (const lab::Operation& operation : lab::operations()) {
    std::vector<lab::Result> results = lab::check(operation);
    CHECK(results.size() > 1);
    for (const lab::Result& r : results) {
      INFO(operation.name << " " << r.version.number << ", " << r.version.idea << ": " << r.wrong);
      CHECK(r.wrong.empty());
      CHECK(r.error >= 0);  // something was compared; whole numbers may be exact
    }
  }
}

namespace {

__global__ void double_kernel(float* out, const float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 2 * x[i];
}
__global__ void write_kernel(float* at, float value) { *at = value; }

int calls = 0;

void planted(lab::Lab& lab, const lab::Sizes& s) {
  const int n = s.rows();
  const lab::Array<float> x = lab.noise<float>(size_t(n), 1), out = lab.output<float>(size_t(n));
  if (lab.checks()) {
    std::vector<double> want = x.values();
    for (double& v : want) v = 2 * v + 1e-9;
    out.expect(want, 1e-6);
  }
  lab.needs(8.0 * n, 0);
  const auto run = [=](int set, cudaStream_t stream) {
    launch(double_kernel, {unsigned(ceil_div(n, 32)), 32, 0, stream}, out[set], x[set], n);
  };
  const auto then_write = [=](int set, cudaStream_t stream, float* at, float value) {
    run(set, stream);
    launch(write_kernel, {1, 1, 0, stream}, at, value);
  };
  lab.version({1, "right", 1}, run);
  lab.version({2, "wrong in one element", 1},
              [=](int set, cudaStream_t stream) { then_write(set, stream, out[set] + n - 1, 77); });
  lab.version({3, "leaves an element out", 1}, [=](int set, cudaStream_t stream) {
    launch(double_kernel, {unsigned(ceil_div(n, 32)), 32, 0, stream}, out[set], x[set], n - 1);
  });
  lab.version({4, "writes behind the end", 1},
              [=](int set, cudaStream_t stream) { then_write(set, stream, out[set] + n, 1); });
  lab.version({5, "writes before the beginning", 1},
              [=](int set, cudaStream_t stream) { then_write(set, stream, out[set] - 1, 1); });
  lab.version({6, "changes its input", 1}, [=](int set, cudaStream_t stream) { then_write(set, stream, x[set], 1); });
  lab.version({7, "another result each time", 1}, [=](int set, cudaStream_t stream) {
    then_write(set, stream, out[set], float(x.values()[0] * 2) + 1e-7f * float(calls++));
  });
}
const lab::Operation faults = {"planted", planted, {{1, 33, 1}}};

}  // namespace

TEST_CASE("lab: wrong versions are noticed", "[cuda]") {
  const std::vector<lab::Result> results = lab::check(faults);
  const char* const wanted[] = {"",
                                "array 2 is wrong",
                                "array 2 is wrong: inf",
                                "it wrote outside of array 2",
                                "it wrote outside of array 2",
                                "it changed its input, array 1",
                                "two runs differ in array 2"};
  REQUIRE(results.size() == std::size(wanted));
  for (size_t i = 0; i < results.size(); i++) {
    INFO(results[i].version.idea);
    if (i == 0)
      CHECK(results[i].wrong.empty());
    else
      CHECK(contains(results[i].wrong, wanted[i]));
  }
}

TEST_CASE("lab: a version is reported as soon as it is timed", "[cuda]") {
  std::vector<lab::Result> results = lab::list(faults);
  std::vector<int> reported;
  lab::time(faults, {2, 40, 1}, results, [&](const lab::Result& r) {
    reported.push_back(r.version.number);
    CHECK(std::isfinite(r.cold));
    CHECK(std::isfinite(r.hot));
    CHECK(std::isfinite(r.alone));
    CHECK(r.cold_min <= r.cold);
    CHECK(r.cold <= r.cold_max);
    CHECK(r.bytes == 8 * 80);
  });
  CHECK((reported == std::vector<int>{1, 2, 3, 4, 5, 6, 7}));
}
