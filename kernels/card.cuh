// Which card the program uses: the first one that works, which we find out by trying. On a new machine the driver or the
// card may be too old, or another program may have the card for itself.
// defines: no_gpu, cards_text, card_text, dtype_on, require_kernels_for
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../host/error.h"
#include "../host/tensors.h"
#include "launch.cuh"
#include "layernorm.cuh"
#include "matmul_library.cuh"
#include "runtime.cuh"

constexpr int oldest_capability = 75;  // Turing

inline std::string cuda_version(int version) { return text(version / 1000, ".", version % 1000 / 10); }

// What an error at the first use of CUDA, or of a card, means, and what can be done about it.
inline std::string explain(cudaError_t error) {
  const char* const name = cudaGetErrorName(error);
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);  // 0: there is none
  switch (error) {
    case cudaErrorInsufficientDriver:
      if (driver == 0) return "no NVIDIA driver was found";
      return text("the driver knows CUDA ", cuda_version(driver), ", this program needs ", cuda_version(runtime),
                  "; update the driver");
    case cudaErrorNoDevice:
      if (const char* chosen = std::getenv("CUDA_VISIBLE_DEVICES"))
        return text("none is visible with CUDA_VISIBLE_DEVICES='", chosen, "'");
      return "none was found";
    case cudaErrorUnsupportedPtxVersion:
      return text("the driver, of CUDA ", cuda_version(driver), ", is older than this program's compiler (", name,
                  "); update the driver, or build on this machine: make clean train_gpt");
    case cudaErrorNoKernelImageForDevice:
      return text("the program was built for other cards (", name, "); build it on this machine: make clean train_gpt");
    case cudaErrorDevicesUnavailable:
      return text("it is busy or closed (", name, "); nvidia-smi shows which program has it for itself");
    case cudaErrorMemoryAllocation:
      return text("no memory is free (", name, "); nvidia-smi shows which programs have it");
    default:
      return text(cudaGetErrorString(error), " (", name, ")");
  }
}

static __global__ void first_kernel(int* out, int x) {
  wait_for_inputs();
  *out = x + 1;
}

// Makes this card the one that the program uses. Returns why it cannot be; empty: it can.
inline std::string try_card(int device) {
  cudaDeviceProp card;
  if (const cudaError_t error = cudaGetDeviceProperties(&card, device)) return explain(error);
  if (10 * card.major + card.minor < oldest_capability)
    return text(card.name, " has compute capability ", card.major, ".", card.minor,
                ", 7.5 (Turing) or later is needed");
  int sum = 0;
  try {
    CUDA_CHECK(cudaSetDevice(device));
    const DeviceMemory memory(sizeof sum);
    launch(first_kernel, {1, 1}, memory.as<int>(), 41);
    CUDA_CHECK(cudaMemcpy(&sum, memory.as<int>(), sizeof sum, cudaMemcpyDeviceToHost));
  } catch (const CudaError& e) {
    const std::string why = explain(e.code);
    cudaGetLastError();  // so that the error is not found again at the next card
    return text(card.name, ": ", why);
  }
  return sum == 42 ? "" : text(card.name, " computes 41 + 1 = ", sum);
}

// The number of cards; if there is none, why becomes the reason.
inline int count_cards(std::string& why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  why = "no CUDA device: " + explain(error ? error : cudaErrorNoDevice);
  return 0;
}

// Why no GPU can be used; empty: one can, and the program uses it from now on. The cards behind it are not touched. In a
// run of several processes each takes the next one of the cards of its host, or the only one that it is shown.
inline std::string no_gpu(int number_on_host = 0) {
  std::string none, passed_over;
  const int count = count_cards(none);
  if (count > 0) number_on_host %= count;
  for (int device = 0; device < count; device++) {
    const std::string why = try_card(device);
    if (!why.empty()) {
      passed_over += (passed_over.empty() ? "" : "; ") + why;
      continue;
    }
    if (number_on_host-- > 0) continue;
    try {
      MatmulLibrary::load();
    } catch (const Error& e) { return e.what(); }
    if (!passed_over.empty())
      std::fprintf(stderr, "%s; %s is used instead\n", passed_over.c_str(), current_card().name);
    return "";
  }
  return none + passed_over;
}

// For --version: what was built for GPUs and what is there, without using a card.
inline std::string cards_text() {
  std::string out = "GPU kernels: ";
#ifdef __CUDACC__
#define CAPABILITIES(...) #__VA_ARGS__
#define CAPABILITIES_OF(list) CAPABILITIES(list)
  out += text("nvcc ", __CUDACC_VER_MAJOR__, ".", __CUDACC_VER_MINOR__, ".", __CUDACC_VER_BUILD__,
              ", for architectures ", CAPABILITIES_OF(__CUDA_ARCH_LIST__));
#undef CAPABILITIES
#undef CAPABILITIES_OF
#else
  out += "by the C++ compiler, on the CPU";
#endif
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  out += text("\nCUDA runtime ", cuda_version(runtime), ", driver ", driver ? cuda_version(driver) : "none", "\n");
  try {
    out += MatmulLibrary::load();
  } catch (const Error& e) { out += e.what(); }
  std::string none;
  const int count = count_cards(none);
  out += "\n" + none;
  for (int device = 0; device < count; device++) {
    cudaDeviceProp card;
    const cudaError_t error = cudaGetDeviceProperties(&card, device);
    out += text(device ? "\n" : "", "card ", device, ": ");
    out += error ? explain(error)
                 : text(card.name, ", compute capability ", card.major, ".", card.minor, ", ",
                        card.totalGlobalMem / 1000000000, " GB");
  }
  return out + "\n";
}

// "NVIDIA H100, 85 GB, 132 multiprocessors"
inline std::string card_text() {
  const cudaDeviceProp card = current_card();
  return text(card.name, ", ", card.totalGlobalMem / 1000000000, " GB, ", card.multiProcessorCount, " multiprocessors");
}

// Turns --dtype into a type that this card has: Turing has no bfloat16. so_far is the type that a resumed run has used
// until now; for a new run it is empty.
inline std::string dtype_on(const cudaDeviceProp& card, std::string dtype, const std::string& so_far) {
  const bool turing = card.major < 8;
  if (dtype == "auto") {
    dtype = so_far;
    if (turing && dtype != "float32") dtype.clear();
  }
  if (dtype.empty()) dtype = turing ? "float16" : "bfloat16";
  if (turing && (dtype == "bfloat16" || dtype == "tf32"))
    fail("--dtype ", dtype, ": ", card.name, " has no ", dtype,
         " arithmetic (compute capability 8.0 has); --dtype float16 or float32");
  return dtype;
}

// Refuses a model or a batch whose shapes no kernel was written for. A launch may have 65,535 blocks along y, and as many
// along z. Attention takes one along y for each window, and one along z for each four of its tokens; column_partials takes
// one along y for each 64 tokens of the batch.
inline void require_kernels_for(const ModelShape& shape, int B) {
  const int HS = shape.HS(), C = shape.C, T = shape.T, most = 65535;
  if (HS != 16 && HS != 32 && HS != 64 && HS != 128)
    fail("a head size (n_embd / n_head) of ", HS, ": the GPU's kernels have 16, 32, 64 and 128; --device cpu has any");
  if (C > layernorm_max_C)
    fail("n_embd ", C, ": the GPU's kernels keep a row in registers, of up to ", layernorm_max_C,
         " channels; --device cpu has any");
  if (T > 4 * most) fail("block_size ", T, ": the GPU's kernels take windows of up to ", 4 * most, " tokens");
  if (B > most || int64_t{B} * T > int64_t{64} * most)
    fail("batch_size ", B, " with windows of ", T, " tokens: the GPU's kernels take up to ", most, " windows and ",
         64 * most, " tokens at once; --gradient_accumulation_steps makes a step of several batches");
}
