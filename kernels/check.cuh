// What the CUDA runtime and the launchers are asked for is checked, and what is wrong is thrown.
// defines: CudaError, CUDA_CHECK, current_card, shared_memory_of_block, require
#pragma once
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <string>

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
// How many bytes of shared memory it gives to a block that asks for them.
inline size_t shared_memory_of_block() {
  static const size_t bytes = current_card().sharedMemPerBlockOptin;
  return bytes;
}

// What a launcher asks of its arguments: require(C % 8 == 0, "layernorm_forward: C = ", C, " is not a multiple of 8").
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}
