// The draw of a token from its logits: choose_token of host/sampler.h on the GPU, with the same result, so that no
// logits travel to the host. Its exp() may round differently, which matters if uniform falls within 1e-15 of a border.
// defines: sample_token
#pragma once
#include <cstdint>

#include "block.cuh"
#include "device.cuh"
#include "launch.cuh"

constexpr int sample_token_block = 256;
constexpr int sample_token_largest_V = 1 << 16;

// A number for each token that is larger the likelier it is, and of equals the first: the logit's bits, changed so that
// they order as the float does, and below them the token's, inverted.
__device__ inline uint64_t likelihood_rank(float logit, int v) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 + 0 = 0: it equals 0, and so its bits have to
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 16 | uint32_t(sample_token_largest_V - 1 - v);
}

template <class Real>
__global__ void __launch_bounds__(sample_token_block)
    sample_token_kernel(int* token, const Real* logits, int V, double temperature, int top_k, double uniform) {
  constexpr int block = sample_token_block;
  const auto rank = [&](int v) { return likelihood_rank(float(logits[v]), v); };

  uint64_t best = 0;
  for (int v = threadIdx.x; v < V; v += block) best = max(best, rank(v));
  best = block_reduce<block>(best, [](uint64_t a, uint64_t b) { return max(a, b); });
  const int likeliest = sample_token_largest_V - 1 - int(best & (sample_token_largest_V - 1));
  if (temperature == 0) {
    if (threadIdx.x == 0) *token = likeliest;
    return;  // all threads do
  }

  // The rank of the last of the top_k is the largest number that top_k ranks reach. It is found bit by bit.
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
  // Every thread adds the weights of a contiguous piece, then thread 0 goes through the pieces, and through the one in
  // which the sum passes the share that was drawn: an order that is fixed, and in which no sum exceeds a later one.
  __shared__ double pieces[block];
  const int piece = (V + block - 1) / block, count = (V + piece - 1) / piece, first = threadIdx.x * piece;
  double sum = 0;
  for (int v = first; v < min(first + piece, V); v++) sum += weight(v);
  pieces[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < count; i++) total += pieces[i];
  const double share = uniform * total;
  double before = 0;
  int at = 0;
  while (at < count - 1 && before + pieces[at] <= share) before += pieces[at++];
  int chosen = likeliest;  // rounding may leave nothing in the piece
  for (int v = at * piece; v < min((at + 1) * piece, V); v++) {
    const double w = weight(v);
    if (w > 0) chosen = v;
    if ((before += w) > share) break;
  }
  *token = chosen;
}

// token (1) = drawn from softmax(logits (V) / temperature), restricted to the top_k likeliest (0: all); temperature 0
// takes the likeliest, the first of equals. uniform is in (0, 1).
// One block; the search for top_k passes 48 times over the logits, which the block's processor keeps in its cache.
template <class Real>
void sample_token(int* token, const Real* logits, int V, double temperature, int top_k, double uniform,
                  cudaStream_t stream) {
  require(V > 0 && V <= sample_token_largest_V, "sample_token: V = ", V);
  launch(sample_token_kernel<Real>, {1, sample_token_block, 0, stream}, token, logits, V, temperature, top_k, uniform);
}
