// Causal multi-head self-attention of floats on the GPU, without tensor cores. It is the simple variant: read it before
// attention.cuh, whose kernels do the same with squares of 16 x 16 where here a warp has one row. attention.h has the
// equations. Floats have kernels for tensor cores, too, in attention_tf32.cuh, for --dtype tf32 and float32. They are
// version 2; no card takes them yet (choices.cuh), and cards before sm_80 cannot.
//
// One warp has one query (or, in the last kernel, one key) and goes through the rows of the other kind 32 at a time. A
// row's HS channels are spread over HS / 4 lanes, four to each, so that a warp reads 32 / (HS / 4) rows side by side:
//
//   HS = 64:   lanes 0 ... 15                     lanes 16 ... 31
//              channels 0-3, 4-7, ... of row j    channels 0-3, 4-7, ... of row j + 1
//
// Scores and weights lie differently: lane i holds one number, for row k0 + i (in the last kernel, row q0 + i).
// dot_with_rows goes from the first layout to the second, add_rows goes back.
//
// The forward kernel's scores contain the factor softmax_scale * log2_e, so that weights are powers of 2. In backward
// and in attention.cuh, scores are q . k until backward_weight or softmax_step multiplies by it.
// defines: attention_forward_float_kernel, attention_backward_queries_float_kernel,
//          attention_backward_keys_float_kernel; and, for the kernels of attention.cuh as well, attention::warps,
//          threads, log2_e, lane, warp_index, softmax_scale, Head, power_of_two, backward_weight
#pragma once
#include <type_traits>

#include "device.cuh"
#include "dropout.cuh"
#include "launch.cuh"

namespace attention {

constexpr int warps = 4, threads = 32 * warps;
constexpr float log2_e = 1.44269504f;  // exp(x) = exp2(x * log2_e); the scores' scale contains this factor

__device__ inline int lane() { return threadIdx.x % 32; }
// The shuffle tells the compiler that all lanes have the same index. It can then keep values that depend on it in one
// register for the warp (a uniform register).
__device__ inline int warp_index() { return __shfl_sync(all_lanes, int(threadIdx.x / 32), 0); }

template <int HS>
__device__ inline float softmax_scale() {
  return 1 / sqrtf(float(HS));
}

// The head that a thread block works on. Grids are (NH, B, pieces of the queries or keys).
struct Head {
  size_t bh;           // the head's number in arrays (B, NH, ...)
  uint64_t draw_head;  // counted over all micro-batches of a step: it selects the head's random draws
  size_t qkv, out;     // where its first row begins in arrays (B, T, 3, NH, HS) and (B, T, NH, HS)
  __device__ Head(const Dropout& drop, int T, int NH, int HS)
      : bh(size_t(blockIdx.y) * NH + blockIdx.x),
        draw_head(uint64_t(drop.first_row + blockIdx.y) * NH + blockIdx.x),
        qkv((size_t(blockIdx.y) * T * 3 * NH + blockIdx.x) * HS),
        out((size_t(blockIdx.y) * T * NH + blockIdx.x) * HS) {}
};

// 2^x. Weights that will be rounded to 16 bits do not need the last bits of exp2f, which takes five times as many
// instructions.
template <class Real>
__device__ inline float power_of_two(float x) {
  if constexpr (std::is_same_v<Real, float>)
    return exp2f(x);
  else
    return exp2_approx(x);
}

// In:  score = q . k, gradient = dP = dout . v, scale = softmax_scale * log2_e, lse as a base-2 logarithm, which is
//      lse * log2_e
// Out: score becomes the weight after dropout, without its factor keep_scale. gradient becomes P * (m * dP - D), with
//      m = keep_scale or 0, which is dS without its factor 1 / sqrt(HS). The sums of both get these factors at the end.
template <class Real>
__device__ inline void backward_weight(float& score, float& gradient, float scale, float lse, float D, bool keep,
                                       float keep_scale) {
  const float P = power_of_two<Real>(fmaf(score, scale, -lse));
  score = keep ? P : 0.0f;
  gradient = P * ((keep ? keep_scale * gradient : 0.0f) - D);
}

template <int HS>
constexpr int row_lanes = HS / 4;  // lanes that share a row
template <int HS>
constexpr int rows_at_once = 32 / row_lanes<HS>;  // rows that a warp reads side by side

// This lane's four channels of row (HS).
template <int HS>
__device__ inline float4 load4(const float* row) {
  return *reinterpret_cast<const float4*>(row + lane() % row_lanes<HS> * 4);
}
__device__ inline float dot4(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ inline float4 fma4(float f, const float4& a, const float4& b) {
  return {fmaf(f, a.x, b.x), fmaf(f, a.y, b.y), fmaf(f, a.z, b.z), fmaf(f, a.w, b.w)};
}

// Lane i gets x . row i. x (HS) is spread over row_lanes lanes: each such group has a copy of it, and computes the dot
// product with one row at a time. rows (count, HS): `stride` floats apart, at most 32. Lanes from `count` on get 0.
template <int HS>
__device__ inline float dot_with_rows(const float4& x, const float* rows, int stride, int count) {
  float mine = 0;
  for (int j = 0; j < count; j += rows_at_once<HS>) {
    // 1. Each group of lanes takes one row. Then all its lanes have the dot product.
    const int r = j + lane() / row_lanes<HS>;
    const float dot = lane_sum<row_lanes<HS>>(r < count ? dot4(x, load4<HS>(rows + r * stride)) : 0.0f);
    // 2. Lanes j, j + 1, ... take it from the groups 0, 1, ...
    const float moved = __shfl_sync(all_lanes, dot, lane() % rows_at_once<HS> * row_lanes<HS>);
    if (lane() / rows_at_once<HS> * rows_at_once<HS> == j) mine = moved;
  }
  return mine;
}

// sum (HS) += weight_0 * row 0 + weight_1 * row 1 + ..., where lane i holds weight_i. rows (count, HS) as above. Each
// group of lanes keeps the sum of its own rows; store4 adds the groups' sums.
template <int HS>
__device__ inline void add_rows(float4& sum, float weight, const float* rows, int stride, int count) {
  for (int j = 0; j < count; j += rows_at_once<HS>) {
    const int r = j + lane() / row_lanes<HS>;
    const float w = __shfl_sync(all_lanes, weight, r);
    if (r < count) sum = fma4(w, load4<HS>(rows + r * stride), sum);
  }
}
// row (HS) = factor * sum, added up over the groups of lanes.
template <int HS>
__device__ inline void store4(float* row, float4 sum, float factor) {
  for (int d = row_lanes<HS>; d < 32; d *= 2) {
    sum.x += __shfl_xor_sync(all_lanes, sum.x, d), sum.y += __shfl_xor_sync(all_lanes, sum.y, d);
    sum.z += __shfl_xor_sync(all_lanes, sum.z, d), sum.w += __shfl_xor_sync(all_lanes, sum.w, d);
  }
  if (lane() < row_lanes<HS>) *reinterpret_cast<float4*>(row + lane() * 4) = fma4(factor, sum, {0, 0, 0, 0});
}

}  // namespace attention

// Launched with (NH, B, ceil(T / 4)) blocks of 128 threads: a block has one head of one batch row and four neighbouring
// queries, a warp has one of them.
//   out  (B, T, NH, HS) =       the weighted sum of the values
//   lse  (B, NH, T) = or null   the logarithm of each query's softmax denominator, for backward
//   qkv  (B, T, 3, NH, HS)
// The 5 in __launch_bounds__ asks the compiler for so few registers that five blocks fit on a multiprocessor.
template <int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, 5)
    attention_forward_float_kernel(float* out, float* lse, const float* qkv, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  // Late queries see the most keys, so they begin first.
  const int q = int(gridDim.z - 1 - blockIdx.z) * warps + warp_index();
  if (q >= T) return;  // the whole warp, and no barrier follows
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  // 1. The warp's query, a copy in each group of lanes. `max` and `sum` are the softmax's so far, the same in every
  //    lane. o is the output so far, not yet divided by sum. Each group of lanes has its own o, the sum over its own
  //    keys.
  const float4 query = load4<HS>(Q + q * row);
  const float scale = softmax_scale<HS>() * log2_e;
  float max = -INFINITY, sum = 0;
  float4 o = {0, 0, 0, 0};
  for (int k0 = 0; k0 <= q; k0 += 32) {
    // 2. The scores of 32 keys, one in each lane. Keys after the query have no weight.
    const int count = min(32, q + 1 - k0);
    const float dot = dot_with_rows<HS>(query, K + k0 * row, row, count);
    const float score = lane() < count ? dot * scale : -INFINITY, before = max;
    // 3. Running softmax: where the maximum has grown, the sum so far shrinks by 2^(before - max).
    max = fmaxf(max, lane_max(score));
    float weight = exp2f(score - max);
    sum = sum * exp2f(before - max) + lane_sum(weight);
    // 4. Dropout, after the sum: the denominator contains all weights.
    if (DROPOUT && attention_draw(drop, head.draw_head, q, k0 + lane(), T) >= drop.threshold) weight = 0;
    // 5. Shrink o as well, then o += weights @ values.
    o = fma4(exp2f(before - max), o, {0, 0, 0, 0});
    add_rows<HS>(o, weight, V + k0 * row, row, count);
  }
  // 6. Write lse. Divide o by the denominator, apply dropout's factor, write out.
  if (lse && lane() == 0) lse[head.bh * T + q] = max / log2_e + logf(sum);
  store4<HS>(out + head.out + q * out_row, o, drop.keep_scale / sum);
}

// Launched as forward is: a warp has one query, and computes its D and, from the keys that it sees, its dq.
//   dqkv (B, T, 3, NH, HS)      dq is written; dk and dv are the other kernel's
//   D    (B, NH, T) =           dout . out, which the other kernel reads
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T) from forward
template <int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, 5)
    attention_backward_queries_float_kernel(float* dqkv, float* D, const float* dout, const float* qkv,
                                            const float* out, const float* lse, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int q = int(gridDim.z - 1 - blockIdx.z) * warps + warp_index();
  if (q >= T) return;
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  // 1. The warp's query and the gradient of its output, a copy in each group of lanes, and D of the query. Each group
  //    has its own dq, the sum over its own keys.
  const float4 query = load4<HS>(Q + q * row), dO = load4<HS>(dout + head.out + q * out_row);
  const float D_of_q = lane_sum<row_lanes<HS>>(dot4(dO, load4<HS>(out + head.out + q * out_row)));
  if (lane() == 0) D[head.bh * T + q] = D_of_q;
  const float scale = softmax_scale<HS>() * log2_e, lse_of_q = lse[head.bh * T + q] * log2_e;
  float4 dq = {0, 0, 0, 0};
  for (int k0 = 0; k0 <= q; k0 += 32) {
    // 2. Lane i: q . k and dout . v for key k0 + i. Lanes from `count` on get 0, and nonsense in step 3; add_rows skips
    //    them.
    const int count = min(32, q + 1 - k0);
    float score = dot_with_rows<HS>(query, K + k0 * row, row, count);
    float ds = dot_with_rows<HS>(dO, V + k0 * row, row, count);  // dP now, dS after backward_weight
    // 3. Of these, dS of the pair.
    const bool keep = !DROPOUT || attention_draw(drop, head.draw_head, q, k0 + lane(), T) < drop.threshold;
    backward_weight<float>(score, ds, scale, lse_of_q, D_of_q, keep, drop.keep_scale);
    // 4. dq += dS @ k
    add_rows<HS>(dq, ds, K + k0 * row, row, count);
  }
  store4<HS>(dqkv + head.qkv + q * row, dq, softmax_scale<HS>());
}

// Launched with (NH, B, ceil(T / 4)) blocks of 128 threads, after the kernel above: a warp has one key, and computes
// its dk and dv from the queries that see it.
//   dqkv (B, T, 3, NH, HS)      dk and dv are written
//   D    (B, NH, T)             from the kernel above
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T)
template <int HS, bool DROPOUT>
__global__ void __launch_bounds__(attention::threads, 5)
    attention_backward_keys_float_kernel(float* dqkv, const float* D, const float* dout, const float* qkv,
                                         const float* lse, DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  if (DROPOUT) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int kv = int(blockIdx.z) * warps + warp_index();
  if (kv >= T) return;
  const float *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out;
  // 1. The warp's key and value, a copy in each group of lanes. Each group has its own dk and dv, the sums over its own
  //    queries.
  const float4 key = load4<HS>(K + kv * row), value = load4<HS>(V + kv * row);
  const float scale = softmax_scale<HS>() * log2_e;
  float4 dk = {0, 0, 0, 0}, dv = {0, 0, 0, 0};
  for (int q0 = kv; q0 < T; q0 += 32) {
    // 2. Lane i: q . k and dout . v for query q0 + i. Lanes from `count` on get 0, and nonsense in step 3, where they
    //    take lse, D and draw of the last query; add_rows skips them.
    const int count = min(32, T - q0), q = min(q0 + lane(), T - 1);
    float weight = dot_with_rows<HS>(key, Q + q0 * row, row, count);         // q . k, not yet the weight
    float ds = dot_with_rows<HS>(value, dO + q0 * out_row, out_row, count);  // dP, not yet dS
    // 3. Of these, the weight after dropout and dS of the pair.
    const bool keep = !DROPOUT || attention_draw(drop, head.draw_head, q, kv, T) < drop.threshold;
    backward_weight<float>(weight, ds, scale, lse[head.bh * T + q] * log2_e, D[head.bh * T + q], keep, drop.keep_scale);
    // 4. dv += weights @ dout, dk += dS @ q
    add_rows<HS>(dv, weight, dO + q0 * out_row, out_row, count);
    add_rows<HS>(dk, ds, Q + q0 * row, row, count);
  }
  // 5. The factors that backward_weight leaves out.
  float* dK = dqkv + head.qkv + out_row + kv * row;
  store4<HS>(dK, dk, softmax_scale<HS>());
  store4<HS>(dK + out_row, dv, drop.keep_scale);
}
