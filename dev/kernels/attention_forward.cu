// Causal attention with dropout, forward, in bf16: out = dropout(softmax(q @ k^T / sqrt(HS))) @ v, where a query sees
// the keys up to its own. kernels/attention.h has the equations, doc/attention.md explains the shipped kernel.
//
// It reads and writes 51 MB, which an H100 copies in 17 us, and computes 3.2 GFLOP, 4 us of its tensor cores. A (T, T)
// matrix for each head would be 25 million numbers, 101 MB of floats, of which queries see one half.
//
//   1  three kernels, scores stored  Each does one step of the equation and leaves its result in memory. The scores, 50
//                                    MB, go there and back twice. In the first two kernels neighbouring threads read
//                                    rows, of keys or of scores, that lie far apart.
//   2  a warp has a query            No scores are stored: the warp goes through the keys 32 at a time, with a running
//                                    softmax. But each query loads all its keys and values for itself, and the float
//                                    units multiply.
//   3  the shipped kernel            A block has 128 queries, and each tile of keys and values that comes to shared
//                                    memory serves them all. The tensor cores multiply.
//   4  the other shipped kernel      A block has a whole head, of 256 tokens at most: warps need not wait for each
//                                    other at every tile, and all have the same work. With heads of 16 or 128 channels
//                                    version 3 runs instead. No card takes it yet: it is choice 2 in
//                                    kernels/choices.cuh, version 3 is choice 1.
//   5, 6  they store the masks       Versions 3 and 4, which also leave dropout's masks for backward, a bit for each
//                                    weight: choice 2 of attention_masks. What it costs here, versions 5 and 6 of
//                                    attention_backward have to gain.
#include "../../kernels/attention.cuh"
#include "../../kernels/attention.h"
#include "../../kernels/choices.cuh"
#include "lab.cuh"

namespace {

using attention::Head;

// Version 1, first kernel. Launched with (ceil(T / 128), T, B * NH) blocks of 128 threads: a thread has one score.
//   scores (B, NH, T, T) =, only for keys up to the query;  qkv (B, T, 3, NH, HS)
__global__ void scores_1(float* scores, const bf16* qkv, int T, int NH, int HS) {
  const int kv = blockIdx.x * 128 + threadIdx.x, q = blockIdx.y, bh = blockIdx.z;
  if (kv > q) return;
  const size_t row = size_t(3) * NH * HS;
  const bf16* const Q = qkv + size_t(bh / NH) * T * row + bh % NH * HS;
  const bf16* const K = Q + NH * HS;
  float dot = 0;
  for (int c = 0; c < HS; c++) dot += float(Q[q * row + c]) * float(K[kv * row + c]);
  scores[(size_t(bh) * T + q) * T + kv] = dot / sqrtf(HS);
}
// Second kernel. Launched with (ceil(T / 32), B * NH) blocks of 32 threads: a thread has one query.
//   scores (B, NH, T, T)   become weights after dropout;  lse (B, NH, T) =
__global__ void softmax_1(float* scores, float* lse, DeviceDropout drop, int T, int NH) {
  drop.read_step();
  const int q = blockIdx.x * 32 + threadIdx.x, bh = blockIdx.y;
  if (q >= T) return;
  float* const row = scores + (size_t(bh) * T + q) * T;
  float max = -INFINITY, sum = 0;
  for (int kv = 0; kv <= q; kv++) max = fmaxf(max, row[kv]);
  for (int kv = 0; kv <= q; kv++) sum += row[kv] = expf(row[kv] - max);
  const uint64_t draw_head = uint64_t(drop.first_row) * NH + bh;
  for (int kv = 0; kv <= q; kv++)
    row[kv] *= attention_draw(drop, draw_head, q, kv, T) < drop.threshold ? drop.keep_scale / sum : 0;
  lse[size_t(bh) * T + q] = max + logf(sum);
}
// Third kernel. Launched with (ceil(C / 128), B * T) blocks of 128 threads: a thread has one channel of one query.
//   out (B, T, NH, HS) =;  weights (B, NH, T, T), qkv (B, T, 3, NH, HS)
__global__ void out_1(bf16* out, const float* weights, const bf16* qkv, int T, int NH, int HS) {
  const int C = NH * HS, c = blockIdx.x * 128 + threadIdx.x, b = blockIdx.y / T, q = blockIdx.y % T;
  if (c >= C) return;
  const float* const row = weights + ((size_t(b) * NH + c / HS) * T + q) * T;
  const bf16* const V = qkv + size_t(b) * T * 3 * C + 2 * C + c;
  float sum = 0;
  for (int kv = 0; kv <= q; kv++) sum += row[kv] * float(V[size_t(kv) * 3 * C]);
  out[size_t(blockIdx.y) * C + c] = bf16(sum);
}

// Version 2. Launched with (NH, B, ceil(T / 4)) blocks of 128 threads: a warp has one query.
//   out (B, T, NH, HS) =, lse (B, NH, T) =;  qkv (B, T, 3, NH, HS)
// Lane i has the score and the weight of key k0 + i, and channels i, i + 32, ... of the output.
template <int HS>
__global__ void __launch_bounds__(128)
    attention_forward_2(bf16* out, float* lse, const bf16* qkv, DeviceDropout drop, int T, int NH) {
  drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int q = blockIdx.z * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (q >= T) return;  // the whole warp returns
  const bf16 *const Q = qkv + head.qkv + q * row, *const K = qkv + head.qkv + out_row, *const V = K + out_row;
  constexpr int each = (HS + 31) / 32;  // channels of a lane; with HS = 16, half of the lanes have none
  float max = -INFINITY, sum = 0, o[each] = {};
  for (int k0 = 0; k0 <= q; k0 += 32) {
    // 1. The lane's score. Keys after the query have no weight.
    const int kv = k0 + lane;
    float score = -INFINITY;
    if (kv <= q) {
      float dot = 0;
      for (int c = 0; c < HS; c += 8) {
        const Float8 x = load8(Q + c), y = load8(K + kv * row + c);
        for (int i = 0; i < 8; i++) dot += x[i] * y[i];
      }
      score = dot * attention::softmax_scale<HS>();
    }
    // 2. Running softmax: where the maximum has grown, the sums so far shrink.
    const float before = max;
    max = fmaxf(max, lane_max(score));
    const float shrink = expf(before - max);
    float weight = expf(score - max);
    sum = sum * shrink + lane_sum(weight);
    // 3. Dropout, after the sum: the denominator contains all weights.
    if (kv <= q && attention_draw(drop, head.draw_head, q, kv, T) >= drop.threshold) weight = 0;
    // 4. o += weights @ values, key after key.
    for (int j = 0; j < each; j++) o[j] *= shrink;
    for (int k = 0; k < min(32, q + 1 - k0); k++) {
      const float w = __shfl_sync(all_lanes, weight, k);
      for (int j = 0, c = lane; j < each && c < HS; j++, c += 32) o[j] += w * float(V[(k0 + k) * row + c]);
    }
  }
  // 5. Divide by the denominator, apply dropout's factor.
  for (int j = 0, c = lane; j < each && c < HS; j++, c += 32)
    out[head.out + q * out_row + c] = bf16(o[j] * drop.keep_scale / sum);
  if (lane == 0) lse[head.bh * T + q] = max + logf(sum);
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int B = s.B, T = s.T, C = s.C, NH = s.NH, HS = C / NH;
  const size_t count = size_t(s.rows()) * C, queries = size_t(B) * NH * T;
  const Dropout drop = {5, 6, site::attention_dropout + 2, dropout_threshold(0.2), 3};
  const lab::Array<bf16> qkv = lab.noise<bf16>(3 * count, 1, 1, true), out = lab.output<bf16>(count);
  const lab::Array<float> lse = lab.output<float>(queries), scores = lab.output<float>(queries * T);
  const lab::Array<unsigned char> mask = lab.output<unsigned char>(attention_counter(uint64_t(B) * NH, 0, 0, T));
  const lab::Array<int> step = lab.input(std::vector<int>{6});
  if (lab.checks()) {
    std::vector<double> want(count), sums(queries);
    reference::attention_forward(want.data(), sums.data(), qkv.values().data(), drop, B, T, C, NH);
    // One part is for rounding the output. The tensor cores' weights are rounded, too, but their errors are independent
    // and average out.
    out.expect(want, 3 * rounding_of<bf16>);
    lse.expect(sums, 4 * std::sqrt(std::max(T, HS)) * 0x1p-24);
  }
  lab.needs(4.0 * sizeof(bf16) * double(count) + 4.0 * double(queries), 2.0 * B * T * (T + 1) * C);
  const auto dropout = [=](int set) { return lab::on_device(drop, step[set]); };

  lab.version({1, "three kernels, scores stored", 4500}, [=](int set, cudaStream_t stream) {
    const int heads = B * NH;
    launch(scores_1, {dim3(ceil_div(T, 128), T, heads), 128, 0, stream}, scores[set], qkv[set], T, NH, HS);
    launch(softmax_1, {dim3(ceil_div(T, 32), heads), 32, 0, stream}, scores[set], lse[set], dropout(set), T, NH);
    launch(out_1, {dim3(ceil_div(C, 128), B * T), 128, 0, stream}, out[set], scores[set], qkv[set], T, NH, HS);
  });
  lab.version({2, "a warp has a query, running softmax", 500}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
      launch(kernel, {dim3(NH, B, ceil_div(T, 4)), 128, 0, stream}, out[set], lse[set], qkv[set], dropout(set), T, NH);
    };
    if (HS == 16)  // the lab's sizes have heads of 16 and 64
      run(attention_forward_2<16>);
    else
      run(attention_forward_2<64>);
  });
  // The shipped kernels: one version for each choice in choices.cuh, without and with stored masks.
  const auto shipped = [&](const lab::Version& version, int choice, bool stores) {
    lab.version(version, [=](int set, cudaStream_t stream) {
      const lab::Chosen chosen(choices().attention_forward, choice);
      attention_forward(out[set], lse[set], stores ? mask[set] : nullptr, qkv[set], dropout(set), B, T, C, NH, stream);
    });
  };
  shipped({3, "shipped: tiles of keys, tensor cores", 37, 1}, 1, false);
  shipped({4, "shipped: a block has a whole head", 28, 2}, 2, false);
  shipped({5, "shipped: version 3, stores the masks", 38}, 1, true);
  shipped({6, "shipped: version 4, stores the masks", 29}, 2, true);
}
const lab::Listed listed({"attention_forward", describe, {{2, 31, 48, 3}, {1, 1, 64, 1}, {1, 70, 128, 2}}});

}  // namespace
