// Launching kernels: launch(kernel, {grid, block, smem, stream}, arguments...) is what kernel<<<...>>>(arguments...) is,
// in a form that a plain C++ compiler can read as well (dev/cuda_on_cpu), checked, with the launch's place in the
// message.
// defines: LaunchConfig, launch, ceil_div, Range; and what check.cuh defines
#pragma once
#include <cuda_runtime.h>

#include <utility>
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

#include "check.cuh"
#include "choices.cuh"

// Without asking, a block may have 48 KB of shared memory, static and dynamic together. Our kernels declare up to 16 KB of
// static memory, so from 32 KB of dynamic memory on we ask.
constexpr size_t smem_without_asking = 32 << 10;  // bytes of dynamic shared memory

struct LaunchConfig {
  dim3 grid, block;
  size_t smem = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

// Whether this kernel may start before the one before it in the stream has ended (programmatic dependent launch, CUDA C++
// Programming Guide). The GPU then prepares the start, and puts the first blocks onto multiprocessors that have become
// free, while the last blocks of the other kernel still compute. All kernels of the trainer begin with wait_for_inputs
// (device.cuh), without which they would read what is not yet written; but compiled for a card before Hopper they don't
// wait. The lab's own kernels have no such call, so the lab sets kernel_starts to 1.
template <class... Params>
bool may_start_early(void (*kernel)(Params...)) {
  if (choices().kernel_starts != 2) return false;
  cudaFuncAttributes attributes;
  CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& c, Args&&... args) {
  if (c.smem > smem_without_asking)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c.smem)), "shared memory",
               c.file, c.line);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.smem;
  config.stream = c.stream;
  config.attrs = &early;
  config.numAttrs = may_start_early(kernel);
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "launch", c.file, c.line);
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
