// Launching kernels: launch(kernel, {grid, block, smem, stream}, arguments...) is what kernel<<<...>>>(arguments...) is,
// in a form that a plain C++ compiler can read as well (dev/cuda_on_cpu), checked, with the launch's place in the
// message.
// defines: CUDA_CHECK, current_card, LaunchConfig, launch, require, ceil_div, Range
#pragma once
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

struct CudaError : std::runtime_error {
  cudaError_t code;
  CudaError(cudaError_t error, const std::string& what) : std::runtime_error(what), code(error) {}
};

inline void cuda_check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << what << ": " << cudaGetErrorString(error) << " (" << cudaGetErrorName(error)
          << ")";
  throw CudaError(error, message.str());
}
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

// The card that this program uses.
inline cudaDeviceProp current_card() {
  int device;
  cudaDeviceProp card;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaGetDeviceProperties(&card, device));
  return card;
}

// A kernel may have 48 KB of shared memory without asking. What it declares itself counts too, up to 16 KB of it.
constexpr size_t smem_without_asking = 32 << 10;  // bytes of dynamic shared memory

struct LaunchConfig {
  dim3 grid, block;
  size_t smem = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& c, Args&&... args) {
  if (c.smem > smem_without_asking)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c.smem)), "shared memory",
               c.file, c.line);
  cudaLaunchConfig_t config{};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.smem;
  config.stream = c.stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "launch", c.file, c.line);
}

// What a launcher asks of its arguments: require(C % 8 == 0, "layernorm_forward: C = ", C, " is not a multiple of 8").
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, std::common_type_t<Int> b) {
  return (a + b - 1) / b;
}

// A named span of time in the profiler's timeline (NVTX), from here to the end of the scope.
struct Range {
#if __has_include(<nvtx3/nvToolsExt.h>)
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
#else
  explicit Range(const char*) {}
  ~Range() {}
#endif
  Range(const Range&) = delete;
};
