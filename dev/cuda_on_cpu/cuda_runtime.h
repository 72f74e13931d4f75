// CUDA on the CPU: this folder's headers, first in the include path, stand in for the toolkit's. A plain C++ compiler
// then builds the very files that nvcc builds, and engine.cpp runs their kernels without a GPU, for tests.
//
// How a kernel runs. The threads of a block are fibers: each has its own stack, all share one processor, and a
// hand-written switch jumps between them. A thread runs until it comes to a barrier or to a function that a warp calls
// together (a shuffle, a vote, a tensor core's product). There it leaves its operands, and the next thread runs; the
// last to come does the work for all. Blocks run one after another. With seed 0, threads, blocks and streams take turns
// in order; with any other (CUDA_ON_CPU_SEED or set_seed()) the engine draws the next one, so a missing barrier shows
// as another result. Launches, copies and events enter a queue, which runs when the host waits.
//
// Every build checks the following. The call that waits reports it (cudaErrorLaunchFailure), with kernel, block, thread
// and source lines:
// - threads of a block that do not meet: a return before a barrier, barriers on different lines, a shuffle in a branch;
// - lanes that read lanes outside the mask; copy_async to what is not shared memory; misaligned tensor core operands;
// - reads before the first write: all bits of shared memory, at the start of a block, and of fresh device memory are
//   one, NaN in every floating type; background copies arrive as late as they may, or, drawn by seed, at once;
// - launches that no GPU would take, pointer arguments that are not device memory, copies in the wrong direction,
//   waiting while a graph is captured; if no call reports an error, the program ends with exit code 1;
// - host code that touches device memory, kernels that run far beyond the end of an array, arrays that were freed:
//   those addresses are closed, so the program ends and names the kernel. Freed addresses are not used again soon.
// AddressSanitizer and UndefinedBehaviorSanitizer see every access: arrays have gaps around them, and static shared
// arrays have types. ThreadSanitizer takes a kernel's threads for threads: it reports a race between accesses that no
// __syncthreads or __syncwarp orders.
//
// Nothing checks: the speed of anything, bank conflicts, registers, __launch_bounds__, the size of static shared
// memory, pointers inside argument structs, a missing __threadfence. A thread does not lose its turn after some time, so a
// kernel that spins until another thread has done something hangs. A warp has one collective at a time: the mask names
// all lanes that come together, and two halves of a warp cannot be in two different collectives. There are no clusters,
// TMA, wgmma, named barriers or cooperative groups, and no atomics on floats, whose sums would depend on timing. Only one
// host thread may call CUDA.
//
// The environment:
// - CUDA_ON_CPU_SEED, and CUDA_ON_CPU_MEMORY, bytes of device memory;
// - CUDA_ON_CPU_DRIVER=12040, the driver's CUDA version, 0 for no driver;
// - CUDA_ON_CPU_DEVICES="61 90:46 90", each card's compute capability, 0 for no card, and perhaps an error: of every
//   launch or, if its number is below 200, of cudaSetDevice. CUDA_VISIBLE_DEVICES chooses among the cards. Without
//   CUDA_ON_CPU_DEVICES there is one card;
// - CUDA_ON_CPU_CUBLASLT=libcublasLt.so.0, a library to load in place of cuBLASLt (kernels/matmul_library.cuh);
// - CUDA_LAUNCH_BLOCKING=1 runs everything at once, for debuggers: break k if blockIdx.x == 1 && threadIdx.x == 37.
// Kernels access memory through types of other sizes, hence -fno-strict-aliasing; -rdynamic gives reports their names.
// defines: CUDA_ON_CPU, the language, functions of device code, the runtime's functions, cuda_on_cpu::set_seed,
//          enqueue, dynamic_smem
#pragma once
#define CUDA_ON_CPU 1
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------------------------------
// The language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))  // alignas may not stand where __align__ does

// Shared variables are static, in sections of their own, which the engine finds by name. g++ forgets the attribute
// `section` in templates, but not this one, which makes sections .noinit and .noinit.<variable>; the assembler warns
// about them, hence -Wa,--no-warn.
#ifdef __clang__
#define __shared__ static __attribute__((section(".noinit")))
#else
#define __shared__ static __attribute__((noinit))
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define CUDA_ON_CPU_VECTORS(Element, name)                                                \
  struct alignas(2 * sizeof(Element)) name##2 {                                           \
    Element x, y;                                                                         \
  };                                                                                      \
  struct name##3 {                                                                        \
    Element x, y, z;                                                                      \
  };                                                                                      \
  struct alignas(4 * sizeof(Element)) name##4 {                                           \
    Element x, y, z, w;                                                                   \
  };                                                                                      \
  constexpr name##2 make_##name##2(Element x, Element y) { return {x, y}; }               \
  constexpr name##3 make_##name##3(Element x, Element y, Element z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
#undef CUDA_ON_CPU_VECTORS

// The indices of the thread whose turn it is, in plain variables, so that a debugger can print and test them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------------------------
// What device code needs from the engine

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace cuda_on_cpu {

// A place in the source. here() as the default of an argument gives the caller's place.
struct Site {
  const char *file, *function;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), const char* function = __builtin_FUNCTION(),
                    int line = __builtin_LINE()) {
  return {file, function, line};
}

// Waits for all threads of the block. Returns how many of them brought a true predicate.
int barrier(bool predicate, Site site);

// Waits until every lane of `mask` has come with the same `combine`, from the same place. The last lane to come runs it
// for all: slots[l] is what lane l brought, usually a struct on its stack with its arguments and room for its result.
// With orders_memory it is a memory barrier, too. Shuffles and votes are none.
using Combine = void (*)(void* const slots[32], unsigned mask);
void collective(unsigned mask, void* slot, Combine combine, Site site, bool orders_memory = false);

// Waits for the launch before this one in the stream (cudaGridDependencySynchronize).
void wait_for_launch_before();

int lane();
void* dynamic_smem();  // the block's, aligned to 1024 bytes

// Copies 16 bytes from global to shared memory in the background, or zeros if from is nullptr; see tensor_core.h.
void copy_async(void* to, const void* from, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

// Ends the kernel; the call that waits for it reports the message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int set_seed(int seed);  // returns the old seed

}  // namespace cuda_on_cpu

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and warps together

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::here()) { cuda_on_cpu::barrier(false, site); }
inline int __syncthreads_count(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::collective(
      mask, nullptr, [](void* const*, unsigned) {}, site, true);
}

namespace cuda_on_cpu {

// SourceOf: a function (lane, by, width) -> the lane that it receives from. A type, because a Combine cannot capture.
template <class Value, class SourceOf>
Value shuffle(unsigned mask, Value value, int by, int width, Site site, SourceOf) {
  struct Slot {
    Value value, received;
    int by, width;
  };
  Slot slot{value, value, by, width};
  collective(
      mask, &slot,
      [](void* const* slots, unsigned lanes) {
        for (int l = 0; l < 32; l++) {
          if (!(lanes >> l & 1)) continue;
          Slot& me = *static_cast<Slot*>(slots[l]);
          const int source = SourceOf{}(l, me.by, me.width);
          if (!(lanes >> source & 1)) fail("shuffle: lane %d reads lane %d, which is not in the mask", l, source);
          me.received = static_cast<Slot*>(slots[source])->value;
        }
      },
      site);
  return slot.received;
}

template <class Int, class Operation>
Int reduce(unsigned mask, Int value, Site site, Operation) {
  collective(
      mask, &value,
      [](void* const* slots, unsigned lanes) {
        const int first = __builtin_ctz(lanes);
        Int result = *static_cast<Int*>(slots[first]);
        for (int l = first + 1; l < 32; l++)
          if (lanes >> l & 1) result = Operation{}(result, *static_cast<Int*>(slots[l]));
        for (int l = first; l < 32; l++)
          if (lanes >> l & 1) *static_cast<Int*>(slots[l]) = result;
      },
      site);
  return value;
}

}  // namespace cuda_on_cpu

// A lane whose source lies outside its group of `width` gets its own value; but xor may reach the groups before it.
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32,
                  cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::shuffle(mask, value, source, width, site,
                              [](int l, int by, int w) { return (l & -w) | (by & (w - 1)); });
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int by, int width = 32,
                      cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::shuffle(mask, value, by, width, site,
                              [](int l, int b, int w) { return (l ^ b) > (l | (w - 1)) ? l : l ^ b; });
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned by, int width = 32,
                       cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::shuffle(mask, value, int(by), width, site,
                              [](int l, int b, int w) { return l + b > (l | (w - 1)) ? l : l + b; });
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned by, int width = 32,
                     cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::shuffle(mask, value, int(by), width, site,
                              [](int l, int b, int w) { return l - b < (l & -w) ? l : l - b; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, predicate ? 1u << cuda_on_cpu::lane() : 0u, site,
                             [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
// Int is int or unsigned, as in CUDA.
template <std::integral Int>
Int __reduce_add_sync(unsigned mask, Int value, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, value, site, [](Int a, Int b) { return Int(unsigned(a) + unsigned(b)); });
}
template <std::integral Int>
Int __reduce_min_sync(unsigned mask, Int value, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, value, site, [](Int a, Int b) { return b < a ? b : a; });
}
template <std::integral Int>
Int __reduce_max_sync(unsigned mask, Int value, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, value, site, [](Int a, Int b) { return a < b ? b : a; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, value, site, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  return cuda_on_cpu::reduce(mask, value, site, [](unsigned a, unsigned b) { return a | b; });
}

// Nothing to do: the threads share one processor.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void cudaGridDependencySynchronize() { cuda_on_cpu::wait_for_launch_before(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// ---------------------------------------------------------------------------------------------------------------------
// Atomics, on integers only. They are real ones, which ThreadSanitizer understands. All return the old value.

namespace cuda_on_cpu {
template <class Int, class Update>
Int atomic_update(Int* p, Update update) {
  Int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, update(old), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
  return old;
}
template <class Int>
using Operand = std::type_identity_t<Int>;  // not deduced, so that atomicAdd(p, 1) works for every Int
}  // namespace cuda_on_cpu

template <std::integral Int>
Int atomicAdd(Int* p, cuda_on_cpu::Operand<Int> v) {
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
template <std::integral Int>
Int atomicSub(Int* p, cuda_on_cpu::Operand<Int> v) {
  return __atomic_fetch_sub(p, v, __ATOMIC_ACQ_REL);
}
template <std::integral Int>
Int atomicAnd(Int* p, cuda_on_cpu::Operand<Int> v) {
  return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL);
}
template <std::integral Int>
Int atomicOr(Int* p, cuda_on_cpu::Operand<Int> v) {
  return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL);
}
template <std::integral Int>
Int atomicExch(Int* p, cuda_on_cpu::Operand<Int> v) {
  return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);
}
template <std::integral Int>
Int atomicMin(Int* p, cuda_on_cpu::Operand<Int> v) {
  return cuda_on_cpu::atomic_update(p, [=](Int old) { return v < old ? v : old; });
}
template <std::integral Int>
Int atomicMax(Int* p, cuda_on_cpu::Operand<Int> v) {
  return cuda_on_cpu::atomic_update(p, [=](Int old) { return old < v ? v : old; });
}
template <std::integral Int>
Int atomicCAS(Int* p, cuda_on_cpu::Operand<Int> expected, cuda_on_cpu::Operand<Int> v) {
  return cuda_on_cpu::atomic_update(p, [=](Int old) { return old == expected ? v : old; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of one thread

template <class Value>
Value __ldg(const Value* p) {
  return *p;
}
template <class Value>
Value __ldcs(const Value* p) {
  return *p;
}
template <class Value>
Value __ldcg(const Value* p) {
  return *p;
}
template <class Value>
void __stcs(Value* p, std::type_identity_t<Value> v) {
  *p = v;
}
template <class Value>
void __stcg(Value* p, std::type_identity_t<Value> v) {
  *p = v;
}

#define __expf expf  // macros, because <math.h> declares functions of these names
#define __logf logf
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class Value>
requires std::is_arithmetic_v<Value>
constexpr Value min(Value a, Value b) { return b < a ? b : a; }
template <class Value>
requires std::is_arithmetic_v<Value>
constexpr Value max(Value a, Value b) { return a < b ? b : a; }
[[noreturn]] inline void __trap(cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::fail("__trap() at %s:%d", site.file, site.line);
}

// ---------------------------------------------------------------------------------------------------------------------
// The runtime

#define CUDA_ON_CPU_ERRORS(ERROR)                                                                            \
  ERROR(cudaSuccess, 0, "no error")                                                                          \
  ERROR(cudaErrorInvalidValue, 1, "invalid argument")                                                        \
  ERROR(cudaErrorMemoryAllocation, 2, "out of memory")                                                       \
  ERROR(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                  \
  ERROR(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")     \
  ERROR(cudaErrorDevicesUnavailable, 46, "CUDA-capable device(s) is/are busy or unavailable")                \
  ERROR(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                        \
  ERROR(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                               \
  ERROR(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")    \
  ERROR(cudaErrorUnsupportedPtxVersion, 222, "the provided PTX was compiled with an unsupported toolchain.") \
  ERROR(cudaErrorNotReady, 600, "device not ready")                                                          \
  ERROR(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                            \
  ERROR(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                           \
  ERROR(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")          \
  ERROR(cudaErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work")                           \
  ERROR(cudaErrorStreamCaptureIsolation, 905, "dependency created on uncaptured work in another stream")     \
  ERROR(cudaErrorStreamCaptureImplicit, 906,                                                                 \
        "operation would make the legacy stream depend on a capturing blocking stream")
enum cudaError_t {
#define CUDA_ON_CPU_ERROR(name, code, text) name = code,
  CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2;
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, l2CacheSize;
};
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);  // adds the engine's details if it is the latest error
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceSynchronize();

cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaFree(void*);
cudaError_t cudaFreeHost(void*);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemset(void* to, int byte, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t*);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventQuery(cudaEvent_t);  // does the work before the event, as far as no other process is waited for
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);

namespace cuda_on_cpu {

cudaError_t allocate(void** p, size_t bytes);
cudaError_t allocate_host(void** p, size_t bytes);
cudaError_t allow_dynamic_smem(const void* kernel, int bytes);
cudaError_t check_argument(const void* p, int index);
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, std::function<void()> thread);

// Queues a function of the host on a stream, in place of a library's kernel. It may touch device memory, later work in
// the stream waits for it, and a captured graph contains it.
cudaError_t enqueue(cudaStream_t, std::function<void()> work);
struct NotYet {};  // thrown by such work if it has to wait for another process: it gets another turn

}  // namespace cuda_on_cpu

template <class Element>
cudaError_t cudaMalloc(Element** p, size_t bytes) {
  return cuda_on_cpu::allocate(reinterpret_cast<void**>(p), bytes);
}
template <class Element>
cudaError_t cudaMallocHost(Element** p, size_t bytes, unsigned = 0) {
  return cuda_on_cpu::allocate_host(reinterpret_cast<void**>(p), bytes);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return cuda_on_cpu::allow_dynamic_smem(reinterpret_cast<const void*>(kernel), value);
}

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  return *attributes = {90}, cudaSuccess;
}

// Copies the arguments now; the kernel runs later.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "arguments reach a GPU as bytes");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "there is no room for more arguments");
  return [&](Parameters... copies) {
    cudaError_t error = cudaSuccess;
    int index = 0;
    [[maybe_unused]] const auto check = [&](const auto& copy) {
      if constexpr (std::is_pointer_v<std::remove_cvref_t<decltype(copy)>>)
        if (!error) error = cuda_on_cpu::check_argument(copy, index);
      index++;
    };
    (check(copies), ...);
    if (error) return error;
    return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(copies...); });
  }(std::forward<Arguments>(arguments)...);
}
