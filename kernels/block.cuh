// Reductions over the threads of a block, in an order that depends only on the block's size.
// defines: block_reduce, block_sum
#pragma once
#include "device.cuh"

// Combines the x of all THREADS threads of the block with op, and returns the result to each of them. op has to be
// commutative, so that every lane of a warp arrives at the same bits. All threads must call together.
template <int THREADS, class Number, class Op>
__device__ inline Number block_reduce(Number x, Op op) {
  // 1. Within each warp, by halves. 2. The warps' results, in order.
  static_assert(THREADS % 32 == 0);
  __shared__ Number of_warp[THREADS / 32];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(all_lanes, x, d));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warp[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) x = op(x, of_warp[w]);
  __syncthreads();  // the next call overwrites of_warp
  return x;
}
template <int THREADS, class Number>
__device__ inline Number block_sum(Number x) {
  return block_reduce<THREADS>(x, [](Number a, Number b) { return a + b; });
}
