// Dropout on the GPU. dropout_law.h says what is kept and which draw decides it. This file makes the draws: eight for a
// thread's chunk of a row, and as many as a warp's 16 x 16 attention weights need.
// defines: DeviceDropout, dropout8, attention_mask
#pragma once
#include "device.cuh"
#include "dropout_law.h"

// Dropout as kernels get it. A step is launched as a recorded graph, whose arguments never change, so the number of the
// step lies on the device.
struct DeviceDropout : Dropout {
  const int* step_on_device = nullptr;  // (1), which may be null without dropout
  float keep_scale = 1;                 // 1 / (1 - p); from the host, because devices divide doubles slowly

  DeviceDropout() = default;
  DeviceDropout(const Dropout& drop, const int* on_device)
      : Dropout(drop), step_on_device(on_device), keep_scale(float(dropout_scale(threshold))) {}
  DeviceDropout at(uint32_t kind, int layer) const { return {Dropout::at(kind, layer), step_on_device}; }
  __device__ void read_step() { step = uint32_t(*step_on_device); }
};

// x (8) = dropout(x) for one chunk, whose draws have the number `counter`.
__device__ inline void dropout8(Float8& x, const DeviceDropout& drop, uint64_t counter) {
  const Philox4 r = random4(drop.seed, drop.step, drop.site, counter);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = draw_of(r, i) < drop.threshold ? x[i] * drop.keep_scale : 0.0f;
}

// keep[i] = whether dropout keeps element i of this lane's part of a block of weights, whose first query is q and first
// key kv. The draws are numbered for blocks with queries as rows. If TRANSPOSED, the block has keys as rows and queries
// as columns, so each 8 x 8 quarter of the draws is transposed across the warp, and the quarters off the diagonal swap.
// bh: the head's number in the whole batch, row and head
template <bool TRANSPOSED>
__device__ inline void attention_mask(bool (&keep)[8], const Dropout& drop, uint64_t bh, int q, int kv, int T) {
  Philox4 draws = random4(drop.seed, drop.step, drop.site, attention_counter(bh, q, kv, T) + threadIdx.x % 32);
  if constexpr (TRANSPOSED) {
    const Philox4 quarters = draws;
    for (int w = 0; w < 4; w++) draws.word[w] = transpose_8x8(quarters.word[w % 2 * 2 + w / 2]);
  }
  for (int i = 0; i < 8; i++) keep[i] = draw_of(draws, i) < drop.threshold;
}
