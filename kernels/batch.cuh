// Batches: windows of a text whose tokens lie on the device. Seed, step and row decide which windows, by the same
// function as in host/batch.h. The step is read on the device, so no batch ever travels from the host.
// defines: DeviceTokens, gather_random, gather_windows
#pragma once
#include <algorithm>
#include <vector>

#include "../host/batch.h"
#include "../host/shards.h"
#include "device.cuh"
#include "launch.cuh"
#include "runtime.cuh"

// The text, on the device.
struct DeviceTokens {
  uint64_t count = 0;
  DeviceBuffer<uint16_t> tokens;

  explicit DeviceTokens(const Tokens& from) : count(from.size()), tokens(from.size(), "the text") {
    constexpr uint64_t piece = 1 << 20;
    std::vector<int> wide(piece);
    std::vector<uint16_t> narrow(piece);
    for (uint64_t at = 0; at < count; at += piece) {
      const size_t n = size_t(std::min(piece, count - at));
      from.copy(at, n, wide.data());
      std::copy(wide.begin(), wide.begin() + long(n), narrow.begin());
      copy_to_device(tokens.data() + at, narrow.data(), n);
    }
  }
};

constexpr int gather_threads = 256;

// Launched with B blocks of 256 threads: a block has one window. Each of its threads finds out where it begins.
static __global__ void __launch_bounds__(gather_threads)
    gather_random_kernel(int* x, int* y, const uint16_t* tokens, uint64_t count, uint64_t seed, const int* step,
                         uint32_t site, uint64_t first_row, int T, uint64_t rows_of_step) {
  wait_for_inputs();
  const int b = blockIdx.x;
  const uint16_t* window = tokens + window_start(count, T, seed, uint32_t(*step), site, first_row + b, rows_of_step);
  for (int t = threadIdx.x; t < T; t += gather_threads) {
    x[size_t(b) * T + t] = window[t];
    y[size_t(b) * T + t] = window[t + 1];
  }
}

// x (B, T) = windows of T tokens of tokens (count), which begin where window_start says; y (B, T) = each token's successor.
// `first_row` is the number of the first window.
inline void gather_random(int* x, int* y, const uint16_t* tokens, uint64_t count, uint64_t seed, const int* step,
                          uint32_t site, uint64_t first_row, int B, int T, cudaStream_t stream,
                          uint64_t rows_of_step = 0) {
  require(B > 0 && T > 0 && count > uint64_t(T), "gather_random: B = ", B, " windows of T = ", T,
          " and a successor in ", count, " tokens");
  launch(gather_random_kernel, {unsigned(B), gather_threads, 0, stream}, x, y, tokens, count, seed, step, site,
         first_row, T, rows_of_step);
}

// A thread has one token.
static __global__ void __launch_bounds__(gather_threads)
    gather_windows_kernel(int* x, int* y, const uint16_t* tokens, uint64_t first, uint64_t stride, int count, int T) {
  wait_for_inputs();
  const int i = blockIdx.x * gather_threads + threadIdx.x;
  if (i >= count) return;
  const uint16_t* token = tokens + first + i / T * stride + i % T;
  x[i] = token[0];
  y[i] = token[1];
}

// x (B, T) = windows of T tokens, which begin at first, first + stride, ...; y (B, T) = each token's successor.
// tokens has at least first + (B - 1) * stride + T + 1 elements.
inline void gather_windows(int* x, int* y, const uint16_t* tokens, uint64_t first, uint64_t stride, int B, int T,
                           cudaStream_t stream) {
  require(B > 0 && T > 0, "gather_windows: B = ", B, " windows of T = ", T);
  const int blocks = ceil_div(B * T, gather_threads);
  launch(gather_windows_kernel, {unsigned(blocks), gather_threads, 0, stream}, x, y, tokens, first, stride, B * T, T);
}
