// Sampling's second way (choices.cuh): the forward pass for the last token of each text alone. The keys and values of
// the tokens before it are still where earlier passes have left them. With one text, a product is a matrix times a
// vector: the weights are read once and used once, and what counts is how long each kernel waits for memory. So there
// are few of them, five for a layer.
//
// Text b's last token stands at position lengths[b] - 1 of its window, which is row b * T + lengths[b] - 1 of each
// activation. The kernels compute that row of what forward (train_gpt.cu) computes, in the same memory, and round to
// Real where forward does; but their sums have another order, and attention's weights are not rounded. So the two ways
// agree up to rounding, and a text may part from the other way's where rounding decides. The kernels read the lengths
// on the device, so that a graph that was captured once serves every token.
//
// A text gets the same bits however many there are: its sums have the same order, and where a product is added to a sum
// we write fmaf, because the compiler may join the two in one version of a kernel and not in another.
// defines: layers_of_qkv, LastRows, decode_embedding, decode_product, decode_attention, forward_last
#pragma once
#include <cmath>
#include <type_traits>

#include "../host/tensors.h"
#include "attention.cuh"
#include "block.cuh"
#include "choices.cuh"
#include "device.cuh"
#include "launch.cuh"

// How many layers the activation qkv has slices for, where other activations have L: with version 2 always one for each
// layer, because keys and values have to stay. Where L is 1, in a model that is not trained, that takes
// (shape.L - 1) * B * T * 3 C numbers more, 189 MB for 64 windows of the lecture's model in 16 bits.
inline size_t layers_of_qkv(const ModelShape& shape, size_t L) { return choices().sampling == 2 ? shape.L : L; }

// The texts' last rows, in activations of (B, T) rows.
struct LastRows {
  const int* lengths;  // (B), each from 1 to T
  int T;
  __device__ size_t operator()(int b) const { return size_t(b) * T + lengths[b] - 1; }
};

// ---------------------------------------------------------------------------------------------------------------------

constexpr int decode_embedding_threads = 128;

// Launched with (ceil(C / 8 / 128), B) blocks of 128 threads: a thread has eight channels of one text.
template <class Real>
__global__ void __launch_bounds__(decode_embedding_threads)
    decode_embedding_kernel(Real* out, const int* x, const Real* wte, const Real* wpe, LastRows last, int C) {
  wait_for_inputs();
  const int c = (blockIdx.x * decode_embedding_threads + threadIdx.x) * 8;
  if (c >= C) return;
  const size_t row = last(blockIdx.y);
  Float8 sum = load8(wpe + row % last.T * C + c);
  const Float8 token = load8(wte + size_t(x[row]) * C + c);
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] += token[i];
  store8(out + row * C + c, sum);
}

// The last rows of out (B, T, C) = wte[x] (V, C) + wpe (T, C); x (B, T).
template <class Real>
void decode_embedding(Real* out, const int* x, const Real* wte, const Real* wpe, const LastRows& last, int B, int C,
                      cudaStream_t stream) {
  require(B > 0 && B <= 65535 && C > 0 && C % 8 == 0, "decode_embedding: B = ", B, ", C = ", C);
  launch(decode_embedding_kernel<Real>,
         {dim3(unsigned(ceil_div(C / 8, decode_embedding_threads)), unsigned(B)), decode_embedding_threads, 0, stream},
         out, x, wte, wpe, last, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products: rows times a matrix, with the LayerNorm before it and what comes after it.

// What becomes of a sum: it gets a bias and is stored; ReLU comes between; or it joins the residual stream.
enum class Finish { bias, relu, residual };

// The type of the bias. What joins the residual stream gets the master, as residual_layernorm_forward adds it; the
// other products get the bias from the working copy.
template <class Real, Finish FINISH>
using DecodeBias = std::conditional_t<FINISH == Finish::residual, float, Real>;

// Small blocks, so that few columns spread over many multiprocessors, too. A warp needs nothing of its neighbours.
constexpr int decode_product_threads = 64;

// Mean and 1 / standard deviation of row (C), given to all 32 lanes, which call together. Divisions, not products with
// 1 / C: the compiler can join a product with the next sum.
template <class Real>
__device__ inline void row_statistics(float& mean, float& rstd, const Real* row, int C) {
  float sum = 0, squares = 0;
  for (int c = threadIdx.x % 32 * 8; c < C; c += 256) {
    const Float8 x = load8(row + c);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i];
  }
  mean = lane_sum(sum) / float(C);
  for (int c = threadIdx.x % 32 * 8; c < C; c += 256) {
    const Float8 x = load8(row + c);
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(x[i] - mean, x[i] - mean, squares);
  }
  rstd = 1 / sqrtf(lane_sum(squares) / float(C) + 1e-5f);
}

// Launched with (ceil(OC / (2 * columns)), ceil(B / TEXTS)) blocks of two warps: a warp has `columns` columns of out
// for TEXTS texts. A lane has every 32nd chunk of eight channels. The last rows of
//   out  (B, T, OC) = or +=      f(inp) @ weight^T, finished; a row is ldo elements long
//   inp  (B, T, C)               f: LayerNorm with norm_weight (C) and norm_bias (C) if NORM, else nothing
//   weight (OC, C), bias (OC) or, unless it is a residual, null
template <class Real, int TEXTS, bool NORM, Finish FINISH>
__global__ void __launch_bounds__(decode_product_threads)
    decode_product_kernel(Real* out, const Real* inp, const float* norm_weight, const float* norm_bias,
                          const Real* weight, const DecodeBias<Real, FINISH>* bias, LastRows last, int B, int C, int OC,
                          int ldo) {
  wait_for_inputs();
  constexpr int columns = TEXTS == 1 ? 1 : 4, at_once = 4 / columns, warps = decode_product_threads / 32;
  const int lane = threadIdx.x % 32, chunks = C / 8;
  const int first_text = blockIdx.y * TEXTS, first_column = (blockIdx.x * warps + threadIdx.x / 32) * columns;
  if (first_column >= OC) return;  // the whole warp, and no barrier follows

  // 1. This lane's first chunks of the weights, so that they are under way while we look at the rows. Columns from OC
  //    on are the last one again, and texts from B on the last text: they are not stored.
  Eight<Real> w[at_once][columns] = {};
  const auto fetch = [&](int first) {
#pragma unroll
    for (int j = 0; j < at_once; j++)
#pragma unroll
      for (int o = 0; o < columns; o++) {
        const int chunk = first + j * 32, column = min(first_column + o, OC - 1);
        if (chunk < chunks) w[j][o] = reinterpret_cast<const Eight<Real>*>(weight + size_t(column) * C)[chunk];
      }
  };
  fetch(lane);
  // 2. Where the texts' rows are, and for LayerNorm their means and deviations.
  const Real* row[TEXTS];
  float mean[TEXTS], rstd[TEXTS];
#pragma unroll
  for (int k = 0; k < TEXTS; k++) {
    row[k] = inp + last(min(first_text + k, B - 1)) * C;
    if constexpr (NORM) row_statistics(mean[k], rstd[k], row[k], C);
  }

  // 3. Each lane adds up its chunks. The normalised row is rounded, as forward rounds it when it stores it.
  float sum[TEXTS][columns] = {};
  for (int first = lane; first < chunks; first += at_once * 32) {
#pragma unroll
    for (int j = 0; j < at_once; j++) {
      const int chunk = first + j * 32;
      if (chunk >= chunks) continue;
      Float8 scale{}, shift{};
      if constexpr (NORM) scale = load8(norm_weight + chunk * 8), shift = load8(norm_bias + chunk * 8);
#pragma unroll
      for (int k = 0; k < TEXTS; k++) {
        Float8 x = load8(row[k] + chunk * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if constexpr (NORM) x[i] = float(Real(fmaf((x[i] - mean[k]) * rstd[k], scale[i], shift[i])));
#pragma unroll
          for (int o = 0; o < columns; o++) sum[k][o] = fmaf(x[i], float(w[j][o].v[i]), sum[k][o]);
        }
      }
    }
    fetch(first + at_once * 32);
  }

  // 4. Add up the lanes' sums. Lane k * columns + o gets the total of text k and column o, finishes it and stores it.
  float mine = 0;
#pragma unroll
  for (int i = 0; i < TEXTS * columns; i++) {
    const float total = lane_sum(sum[i / columns][i % columns]);
    if (lane == i) mine = total;
  }
  const int b = first_text + lane / columns, o = first_column + lane % columns;
  if (lane >= TEXTS * columns || b >= B || o >= OC) return;
  Real& result = out[last(b) * ldo + o];
  if constexpr (FINISH == Finish::residual) {
    result = Real(float(result) + (float(Real(mine)) + bias[o]));
  } else {
    if (bias) mine += float(bias[o]);
    result = Real(FINISH == Finish::relu && mine < 0 ? 0 : mine);  // NaN stays, as in relu.h
  }
}

// The last rows of
//   out (B, T, OC) =    f(inp) @ weight^T + bias                Finish::bias; bias may be null
//   out (B, T, OC) =    max(f(inp) @ weight^T + bias, 0)        Finish::relu; bias may be null
//   out (B, T, OC) +=   inp @ weight^T + bias                   Finish::residual
// where f is LayerNorm if NORM, else nothing. The kernel has the shapes. out is aligned as its elements are, all else
// to 16 bytes.
template <bool NORM, Finish FINISH, class Real>
void decode_product(Real* out, const Real* inp, const float* norm_weight, const float* norm_bias, const Real* weight,
                    const std::type_identity_t<DecodeBias<Real, FINISH>>* bias, const LastRows& last, int B, int C,
                    int OC, int ldo, cudaStream_t stream) {
  require(B > 0 && B <= 65535 && C > 0 && C % 8 == 0 && OC > 0 && ldo >= OC, "decode_product: B = ", B, ", C = ", C,
          ", OC = ", OC, ", rows of ", ldo);
  const auto launch_for = [&](auto texts) {
    constexpr int TEXTS = texts, columns_of_block = (TEXTS == 1 ? 1 : 4) * decode_product_threads / 32;
    launch(decode_product_kernel<Real, TEXTS, NORM, FINISH>,
           {dim3(unsigned(ceil_div(OC, columns_of_block)), unsigned(ceil_div(B, TEXTS))), decode_product_threads, 0,
            stream},
           out, inp, norm_weight, norm_bias, weight, bias, last, B, C, OC, ldo);
  };
  if (B == 1)
    launch_for(std::integral_constant<int, 1>());
  else
    launch_for(std::integral_constant<int, 4>());
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query.

constexpr int decode_attention_threads = 256;

// Launched with (NH, B) blocks of 256 threads: a block has one head of one text. HS / 8 neighbouring lanes share a key,
// eight channels each. Each such group computes a softmax and an output over every groups-th key; the last step joins
// the groups.
//   out  (B, T, NH, HS)      its last rows: the weighted sums of the values
//   qkv  (B, T, 3, NH, HS)   the keys and values of all tokens up to the last, and its query
template <class Real, int HS>
__global__ void __launch_bounds__(decode_attention_threads)
    decode_attention_kernel(Real* out, const Real* qkv, LastRows last, int NH) {
  wait_for_inputs();
  using namespace attention;
  constexpr int lanes = HS / 8, groups = decode_attention_threads / lanes, at_once = 4;
  __shared__ __align__(16) float outputs[groups * HS];
  const int b = blockIdx.y, keys = last.lengths[b], group = threadIdx.x / lanes, c = threadIdx.x % lanes * 8;
  const size_t C = size_t(NH) * HS;
  const Real *Q = qkv + size_t(b) * last.T * 3 * C + blockIdx.x * HS + c, *K = Q + C, *V = K + C;

  // 1. The query, and nothing seen yet.
  const Float8 q = load8(Q + size_t(keys - 1) * 3 * C);
  const float scale = softmax_scale<HS>() * log2_e;
  float max = -INFINITY, sum = 0;
  Float8 o{};
  for (int first = 0; first < keys; first += at_once * groups) {
    // 2. The scores of four keys, whose loads are under way together, and so are their values'. Keys after the last
    //    have no weight; the last one's memory is read for them.
    Float8 v[at_once];
    float score[at_once];
#pragma unroll
    for (int j = 0; j < at_once; j++) {
      const int key = first + j * groups + group;
      const size_t at = size_t(min(key, keys - 1)) * 3 * C;
      const Float8 k = load8(K + at);
      v[j] = load8(V + at);
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) dot = fmaf(q[i], k[i], dot);
      dot = lane_sum<lanes>(dot);
      score[j] = key < keys ? dot * scale : -INFINITY;
    }
    // 3. Running softmax: where the maximum has grown, what was summed so far shrinks by 2^(before - max).
    const float before = max;
#pragma unroll
    for (int j = 0; j < at_once; j++) max = fmaxf(max, score[j]);
    if (max == -INFINITY) continue;  // no key yet: 2^(before - max) would be NaN
    const float shrink = power_of_two<Real>(before - max);
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < 8; i++) o[i] *= shrink;
      // 4. sum += weights, o += weights @ values
#pragma unroll
    for (int j = 0; j < at_once; j++) {
      const float weight = power_of_two<Real>(score[j] - max);
      sum += weight;
#pragma unroll
      for (int i = 0; i < 8; i++) o[i] = fmaf(weight, v[j][i], o[i]);
    }
  }
  // 5. The groups' sums and outputs, shrunk to the maximum of all, are added up in order. The HS outputs go through
  //    shared memory.
  const float shrink = power_of_two<Real>(
      max - block_reduce<decode_attention_threads>(max, [](float x, float y) { return fmaxf(x, y); }));
#pragma unroll
  for (int i = 0; i < 8; i++) o[i] *= shrink;
  store8(outputs + group * HS + c, o);
  const float denominator = block_sum<decode_attention_threads>(c == 0 ? sum * shrink : 0.0f);  // has barriers
  if (threadIdx.x >= HS) return;
  float total = 0;
  for (int g = 0; g < groups; g++) total += outputs[g * HS + threadIdx.x];
  out[last(b) * C + blockIdx.x * HS + threadIdx.x] = Real(total / denominator);
}

// The last rows of out (B, T, C) = attention of qkv (B, T, 3 C), whose rows up to the last have been computed.
template <class Real>
void decode_attention(Real* out, const Real* qkv, const LastRows& last, int B, int C, int NH, cudaStream_t stream) {
  require(B > 0 && B <= 65535 && NH > 0 && C % NH == 0, "decode_attention: B = ", B, ", C = ", C, ", NH = ", NH);
  attention::with_head_size("decode_attention", C / NH, [&](auto size) {
    launch(decode_attention_kernel<Real, size>, {dim3(unsigned(NH), unsigned(B)), decode_attention_threads, 0, stream},
           out, qkv, last, NH);
  });
}

// ---------------------------------------------------------------------------------------------------------------------

// The last rows of m.forward_only.logits (B, T, Vp), for the first B windows of m.x, whose lengths (B) lie on the
// device. m is a GPT (train_gpt.cu); m.acts.a.qkv holds the keys and values of all tokens before the last, in a slice
// for each layer, and gets the last one's. Read it beside forward: the residual stream is in place, as in a pass
// without backward.
template <class Model>
void forward_last(const Model& m, const int* lengths, int B) {
  Range range("forward_last");
  const auto& w = m.w;
  const auto& p = m.p;
  const auto& a = m.forward_only;
  const auto& qkv = m.acts.a.qkv;
  const int V = m.shape.V, C = m.shape.C, NH = m.shape.NH;
  const LastRows last = {lengths, m.shape.T};
  auto* const residual = a.inp[0];

  decode_embedding(residual, m.x, w.wte, w.wpe, last, B, C, m.stream);
  for (int l = 0; l < m.shape.L; l++) {
    decode_product<true, Finish::bias>(qkv[l], residual, p.ln1w[l], p.ln1b[l], w.qkvw[l], nullptr, last, B, C, 3 * C,
                                       3 * C, m.stream);
    decode_attention(a.att[l], qkv[l], last, B, C, NH, m.stream);
    decode_product<false, Finish::residual>(residual, a.att[l], nullptr, nullptr, w.attprojw[l], p.attprojb[l], last, B,
                                            C, C, C, m.stream);
    decode_product<true, Finish::relu>(a.fc[l], residual, p.ln2w[l], p.ln2b[l], w.fcw[l], w.fcb[l], last, B, C, 4 * C,
                                       4 * C, m.stream);
    decode_product<false, Finish::residual>(residual, a.fc[l], nullptr, nullptr, w.fcprojw[l], p.fcprojb[l], last, B,
                                            4 * C, C, C, m.stream);
  }
  decode_product<true, Finish::bias>(a.logits, residual, p.lnfw, p.lnfb, w.headw, w.headb, last, B, C, V,
                                     padded_vocabulary(V), m.stream);
}
