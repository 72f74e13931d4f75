// Draws tokens from their logits: choose_token of host/sampler.h on the GPU, with the same result, so that no logits
// travel to the host, and one token after the other, so that the host does not wait for each. exp() may round
// differently, and so may the sums for V > 256, which have another order. That matters only if `uniform` falls on the
// border between two tokens, within such a rounding error (1e-15 or so for V = 65).
// defines: Texts, sample_token, DeviceSampler
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "../host/sampler.h"
#include "block.cuh"
#include "choices.cuh"
#include "decode.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "runtime.cuh"

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

// Draws a token from softmax(logits (V) / temperature), restricted to the top_k likeliest tokens; top_k 0 allows all.
// Temperature 0 takes the likeliest token, the first of equals. All 256 threads of the block call together, and only
// thread 0 gets the token. A thread has every 256th token, and in step 3 a contiguous piece of them. The search for top_k
// reads the logits 48 times, which stay in the multiprocessor's cache.
template <class Real>
__device__ int draw_token(const Real* logits, int V, const Choice& choice) {
  constexpr int block = sample_token_block;
  const double temperature = choice.temperature;
  const int top_k = choice.top_k;
  const auto rank = [&](int v) { return likelihood_rank(float(logits[v]), v); };

  // 1. The likeliest token: the lower 16 bits of the largest rank, inverted back.
  uint64_t best = 0;
  for (int v = threadIdx.x; v < V; v += block) best = max(best, rank(v));
  best = block_reduce<block>(best, [](uint64_t a, uint64_t b) { return max(a, b); });
  const int likeliest = sample_token_largest_V - 1 - int(best & (sample_token_largest_V - 1));
  if (temperature == 0) return likeliest;  // all threads do, so no barrier waits for one

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
  if (threadIdx.x != 0) return 0;
  double total = 0;
  for (int i = 0; i < count; i++) total += pieces[i];
  const double share = choice.uniform * total;
  double before = 0;
  int passing = 0;  // the piece
  while (passing < count - 1 && before + pieces[passing] <= share) before += pieces[passing++];
  int chosen = likeliest;  // if rounding left no weight in the piece
  for (int v = passing * piece; v < min((passing + 1) * piece, V); v++) {
    const double w = weight(v);
    if (w > 0) chosen = v;
    if ((before += w) > share) break;
  }
  return chosen;
}

// B texts that grow by a token each time that sample_token is called. All of it lies on the device.
struct Texts {
  int* x;                 // (B, T)      the windows: the last tokens of each text, at most T, and then anything
  int* lengths;           // (B)         tokens in each window, at least one
  int* drawn;             // (B)         how many each text has got
  const Choice* choices;  // (rounds, B) how they are drawn
  int* tokens;            // (rounds, B) what was drawn
};

// Launched with B blocks of 256 threads: a block has one text.
//   logits (B, T, Vp)
template <class Real>
__global__ void __launch_bounds__(sample_token_block)
    sample_token_kernel(Texts texts, const Real* logits, int T, int V, int Vp) {
  wait_for_inputs();
  const int B = gridDim.x, b = blockIdx.x;
  // 1. The token that follows the window's last one. Thread 0 changes these two numbers at the end, behind a barrier of
  //    draw_token, when all threads have read them.
  const int length = texts.lengths[b], round = texts.drawn[b];
  const size_t last = size_t(b) * T + length - 1;
  const int token = draw_token(logits + last * Vp, V, texts.choices[size_t(round) * B + b]);
  // 2. A full window moves left by one token, 256 at a time: all threads read theirs before one of them writes.
  int* const window = texts.x + size_t(b) * T;
  for (int first = 0; length == T && first < T - 1; first += sample_token_block) {
    const int t = first + threadIdx.x;
    const int next = t < T - 1 ? window[t + 1] : 0;
    __syncthreads();
    if (t < T - 1) window[t] = next;
  }
  // 3. The token becomes the window's last one.
  if (threadIdx.x != 0) return;
  window[min(length, T - 1)] = token;
  texts.tokens[size_t(round) * B + b] = token;
  texts.lengths[b] = min(length + 1, T);
  texts.drawn[b] = round + 1;
}

// Adds to each of B texts a token, which is drawn from the row of logits (B, T, Vp) at its window's last one. How it is
// drawn, and where, is read on the device: so a graph that was captured once draws one token after the other.
template <class Real>
void sample_token(const Texts& texts, const Real* logits, int B, int T, int V, int Vp, cudaStream_t stream) {
  require(B > 0 && T > 0 && V > 0 && V <= sample_token_largest_V && V <= Vp, "sample_token: B = ", B, ", T = ", T,
          ", V = ", V, ", rows of ", Vp);
  launch(sample_token_kernel<Real>, {unsigned(B), sample_token_block, 0, stream}, texts, logits, T, V, Vp);
}

// ---------------------------------------------------------------------------------------------------------------------
// Generates up to B texts together with a model whose tokens x (B, T) lie on the device. A round, in which each text
// gets a token, is a forward pass and sample_token: always the same launches, captured once as a graph. The host
// launches up to 64 rounds without waiting, and then copies their tokens out together.
//
// Version 1 of `sampling` (choices.cuh) computes the whole windows in each round. Version 2 does so in the first, which
// leaves keys and values behind. From then on, until the windows are full, forward_last (decode.cuh) computes the last
// token of each. Once a window rolls, every token moves to another position, and its keys and values change.
class DeviceSampler {
 public:
  DeviceSampler(int* x, int B, const ModelShape& shape, cudaStream_t stream)
      : B_(B),
        shape_(shape),
        stream_(stream),
        lengths_(B, "the lengths of texts"),
        drawn_(B, "the lengths of texts"),
        choices_(size_t(rounds_at_once) * B, "the random numbers of texts"),
        tokens_(size_t(rounds_at_once) * B, "the tokens of texts"),
        texts_{x, lengths_.data(), drawn_.data(), choices_.data(), tokens_.data()} {}

  // Trainer::next_tokens (host/trainer.h) for the model m, a GPT (train_gpt.cu). forward(k) puts onto the stream what
  // computes the logits (k, T, Vp) of the first k windows of m.x, a pass without backward.
  template <class Model, class Forward>
  std::vector<int> next_tokens(Model& m, const int* contexts, int n, int known, const Sampling& s, int i,
                               bool use_graph, Forward forward) {
    require(s.samples <= B_, "DeviceSampler: ", s.samples, " texts, there is room for ", B_);
    const int rounds = std::min(s.count - i, rounds_at_once), T = shape_.T, V = shape_.V;
    const size_t samples = size_t(s.samples);
    std::vector<int> windows(samples * T);
    const std::vector<int> lengths(samples, n), zeros(samples);
    std::vector<Choice> choices;
    for (size_t k = 0; k < samples; k++) std::copy_n(contexts + k * n, n, windows.begin() + long(k) * T);
    for (int j = 0; j < rounds; j++)
      for (int k = 0; k < s.samples; k++) choices.push_back(s.choice_of(i + j, k));
    const auto upload = [&](auto* to, const auto& from) {
      CUDA_CHECK(cudaMemcpyAsync(to, from.data(), from.size() * sizeof from[0], cudaMemcpyHostToDevice, stream_));
    };
    const auto begin = [&] {
      upload(texts_.x, windows);
      upload(texts_.lengths, lengths);
      upload(texts_.drawn, zeros);
      upload(choices_.data(), choices);
    };
    const auto run_round = [&](Pass pass, int k) {
      if (pass == last)
        forward_last(m, texts_.lengths, k);
      else
        forward_windows(m, k, forward);
      sample_token(texts_, m.forward_only.logits, k, T, V, padded_vocabulary(V), stream_);
    };
    // Whether keys and values of all tokens but the last are there: if these are the texts that the call before left.
    bool kept = known > 0 && std::equal(left_.begin(), left_.end(), contexts, contexts + samples * n);
    begin();
    std::array<Graph, 2>& graphs = graphs_[s.samples];
    if (use_graph && !graphs[whole].captured()) {
      // First rounds load every kernel and choose the products' algorithms, which nothing may do during a capture: that
      // of one text first, because the products of several take over its algorithms (Matmul::keep_windows).
      run_round(whole, 1);
      if (s.samples > 1) run_round(whole, s.samples);
      graphs[whole].capture(stream_, [&] { run_round(whole, s.samples); });
      if (keeps_) {
        run_round(last, s.samples);
        graphs[last].capture(stream_, [&] { run_round(last, s.samples); });
      }
      begin();
      kept = false;  // the rounds before the capture have written other keys and values
    }
    for (int j = 0; j < rounds; j++) {
      const Pass pass = keeps_ && kept && n + j <= T ? last : whole;
      if (use_graph)
        graphs[pass].launch(stream_);
      else
        run_round(pass, s.samples);
      kept = true;
    }
    std::vector<int> tokens(choices.size());
    copy_to_host(tokens.data(), texts_.tokens, tokens.size(), stream_);  // and waits: until then the uploads are read
    left_.clear();
    for (size_t k = 0; k < samples; k++) {
      left_.insert(left_.end(), contexts + k * n, contexts + (k + 1) * n);
      for (size_t j = 0; j < size_t(rounds); j++) left_.push_back(tokens[j * samples + k]);
    }
    return tokens;
  }

 private:
  static constexpr int rounds_at_once = 64;
  enum Pass { whole, last };  // computes whole windows, or the last token of each

  // The whole windows of k texts, so that each has the bits that it would have alone. Version 2 lets the layers' keys
  // and values stay: each layer has a slice of its own.
  template <class Model, class Forward>
  void forward_windows(Model& m, int k, Forward forward) {
    m.matmul.keep_windows(shape_.T);
    if (keeps_) m.forward_only.qkv = m.acts.a.qkv;
    forward(k);
    m.forward_only.qkv.stride = 0;
    m.matmul.keep_windows(0);
  }

  int B_;
  ModelShape shape_;
  cudaStream_t stream_;
  bool keeps_ = choices().sampling == 2;  // from the start: the activations have room for it only then
  DeviceBuffer<int> lengths_, drawn_;     // these four are the memory of what is in texts_
  DeviceBuffer<Choice> choices_;
  DeviceBuffer<int> tokens_;
  Texts texts_;
  std::map<int, std::array<Graph, 2>> graphs_;  // by the number of texts, and by Pass
  // The texts as the last call left them, (samples, n) with what it drew. If their windows have rolled they are longer than
  // the next call's, and so they equal none.
  std::vector<int> left_;
};
