// Shared by the tests of CUDA kernels, which run on the CPU (dev/cuda_on_cpu) or, built by nvcc, on a GPU.
// defines: DeviceArray; and, by what it includes, noise, rounded, rounding_of, check_close
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels/choices.cuh"
#include "../kernels/launch.cuh"
#include "numbers.h"
#include "test.h"

// The trainer's kernels are started early in their tests, so that one that does not wait for its inputs fails. Kernels that
// other tests define for themselves do not wait.
inline const bool start_early = [] {
  before_test_case = [](const std::string& tags) { choices().kernel_starts = contains(tags, "[cuda]") ? 2 : 1; };
  return true;
}();

// Device memory with a guard before and after it. All bits of fresh memory are one, so an output that no kernel has
// written is NaN in every floating type and -1 in integers. read() checks that nobody wrote the guards. On the CPU the
// array ends where its memory ends, but for less than 16 bytes, so that we notice reads behind it, too.
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

  Real* data() const { return reinterpret_cast<Real*>(memory_ + before_); }
  size_t size() const { return count_; }

  // Waits for the device and returns the elements; fails the test if a kernel wrote outside of them.
  std::vector<Real> read() const {
    std::vector<unsigned char> all(before_ + bytes() + behind_);
    std::vector<Real> inside(count_);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost));
    const auto unwritten = [&](size_t first, size_t n) {
      return std::all_of(all.data() + first, all.data() + first + n, [](unsigned char byte) { return byte == 0xff; });
    };
    CHECK(unwritten(0, before_));
    CHECK(unwritten(before_ + bytes(), behind_));
    if (count_) std::memcpy(static_cast<void*>(inside.data()), all.data() + before_, bytes());
    return inside;
  }
  std::vector<float> floats() const {
    const std::vector<Real> values = read();
    std::vector<float> out(values.size());
    for (size_t i = 0; i < out.size(); i++) out[i] = float(values[i]);
    return out;
  }

 private:
  size_t bytes() const { return count_ * sizeof(Real); }

  void allocate(const std::vector<Real>& values) {
    before_ = behind_ = 512;
#ifdef CUDA_ON_CPU
    behind_ = (16 - bytes() % 16) % 16;
    before_ += (256 - (bytes() + behind_) % 256) % 256;  // a multiple of 256 bytes ends where its page ends
#endif
    std::vector<unsigned char> all(before_ + bytes() + behind_, 0xff);
    if (!values.empty()) std::memcpy(all.data() + before_, values.data(), bytes());
    CUDA_CHECK(cudaMalloc(&memory_, all.size()));
    CUDA_CHECK(cudaMemcpy(memory_, all.data(), all.size(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());  // the copy may still be under way, and other streams would not wait for it
  }

  size_t count_, before_, behind_;  // count_ in elements, the guards in bytes
  unsigned char* memory_ = nullptr;
};
