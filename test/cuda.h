// What the tests of CUDA kernels share. They run on the CPU (dev/cuda_on_cpu) or, built by nvcc, on a GPU.
// defines: DeviceArray, rounded, rounding_of, noise, check_close
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../host/random.h"
#include "../kernels/device.cuh"
#include "../kernels/launch.cuh"
#include "compare.h"
#include "test.h"

// Device memory with a guard of 64 elements before and after it. Fresh memory, and so an output that no kernel has
// written, is all ones: NaN in every floating type, -1 in integers. Reading it back checks the guards.
template <class Real>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) { allocate(std::vector<Real>(0)); }
  template <class From>
  explicit DeviceArray(const std::vector<From>& from) : count_(from.size()) {
    std::vector<Real> values(from.size());
    for (size_t i = 0; i < from.size(); i++) values[i] = Real(from[i]);
    allocate(values);
  }
  ~DeviceArray() { cudaFree(memory_); }
  DeviceArray(const DeviceArray&) = delete;

  Real* data() const { return memory_ + guard; }
  size_t size() const { return count_; }

  // The elements, after all work on the device; fails if something was written around them.
  std::vector<Real> read() const {
    std::vector<Real> all(count_ + 2 * guard), inside(count_);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(all.data(), memory_, all.size() * sizeof(Real), cudaMemcpyDeviceToHost));
    const auto* bytes = reinterpret_cast<const unsigned char*>(all.data());
    size_t overwritten = 0;
    for (size_t i = 0; i < guard * sizeof(Real); i++)
      overwritten += (bytes[i] != 0xff) + (bytes[(guard + count_) * sizeof(Real) + i] != 0xff);
    CHECK(overwritten == 0);
    std::memcpy(inside.data(), all.data() + guard, count_ * sizeof(Real));
    return inside;
  }
  std::vector<float> floats() const {
    const std::vector<Real> values = read();
    std::vector<float> out(values.size());
    for (size_t i = 0; i < out.size(); i++) out[i] = float(values[i]);
    return out;
  }

 private:
  static constexpr size_t guard = 64;

  void allocate(const std::vector<Real>& values) {
    std::vector<Real> all(count_ + 2 * guard);
    std::memset(static_cast<void*>(all.data()), 0xff, all.size() * sizeof(Real));
    if (!values.empty())
      std::memcpy(static_cast<void*>(all.data() + guard), values.data(), values.size() * sizeof(Real));
    CUDA_CHECK(cudaMalloc(&memory_, all.size() * sizeof(Real)));
    CUDA_CHECK(cudaMemcpy(memory_, all.data(), all.size() * sizeof(Real), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());  // the copy may still be under way, and other streams would not wait for it
  }

  size_t count_;
  Real* memory_ = nullptr;
};

// What Real makes of numbers: the reference is computed from the inputs that the kernel really sees.
template <class Real, class To = double>
std::vector<To> rounded(const std::vector<float>& x) {
  std::vector<To> out(x.size());
  for (size_t i = 0; i < x.size(); i++) out[i] = To(float(Real(x[i])));
  return out;
}

// The largest relative error of rounding a number to Real: half a unit in the last place.
template <class Real>
constexpr double rounding_of = 0x1p-24;
template <>
inline constexpr double rounding_of<bf16> = 0x1p-8;
template <>
inline constexpr double rounding_of<fp16> = 0x1p-11;

// scale * N(0, 1), the same on every machine; `which` numbers the array.
inline std::vector<float> noise(size_t count, uint32_t which, double scale = 1) {
  std::vector<float> out(count);
  for (size_t i = 0; i < count; i += 4) {
    double x[4];
    normal4(x, random4(99, which, 0, i / 4));
    for (size_t j = 0; j < 4 && i + j < count; j++) out[i + j] = float(scale * x[j]);
  }
  return out;
}

// Every element within tolerance * (|want| + rms(want)); see compare.h.
template <class A, class B>
void check_close(const std::vector<A>& got, const std::vector<B>& want, double tolerance) {
  REQUIRE(got.size() == want.size());
  const std::string message = mismatch(got.data(), want.data(), got.size(), tolerance);
  INFO(message);
  CHECK(message.empty());
}
