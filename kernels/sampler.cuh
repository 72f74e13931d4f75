// Draws a token from its logits: choose_token of host/sampler.h on the GPU, with the same result, so that no logits
// travel to the host. exp() may round differently, and so may the sums for V > 256, which have another order. That
// matters only if `uniform` falls on the border between two tokens, within such a rounding error (1e-15 or so for
// V = 65).
// defines: sample_token
#pragma once
#include <cstdint>

#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"

constexpr int sample_token_block = 256;
constexpr int sample_token_largest_V = 1 << 16;

// A number for each token, larger for a larger logit and, among equal logits, for an earlier token. It has 48 bits.
// The upper 32 are the logit's, changed so that they compare as integers the way the floats do: negative floats have
// all bits inverted, the others only the sign. The lower 16 are the token, inverted.
__device__ inline uint64_t likelihood_rank(float logit, int v) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 + 0 = 0: equal numbers must have equal bits
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 16 | uint32_t(sample_token_largest_V - 1 - v);
}

// Launched with one block of 256 threads. A thread has every 256th token, and in step 3 a contiguous piece of them.
//   token  (1) =   the drawn token
//   logits (V)
// temperature, top_k and uniform as in sample_token, below
template <class Real>
__global__ void __launch_bounds__(sample_token_block)
    sample_token_kernel(int* token, const Real* logits, int V, double temperature, int top_k, double uniform) {
  constexpr int block = sample_token_block;
  const auto rank = [&](int v) { return likelihood_rank(float(logits[v]), v); };

  // 1. The likeliest token: the lower 16 bits of the largest rank, inverted back.
  uint64_t best = 0;
  for (int v = threadIdx.x; v < V; v += block) best = max(best, rank(v));
  best = block_reduce<block>(best, [](uint64_t a, uint64_t b) { return max(a, b); });
  const int likeliest = sample_token_largest_V - 1 - int(best & (sample_token_largest_V - 1));
  if (temperature == 0) {
    if (threadIdx.x == 0) *token = likeliest;
    return;  // all threads do, so no barrier waits for one
  }

  // 2. The lowest rank that is allowed, of the top_k-th likeliest token. It is the largest number x for which at least
  //    top_k ranks are >= x. We find its 48 bits from the highest to the lowest: a bit is 1 if enough ranks are still
  //    >= x with it.
  uint64_t lowest = 0;
  if (top_k > 0 && top_k < V)
    for (int bit = 47; bit >= 0; bit--) {
      const uint64_t candidate = lowest | uint64_t{1} << bit;
      int reach = 0;
      for (int v = threadIdx.x; v < V; v += block) reach += rank(v) >= candidate;
      if (block_sum<block>(reach) >= top_k) lowest = candidate;
    }

  const double largest = float(logits[likeliest]);
  const auto weight = [&](int v) {
    return rank(v) >= lowest ? exp((double(float(logits[v])) - largest) / temperature) : 0.0;
  };
  // 3. Each thread adds up the weights of a contiguous piece of the tokens. The largest weight is exp(0) = 1.
  __shared__ double pieces[block];
  const int piece = (V + block - 1) / block, count = (V + piece - 1) / piece, first = threadIdx.x * piece;
  double sum = 0;
  for (int v = first; v < min(first + piece, V); v++) sum += weight(v);
  pieces[threadIdx.x] = sum;
  __syncthreads();
  // 4. Thread 0 alone: draw a share of the total weight, find the piece in which the running sum passes it, and within
  //    that piece the token. The order of the sums is fixed. If rounding lets the piece end before `share`, we take its
  //    last token with a weight.
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < count; i++) total += pieces[i];
  const double share = uniform * total;
  double before = 0;
  int passing = 0;  // the piece
  while (passing < count - 1 && before + pieces[passing] <= share) before += pieces[passing++];
  int chosen = likeliest;  // if rounding left no weight in the piece
  for (int v = passing * piece; v < min((passing + 1) * piece, V); v++) {
    const double w = weight(v);
    if (w > 0) chosen = v;
    if ((before += w) > share) break;
  }
  *token = chosen;
}

// token (1) = drawn from softmax(logits (V) / temperature), restricted to the top_k likeliest tokens; top_k 0 allows
// all. Temperature 0 takes the likeliest token, the first of equals. uniform is in (0, 1).
// One block does it. Its search for top_k reads the logits 48 times, which stay in the multiprocessor's cache.
template <class Real>
void sample_token(int* token, const Real* logits, int V, double temperature, int top_k, double uniform,
                  cudaStream_t stream) {
  require(V > 0 && V <= sample_token_largest_V, "sample_token: V = ", V);
  launch(sample_token_kernel<Real>, {1, sample_token_block, 0, stream}, token, logits, V, temperature, top_k, uniform);
}
