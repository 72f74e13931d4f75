// What every measurement on a GPU needs: times, clocks, the bandwidth of a copy, the names of the kernels that a piece of
// work launches.
// defines: Times, of, device_seconds, in_graph, megabyte, CopyBandwidth, copy_bandwidth, print_card, print_clocks; where
//          there is a driver, driver_function, short_name, each_node, kernel_names
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../host/text.h"
#include "../../kernels/launch.cuh"
#include "../../kernels/runtime.cuh"
#ifndef CUDA_ON_CPU
#include <cuda.h>
#include <cxxabi.h>

#include <regex>
#endif

struct Times {
  double median, min, max;  // seconds
};
inline Times of(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

// Seconds that the device takes for what `work` puts onto the stream.
template <class Work>
double device_seconds(cudaStream_t stream, Work work) {
  return device_milliseconds(stream, work) / 1e3;
}

// Seconds of one of `count` launches. They run as a graph, so that the host's time for a launch does not count.
template <class Launch>
Times in_graph(cudaStream_t stream, int count, int runs, Launch launch_one) {
  for (int i = 0; i < count; i++) launch_one(i);
  CUDA_CHECK(cudaStreamSynchronize(stream));
  Graph graph;
  graph.capture(stream, [&] {
    for (int i = 0; i < count; i++) launch_one(i);
  });
  std::vector<double> seconds;
  for (int i = -3; i < runs; i++) {
    const double s = device_seconds(stream, [&] { graph.launch(stream); });
    if (i >= 0) seconds.push_back(s / count);
  }
  return of(seconds);
}

// ---------------------------------------------------------------------------------------------------------------------
// The bandwidth of a copy

#ifdef CUDA_ON_CPU
constexpr size_t megabyte = 1000;  // on the CPU we only see that it runs
#else
constexpr size_t megabyte = 1000000;
#endif

// A block copies 32 KB at a time, a thread has eight loads in flight. Everything is read or written once, and so need
// not stay in a cache.
static __global__ void __launch_bounds__(256) copy_kernel(float4* to, const float4* from, size_t count) {
  constexpr int loads = 8;
  const size_t stride = size_t(gridDim.x) * blockDim.x * loads;
  for (size_t i = size_t(blockIdx.x) * blockDim.x * loads + threadIdx.x; i < count; i += stride) {
    float4 x[loads];
#pragma unroll
    for (int j = 0; j < loads; j++)
      if (i + j * blockDim.x < count) x[j] = __ldcs(from + i + j * blockDim.x);
#pragma unroll
    for (int j = 0; j < loads; j++)
      if (i + j * blockDim.x < count) __stcs(to + i + j * blockDim.x, x[j]);
  }
}

// Bytes a second, read and written, of a copy of 2 GB. cudaMemcpy is not always the fastest.
struct CopyBandwidth {
  double memcpy, kernel;
  double best() const { return std::max(memcpy, kernel); }
};
inline CopyBandwidth copy_bandwidth(cudaStream_t stream) {
  const size_t bytes = 2000 * megabyte, count = bytes / sizeof(float4);
  const DeviceBuffer<float4> from(count, "a copy"), to(count, "a copy");
  const auto bandwidth = [&](auto copy) { return 2.0 * double(bytes) / in_graph(stream, 2, 7, copy).min; };
  CopyBandwidth out{};
  out.memcpy = bandwidth(
      [&](int) { CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream)); });
  const size_t sm = size_t(current_card().multiProcessorCount), all = ceil_div(count, 256 * 8);
  for (const size_t blocks : {4 * sm, 8 * sm, all})
    out.kernel = std::max(out.kernel, bandwidth([&](int) {
                            launch(copy_kernel, {unsigned(blocks), 256, 0, stream}, to.data(), from.data(), count);
                          }));
  return out;
}

inline void print_card() {
  const cudaDeviceProp card = current_card();
  std::printf("%s, compute capability %d.%d, %d multiprocessors, %.0f GB, %.0f MB of second-level cache\n", card.name,
              card.major, card.minor, card.multiProcessorCount, double(card.totalGlobalMem) / 1e9,
              double(card.l2CacheSize) / 1e6);
}

inline void print_clocks() {
  std::fflush(stdout);
  if (std::system("c=$(nvidia-smi -i 0 --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version "
                  "--format=csv,noheader 2>/dev/null) && echo \"clocks, power, temperature, driver now: $c\"") != 0)
    std::printf("clocks: not known\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// Which kernels does it launch?

#ifndef CUDA_ON_CPU
// Looks up a function of the driver, which the program is not linked to; nullptr if the driver does not have it.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12030, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // clears it, or the next launch would report it
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(found) : nullptr;
}

// A kernel's short name: the one that CUTLASS gives it, which is a template argument, or else its own without scopes
// and arguments.
inline std::string short_name(const std::string& mangled) {
  std::string name = mangled;
  if (name.rfind("_Z", 0) == 0) {
    int status = 0;
    char* const plain = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    if (plain) name = plain;
    std::free(plain);
  }
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = name.find(unnamed)) != std::string::npos;) name.erase(at, unnamed.size());
  std::smatch cutlass;
  if (std::regex_search(name, cutlass, std::regex("cutlass[0-9x]*_(\\w+)"))) return cutlass[1];
  name.erase(std::min({name.find('<'), name.find('('), name.find("_execute_"), name.size()}));
  return name.substr(name.find_last_of(" :") + 1);  // npos + 1 is 0
}

// f(node) for each kernel, copy or other piece of work that `work` puts onto the stream. Nothing of it is run.
template <class Work, class F>
void each_node(cudaStream_t stream, Work work, F f) {
  cudaGraph_t graph;
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work();
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  size_t count = 0;
  CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &count));
  for (const cudaGraphNode_t node : nodes) f(node);
  CUDA_CHECK(cudaGraphDestroy(graph));
}

// The kernels that `work` launches.
template <class Work>
std::vector<std::string> kernel_names(cudaStream_t stream, Work work) {
  static const auto params =
      driver_function<CUresult(CUgraphNode, CUDA_KERNEL_NODE_PARAMS*)>("cuGraphKernelNodeGetParams");
  static const auto name_of = driver_function<CUresult(const char**, CUfunction)>("cuFuncGetName");
  static const auto name_of_kernel = driver_function<CUresult(const char**, CUkernel)>("cuKernelGetName");
  if (!params || !name_of || !name_of_kernel) return {"(this driver does not tell kernels' names)"};
  std::vector<std::string> out;
  each_node(stream, work, [&](cudaGraphNode_t node) {
    cudaGraphNodeType type;
    CUDA_CHECK(cudaGraphNodeGetType(node, &type));
    std::string name = type == cudaGraphNodeTypeMemset ? "memset" : text("node of type ", int(type));
    if (type == cudaGraphNodeTypeKernel) {
      CUDA_KERNEL_NODE_PARAMS kernel{};
      const char* mangled = nullptr;
      CUresult error = params(node, &kernel);
      if (error == CUDA_SUCCESS)
        error = kernel.func ? name_of(&mangled, kernel.func) : name_of_kernel(&mangled, kernel.kern);
      name = error == CUDA_SUCCESS && mangled ? short_name(mangled) : text("kernel without a name, error ", int(error));
    }
    out.push_back(name);
  });
  return out;
}

#endif
