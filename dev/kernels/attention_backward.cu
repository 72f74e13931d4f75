// Causal attention with dropout, backward, in bf16: the gradient of queries, keys and values from dout, the gradient of
// the output. P are the weights, computed again from forward's lse (the logarithm of the softmax's denominator); m is
// the mask, 0 or dropout's scale; D = dout . out of each query:
//
//   dP = dout @ v^T      dS = P (m dP - D) / sqrt(HS)      dq = dS @ k      dk = dS^T @ q      dv = (m P)^T @ dout
//
// It reads and writes 101 MB, which an H100 copies in 34 us, and computes 8.1 GFLOP, 10 us of its tensor cores. Two (T,
// T) matrices for each head would be 201 MB of floats, of which queries see one half. A query's dq is a sum over keys,
// a key's dk and dv are sums over queries; no version adds with atomics, so that runs repeat bit for bit.
//
//   1  three kernels, weights stored  The first computes D; the second, m P and dS of each pair of a query and a key,
//                                     which go to memory; the third, the gradients from them. In the second,
//                                     neighbouring threads read rows that lie far apart.
//   2  nothing stored                 A warp has a query and goes through its keys for dq. In a second kernel, a warp
//                                     has a key and goes through its queries for dk and dv. Both compute the weights.
//                                     But each warp loads all the rows that it needs for itself, and float units
//                                     multiply.
//   3  the shipped kernels            The same two, but a block has 64 queries, or 64 keys: a tile that comes to shared
//                                     memory serves them all. The tensor cores multiply.
//   4  the other shipped kernel       A block has a whole head, of 64 channels and at most 256 tokens, and computes the
//                                     weights once: dS goes to shared memory, from where the block sums dq. With other
//                                     heads version 3 runs instead. No card takes it yet: it is choice 2 in
//                                     kernels/choices.cuh, version 3 is choice 1.
//   5, 6  they read the masks         Versions 3 and 4, but dropout's masks are not drawn again: forward has stored them,
//                                     a bit for each weight. That is choice 2 of attention_masks.
#include "../../kernels/attention.cuh"
#include "../../kernels/attention.h"
#include "../../kernels/choices.cuh"
#include "lab.cuh"

namespace {

using attention::Head;

// Version 1, first kernel. Launched with (ceil(T / 32), B * NH) blocks of 32 threads: a thread has one query.
//   D (B, NH, T) =;  dout, out (B, T, NH, HS)
__global__ void D_1(float* D, const bf16* dout, const bf16* out, int T, int NH, int HS) {
  const int q = blockIdx.x * 32 + threadIdx.x, bh = blockIdx.y;
  if (q >= T) return;
  const size_t at = (size_t(bh / NH * T + q) * NH + bh % NH) * HS;
  float dot = 0;
  for (int c = 0; c < HS; c++) dot += float(dout[at + c]) * float(out[at + c]);
  D[size_t(bh) * T + q] = dot;
}
// Second kernel. Launched with (ceil(T / 128), T, B * NH) blocks of 128 threads: a thread has one query and one key.
//   weights, dS (B, NH, T, T) = m P and dS, only for keys up to the query
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse, D (B, NH, T)
__global__ void weights_1(float* weights, float* dS, const bf16* dout, const bf16* qkv, const float* lse,
                          const float* D, DeviceDropout drop, int T, int NH, int HS) {
  drop.read_step();
  const int kv = blockIdx.x * 128 + threadIdx.x, q = blockIdx.y, bh = blockIdx.z, C = NH * HS;
  if (kv > q) return;
  const size_t row = size_t(3) * C, first = size_t(bh / NH) * T * row + bh % NH * HS;
  const bf16 *const Q = qkv + first + q * row, *const K = qkv + first + kv * row + C, *const V = K + C;
  const bf16* const dO = dout + size_t(bh / NH * T + q) * C + bh % NH * HS;
  float dot = 0, dP = 0;
  for (int c = 0; c < HS; c++) dot += float(Q[c]) * float(K[c]), dP += float(dO[c]) * float(V[c]);
  const float scale = 1 / sqrtf(HS), P = expf(dot * scale - lse[size_t(bh) * T + q]);
  const uint64_t draw_head = uint64_t(drop.first_row) * NH + bh;
  const float m = attention_draw(drop, draw_head, q, kv, T) < drop.threshold ? drop.keep_scale : 0;
  const size_t at = (size_t(bh) * T + q) * T + kv;
  weights[at] = m * P;
  dS[at] = P * (m * dP - D[size_t(bh) * T + q]) * scale;
}
// Third kernel. Launched with (ceil(C / 128), B * T) blocks of 128 threads: a thread has one channel of one token, and
// computes its dq, dk and dv.
//   dqkv (B, T, 3, NH, HS) =;  weights, dS (B, NH, T, T), dout (B, T, NH, HS), qkv (B, T, 3, NH, HS)
__global__ void gradients_1(bf16* dqkv, const float* weights, const float* dS, const bf16* dout, const bf16* qkv, int T,
                            int NH, int HS) {
  const int C = NH * HS, c = blockIdx.x * 128 + threadIdx.x, b = blockIdx.y / T, t = blockIdx.y % T;
  if (c >= C) return;
  const size_t row = size_t(3) * C, matrix = (size_t(b) * NH + c / HS) * T * T;
  const bf16 *const Q = qkv + size_t(b) * T * row + c, *const K = Q + C, *const dO = dout + size_t(b) * T * C + c;
  float dq = 0, dk = 0, dv = 0;
  for (int kv = 0; kv <= t; kv++) dq += dS[matrix + size_t(t) * T + kv] * float(K[kv * row]);
  for (int q = t; q < T; q++) {
    dk += dS[matrix + size_t(q) * T + t] * float(Q[q * row]);
    dv += weights[matrix + size_t(q) * T + t] * float(dO[size_t(q) * C]);
  }
  bf16* const to = dqkv + blockIdx.y * row + c;
  to[0] = bf16(dq), to[C] = bf16(dk), to[2 * C] = bf16(dv);
}

// ---------------------------------------------------------------------------------------------------------------------
// Version 2: two kernels, each launched with (NH, B, ceil(T / 4)) blocks of 128 threads. A warp has one query (or key)
// and takes 32 keys (or queries) at a time. Lane i computes weight and dS for number i of the 32. Of the sums it has
// channels i, i + 32, ...; with HS = 16, half of the lanes have none.
template <int HS>
constexpr int each = (HS + 31) / 32;

// x . y, both (HS)
template <int HS>
__device__ inline float dot_product(const bf16* x, const bf16* y) {
  float sum = 0;
  for (int c = 0; c < HS; c += 8) {
    const Float8 a = load8(x + c), b = load8(y + c);
    for (int i = 0; i < 8; i++) sum += a[i] * b[i];
  }
  return sum;
}
// sum (HS) += weight_0 * row 0 + weight_1 * row 1 + ..., where lane i has weight_i. rows (count, HS) are `stride`
// elements apart
template <int HS>
__device__ inline void add_rows(float (&sum)[each<HS>], float weight, const bf16* rows, size_t stride, int count) {
  for (int k = 0; k < count; k++) {
    const float w = __shfl_sync(all_lanes, weight, k);
    for (int j = 0, c = threadIdx.x % 32; j < each<HS> && c < HS; j++, c += 32)
      sum[j] += w * float(rows[k * stride + c]);
  }
}
// to (HS) = factor * sum
template <int HS>
__device__ inline void store(bf16* to, const float (&sum)[each<HS>], float factor) {
  for (int j = 0, c = threadIdx.x % 32; j < each<HS> && c < HS; j++, c += 32) to[c] = bf16(factor * sum[j]);
}

// First kernel: a warp has one query, its D and its dq.
//   dqkv (B, T, 3, NH, HS)  dq is written;  D (B, NH, T) =
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T)
template <int HS>
__global__ void __launch_bounds__(128) queries_2(bf16* dqkv, float* D, const bf16* dout, const bf16* qkv,
                                                 const bf16* out, const float* lse, DeviceDropout drop, int T, int NH) {
  drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int q = blockIdx.z * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (q >= T) return;  // the whole warp returns
  const bf16 *const Q = qkv + head.qkv + q * row, *const K = qkv + head.qkv + out_row, *const V = K + out_row;
  const bf16 *const dO = dout + head.out + q * out_row, *const O = out + head.out + q * out_row;
  // 1. D of the query.
  const float D_of_q = lane_sum(lane < HS / 8 ? dot_product<8>(dO + lane * 8, O + lane * 8) : 0);
  const float lse_of_q = lse[head.bh * T + q] * attention::log2_e;
  if (lane == 0) D[head.bh * T + q] = D_of_q;
  float dq[each<HS>] = {};
  for (int k0 = 0; k0 <= q; k0 += 32) {
    // 2. The lane's key: backward_weight makes the weight, which is not needed here, and dS of q . k and dout . v.
    const int kv = k0 + lane, count = min(32, q + 1 - k0);
    float weight = 0, ds = 0;
    if (kv <= q) {
      weight = dot_product<HS>(Q, K + kv * row), ds = dot_product<HS>(dO, V + kv * row);
      const bool keep = attention_draw(drop, head.draw_head, q, kv, T) < drop.threshold;
      attention::backward_weight<bf16>(weight, ds, attention::softmax_scale<HS>() * attention::log2_e, lse_of_q, D_of_q,
                                       keep, drop.keep_scale);
    }
    // 3. dq += dS @ k
    add_rows<HS>(dq, ds, K + k0 * row, row, count);
  }
  store<HS>(dqkv + head.qkv + q * row, dq, attention::softmax_scale<HS>());  // the factor that backward_weight left out
}

// Second kernel, after the first: a warp has one key, its dk and its dv.
//   dqkv (B, T, 3, NH, HS)  dk and dv are written
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse, D (B, NH, T)
template <int HS>
__global__ void __launch_bounds__(128) keys_2(bf16* dqkv, const float* D, const bf16* dout, const bf16* qkv,
                                              const float* lse, DeviceDropout drop, int T, int NH) {
  drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int kv = blockIdx.z * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (kv >= T) return;
  const bf16 *const Q = qkv + head.qkv, *const K = Q + out_row + kv * row, *const V = K + out_row;
  const bf16* const dO = dout + head.out;
  float dk[each<HS>] = {}, dv[each<HS>] = {};
  for (int q0 = kv; q0 < T; q0 += 32) {
    // 1. The lane's query: backward_weight makes the weight after dropout and dS of q . k and dout . v.
    const int q = q0 + lane, count = min(32, T - q0);
    float weight = 0, ds = 0;
    if (q < T) {
      weight = dot_product<HS>(Q + q * row, K), ds = dot_product<HS>(dO + q * out_row, V);
      const bool keep = attention_draw(drop, head.draw_head, q, kv, T) < drop.threshold;
      attention::backward_weight<bf16>(weight, ds, attention::softmax_scale<HS>() * attention::log2_e,
                                       lse[head.bh * T + q] * attention::log2_e, D[head.bh * T + q], keep,
                                       drop.keep_scale);
    }
    // 2. dk += dS^T @ q, dv += weights^T @ dout
    add_rows<HS>(dk, ds, Q + q0 * row, row, count);
    add_rows<HS>(dv, weight, dO + q0 * out_row, out_row, count);
  }
  // 3. The factors that backward_weight leaves out.
  bf16* const dK = dqkv + head.qkv + out_row + kv * row;
  store<HS>(dK, dk, attention::softmax_scale<HS>());
  store<HS>(dK + out_row, dv, drop.keep_scale);
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int B = s.B, T = s.T, C = s.C, NH = s.NH, HS = C / NH;
  const size_t count = size_t(s.rows()) * C, queries = size_t(B) * NH * T;
  const Dropout drop = {5, 6, site::attention_dropout + 2, dropout_threshold(0.2), 3};
  const lab::Array<bf16> qkv = lab.noise<bf16>(3 * count, 1), dout = lab.noise<bf16>(count, 2, 1, true);
  // What forward leaves. Where nothing is checked any numbers will do: the time does not depend on them.
  std::vector<double> want_out(lab.checks() ? count : 0), want_lse(lab.checks() ? queries : 0);
  if (lab.checks())
    reference::attention_forward(want_out.data(), want_lse.data(), qkv.values().data(), drop, B, T, C, NH);
  const lab::Array<bf16> out =
      lab.checks() ? lab.input(std::vector<bf16>(want_out.begin(), want_out.end())) : lab.noise<bf16>(count, 3, 0.2);
  const lab::Array<float> lse =
      lab.checks() ? lab.input(std::vector<float>(want_lse.begin(), want_lse.end())) : lab.noise<float>(queries, 4);
  // Dropout's masks, as forward stores them: byte c has the draws of call c, heads counted from the first of this batch.
  std::vector<unsigned char> bits(attention_counter(uint64_t(B) * NH, 0, 0, T));
  for (size_t c = 0; c < bits.size(); c++) {
    const uint64_t before = attention_counter(uint64_t(drop.first_row) * NH, 0, 0, T);
    const Philox4 draws = random4(drop.seed, drop.step, drop.site, before + c);
    for (int i = 0; i < 8; i++) bits[c] |= (draw_of(draws, i) < drop.threshold) << i;
  }
  const lab::Array<unsigned char> mask = lab.input(bits);
  const lab::Array<int> step = lab.input(std::vector<int>{6});
  const lab::Array<bf16> dqkv = lab.output<bf16>(3 * count);
  // What the kernels leave for each other.
  const lab::Array<float> D = lab.output<float>(queries), weights = lab.output<float>(queries * T),
                          dS = lab.output<float>(queries * T);
  if (lab.checks()) {
    std::vector<double> want(3 * count);
    reference::attention_backward(want.data(), dout.values().data(), qkv.values().data(), out.values().data(),
                                  lse.values().data(), drop, B, T, C, NH);
    // One part is for rounding the gradient. The tensor cores' weights and dS are rounded, too, but their errors are
    // independent. Together they come to 2.7 parts at these sizes.
    dqkv.expect(want, 4 * rounding_of<bf16>);
  }
  lab.needs(8.0 * sizeof(bf16) * double(count) + 4.0 * double(queries), 5.0 * B * T * (T + 1) * C);
  const auto dropout = [=](int set) { return lab::on_device(drop, step[set]); };

  lab.version({1, "three kernels, weights stored", 9000}, [=](int set, cudaStream_t stream) {
    const int heads = B * NH;
    launch(D_1, {dim3(ceil_div(T, 32), heads), 32, 0, stream}, D[set], dout[set], out[set], T, NH, HS);
    launch(weights_1, {dim3(ceil_div(T, 128), T, heads), 128, 0, stream}, weights[set], dS[set], dout[set], qkv[set],
           lse[set], D[set], dropout(set), T, NH, HS);
    launch(gradients_1, {dim3(ceil_div(C, 128), B * T), 128, 0, stream}, dqkv[set], weights[set], dS[set], dout[set],
           qkv[set], T, NH, HS);
  });
  lab.version({2, "nothing stored, a warp has a query or a key", 1800}, [=](int set, cudaStream_t stream) {
    const auto run = [&](auto queries_kernel, auto keys_kernel) {
      const LaunchConfig config = {dim3(NH, B, ceil_div(T, 4)), 128, 0, stream};
      launch(queries_kernel, config, dqkv[set], D[set], dout[set], qkv[set], out[set], lse[set], dropout(set), T, NH);
      launch(keys_kernel, config, dqkv[set], D[set], dout[set], qkv[set], lse[set], dropout(set), T, NH);
    };
    if (HS == 16)  // the lab's sizes have heads of 16 and 64
      run(queries_2<16>, keys_2<16>);
    else
      run(queries_2<64>, keys_2<64>);
  });
  // The shipped kernels: one version for each choice in choices.cuh, without and with stored masks.
  const auto shipped = [&](const lab::Version& version, int choice, bool reads) {
    lab.version(version, [=](int set, cudaStream_t stream) {
      const lab::Chosen chosen(choices().attention_backward, choice);
      attention_backward(dqkv[set], D[set], dout[set], qkv[set], out[set], lse[set], reads ? mask[set] : nullptr,
                         dropout(set), B, T, C, NH, stream);
    });
  };
  shipped({3, "shipped: tiles, tensor cores, two kernels", 102, 1}, 1, false);
  shipped({4, "shipped: a block has a whole head, one kernel", 55, 2}, 2, false);
  shipped({5, "shipped: version 3, reads the masks", 92}, 1, true);
  shipped({6, "shipped: version 4, reads the masks", 49}, 2, true);
}
const lab::Listed listed({"attention_backward", describe, {{2, 31, 48, 3}, {1, 1, 64, 1}, {1, 70, 128, 2}}});

}  // namespace
