// Causal multi-head self-attention with dropout on the weights:
//   P = softmax(q @ k^T / sqrt(HS), keys up to the query),  out = dropout(P) @ v
// Vaswani et al., "Attention Is All You Need", 2017, equation 1. No (T, T) matrix outlives its block of queries:
// backward computes P again from q, k and the logarithm of the softmax's denominator, as in Dao et al.,
// "FlashAttention", 2022, section 3.1.
// defines: attention_forward, attention_backward, their reference:: loops
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "dropout.h"
#include "matmul.h"
#include "simd.h"

namespace reference {

// out (B, T, C) =, lse (B, NH, T) =; qkv (B, T, 3, NH, HS)
template <class Real>
void attention_forward(Real* out, Real* lse, const Real* qkv, const Dropout& drop, int B, int T, int C, int NH) {
  const int HS = C / NH;
  const Real scale = 1 / std::sqrt(Real(HS)), kept = Real(dropout_scale(drop.threshold));
  std::unique_ptr<Real[]> weights(new Real[T]);
  for (int b = 0; b < B; b++)
    for (int h = 0; h < NH; h++)
      for (int q = 0; q < T; q++) {
        const Real *query = qkv + size_t(b * T + q) * 3 * C + h * HS, *keys = qkv + size_t(b * T) * 3 * C + C + h * HS;
        const Real* values = keys + C;
        Real max = -std::numeric_limits<Real>::infinity(), sum = 0;
        for (int kv = 0; kv <= q; kv++) {
          Real dot = 0;
          for (int i = 0; i < HS; i++) dot += query[i] * keys[size_t(kv) * 3 * C + i];
          weights[kv] = dot * scale;
          max = std::max(max, weights[kv]);
        }
        for (int kv = 0; kv <= q; kv++) sum += weights[kv] = std::exp(weights[kv] - max);
        Real* row = out + size_t(b * T + q) * C + h * HS;
        std::fill(row, row + HS, Real(0));
        for (int kv = 0; kv <= q; kv++) {
          if (attention_draw(drop, uint64_t(drop.first_row + b) * NH + h, q, kv, T) >= drop.threshold) continue;
          for (int i = 0; i < HS; i++) row[i] += weights[kv] / sum * kept * values[size_t(kv) * 3 * C + i];
        }
        lse[size_t(b * NH + h) * T + q] = max + std::log(sum);
      }
}

// dqkv (B, T, 3, NH, HS) =; dout (B, T, C), qkv, out (B, T, C), lse (B, NH, T)
// With P the weights, m the mask (0 or the scale), dP = m * (dout @ v^T) and D = sum_kv P * dP = dout . out:
//   dv = (m * P)^T @ dout,  dS = P * (dP - D) / sqrt(HS),  dq = dS @ k,  dk = dS^T @ q
template <class Real>
void attention_backward(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const Real* lse,
                        const Dropout& drop, int B, int T, int C, int NH) {
  const int HS = C / NH;
  const Real scale = 1 / std::sqrt(Real(HS)), kept = Real(dropout_scale(drop.threshold));
  std::fill(dqkv, dqkv + size_t(B) * T * 3 * C, Real(0));
  for (int b = 0; b < B; b++)
    for (int h = 0; h < NH; h++)
      for (int q = 0; q < T; q++) {
        const size_t at_query = size_t(b * T + q) * 3 * C + h * HS, row = size_t(b * T + q) * C + h * HS;
        Real D = 0;
        for (int i = 0; i < HS; i++) D += dout[row + i] * out[row + i];
        for (int kv = 0; kv <= q; kv++) {
          const size_t at_key = size_t(b * T + kv) * 3 * C + C + h * HS, at_value = at_key + C;
          Real dot = 0, dP = 0;
          for (int i = 0; i < HS; i++) {
            dot += qkv[at_query + i] * qkv[at_key + i];
            dP += dout[row + i] * qkv[at_value + i];
          }
          const bool keep = attention_draw(drop, uint64_t(drop.first_row + b) * NH + h, q, kv, T) < drop.threshold;
          const Real mask = keep ? kept : Real(0), P = std::exp(dot * scale - lse[size_t(b * NH + h) * T + q]);
          const Real dS = P * (mask * dP - D) * scale;
          for (int i = 0; i < HS; i++) {
            dqkv[at_value + i] += mask * P * dout[row + i];
            dqkv[at_query + i] += dS * qkv[at_key + i];
            dqkv[at_key + i] += dS * qkv[at_query + i];
          }
        }
      }
}

}  // namespace reference

// ---------------------------------------------------------------------------------------------------------------------
// The blocked version. A thread takes one head of one batch row, packs its keys and values once (kernels/matmul.h), and
// goes through the queries in blocks; keys beyond a block's last query are never touched.

namespace attention {

constexpr int QB = 48;  // queries of a block: a multiple of the product's row tile and of draw_block

template <class Real>
int padded(int T) {
  return (T + product::NR<Real> - 1) / product::NR<Real> * product::NR<Real>;
}

// draws (rows, draws_row(T)) for the queries q0 ... q0 + rows - 1 and the keys up to the last of them; q0 is a multiple
// of 16. Whole blocks of keys are written, so a row has room for them whatever the width of a vector.
inline size_t draws_row(int T) { return size_t(T + draw_block - 1) / draw_block * draw_block; }
inline void block_draws(uint16_t* draws, const Dropout& drop, uint64_t bh, int q0, int rows, int T) {
  for (int q = q0; q < q0 + rows; q += draw_block)
    for (int kv = 0; kv < std::min(q + draw_block, q0 + rows); kv += draw_block) {
      uint32_t words[4][32];
      random4_lanes(words, drop.seed, drop.step, drop.site, attention_counter(bh, q, kv, T));
      for (int i = 0; i < std::min(draw_block, q0 + rows - q); i++) {  // four words hold eight neighbouring keys
        uint16_t* row = draws + (q - q0 + i) * draws_row(T) + kv;
        std::memcpy(row, &words[i / 8][i % 8 * 4], 16);
        std::memcpy(row + 8, &words[2 + i / 8][i % 8 * 4], 16);
      }
    }
}

}  // namespace attention

// out (B, T, C) =, lse (B, NH, T) =; qkv (B, T, 3, NH, HS)
// With first > 0 (B = 1, no dropout) only the queries first ... T - 1 are computed, out (T - first, C): the earlier
// rows of qkv serve as cached keys and values. A query's result does not depend on which others are computed with it.
template <class Real>
void attention_forward(Real* out, Real* lse, const Real* qkv, const Dropout& drop, int B, int T, int C, int NH,
                       int first = 0) {
  using namespace attention;
  constexpr int W = lanes<Real>;
  const int HS = C / NH, TP = padded<Real>(T), ld = TP + W;
  const Real scale = 1 / std::sqrt(Real(HS)), kept = Real(dropout_scale(drop.threshold));
#pragma omp parallel for schedule(dynamic) if (size_t(B) * T * T * C > 8 * worth_threads)
  for (int bh = 0; bh < B * NH; bh++) {
    const int b = bh / NH, h = bh % NH;
    const Real *Q = qkv + size_t(b) * T * 3 * C + h * HS, *K = Q + C, *V = K + C;
    struct Keys;
    struct Values;
    struct Weights;
    struct Draws;
    Real* k_packed = scratch<Keys, Real>(product::packed_size<Real>(HS, T));
    Real* v_packed = scratch<Values, Real>(product::packed_size<Real>(T, HS));
    Real* P = scratch<Weights, Real>(size_t(QB) * ld);
    uint16_t* draws = scratch<Draws, uint16_t>(QB * draws_row(T));
    product::pack_b<Real>(k_packed, {K, 1, size_t(3 * C)}, HS, T);
    product::pack_b<Real>(v_packed, {V, size_t(3 * C), 1}, T, HS);
    for (int q0 = first; q0 < T; q0 += QB) {
      const int rows = std::min(QB, T - q0), keys = q0 + rows;
      product::multiply_packed<Real>(P, ld, {}, {Q + size_t(q0) * 3 * C, size_t(3 * C), 1}, k_packed,
                                     size_t(HS) * product::NR<Real>, rows, padded<Real>(keys), HS);
      if (drop.active()) block_draws(draws, drop, uint64_t(drop.first_row + b) * NH + h, q0, rows, T);
      for (int i = 0; i < rows; i++) {
        Real* p = P + size_t(i) * ld;
        const int visible = q0 + i + 1;
        for (int kv = visible; kv % W != 0; kv++) p[kv] = -std::numeric_limits<Real>::infinity();
        Vec<Real> max = load(p);
        for (int kv = W; kv < visible; kv += W) {
          const Vec<Real> x = load(p + kv);
          max = x > max ? x : max;
        }
        const Real top = horizontal_max<Real>(max) * scale;
        Vec<Real> sums{};
        for (int kv = 0; kv < visible; kv += W) {
          const Vec<Real> e = exp_vec(load(p + kv) * scale - top);
          sums += e;
          store(p + kv, e);
        }
        const Real sum = horizontal_sum<Real>(sums), norm = (drop.active() ? kept : Real(1)) / sum;
        lse[size_t(bh) * T + q0 + i] = top + std::log(sum);
        const uint16_t* draw = draws + i * draws_row(T);
        if (drop.active())
          for (int kv = 0; kv < visible; kv++) p[kv] = draw[kv] < drop.threshold ? p[kv] * norm : Real(0);
        else
          for (int kv = 0; kv < visible; kv++) p[kv] *= norm;
        std::fill(p + visible, p + keys, Real(0));
      }
      product::multiply_packed<Real>(out + (size_t(b) * (T - first) + q0 - first) * C + h * HS, C, {},
                                     {P, size_t(ld), 1}, v_packed, size_t(T) * product::NR<Real>, rows, HS, keys);
    }
  }
}

// dqkv (B, T, 3, NH, HS) =; dout (B, T, C), qkv, out (B, T, C), lse (B, NH, T); the equations stand at the reference
template <class Real>
void attention_backward(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const Real* lse,
                        const Dropout& drop, int B, int T, int C, int NH) {
  using namespace attention;
  constexpr int W = lanes<Real>;
  const int HS = C / NH, TP = padded<Real>(T), ld = TP + W;
  const size_t row = size_t(3) * C, by_channel = size_t(HS) * product::NR<Real>;
  const Real scale = 1 / std::sqrt(Real(HS)), kept = Real(dropout_scale(drop.threshold));
#pragma omp parallel for schedule(dynamic) if (size_t(B) * T * T * C > 8 * worth_threads)
  for (int bh = 0; bh < B * NH; bh++) {
    const int b = bh / NH, h = bh % NH;
    const size_t head = size_t(b) * T * row + h * HS;
    const Real *Q = qkv + head, *K = Q + C, *V = K + C;
    const Real *dO = dout + size_t(b) * T * C + h * HS, *O = out + size_t(b) * T * C + h * HS;
    Real *dQ = dqkv + head, *dK = dQ + C, *dV = dK + C;
    struct KeysByChannel;
    struct ValuesByChannel;
    struct Keys;
    struct Block;
    struct Weights;
    struct Gradients;
    struct Draws;
    Real* kt_packed = scratch<KeysByChannel, Real>(product::packed_size<Real>(HS, T));
    Real* vt_packed = scratch<ValuesByChannel, Real>(product::packed_size<Real>(HS, T));
    Real* k_packed = scratch<Keys, Real>(product::packed_size<Real>(T, HS));
    Real* block_packed = scratch<Block, Real>(product::packed_size<Real>(QB, HS));
    Real* P = scratch<Weights, Real>(size_t(QB) * ld);
    Real* dP = scratch<Gradients, Real>(size_t(QB) * ld);
    uint16_t* draws = scratch<Draws, uint16_t>(QB * draws_row(T));
    product::pack_b<Real>(kt_packed, {K, 1, row}, HS, T);
    product::pack_b<Real>(vt_packed, {V, 1, row}, HS, T);
    product::pack_b<Real>(k_packed, {K, row, 1}, T, HS);
    for (int t = 0; t < T; t++) {
      std::fill(dK + t * row, dK + t * row + HS, Real(0));
      std::fill(dV + t * row, dV + t * row + HS, Real(0));
    }
    for (int q0 = 0; q0 < T; q0 += QB) {
      const int rows = std::min(QB, T - q0), keys = q0 + rows, columns = padded<Real>(keys);
      const Real *Qb = Q + q0 * row, *dOb = dO + size_t(q0) * C, *Ob = O + size_t(q0) * C;
      product::multiply_packed<Real>(P, ld, {}, {Qb, row, 1}, kt_packed, by_channel, rows, columns, HS);
      product::multiply_packed<Real>(dP, ld, {}, {dOb, size_t(C), 1}, vt_packed, by_channel, rows, columns, HS);
      if (drop.active()) block_draws(draws, drop, uint64_t(drop.first_row + b) * NH + h, q0, rows, T);
      for (int i = 0; i < rows; i++) {
        Real *p = P + size_t(i) * ld, *dp = dP + size_t(i) * ld;
        const uint16_t* draw = draws + i * draws_row(T);
        const int visible = q0 + i + 1;
        const Real log_sum = lse[size_t(bh) * T + q0 + i];
        Real D = 0;
#pragma omp simd reduction(+ : D)
        for (int c = 0; c < HS; c++) D += dOb[size_t(i) * C + c] * Ob[size_t(i) * C + c];
        for (int kv = 0; kv < visible; kv += W) store(p + kv, exp_vec(load(p + kv) * scale - log_sum));
        if (drop.active())
          for (int kv = 0; kv < visible; kv++) {
            const Real mask = draw[kv] < drop.threshold ? kept : Real(0), weight = p[kv];
            dp[kv] = weight * (mask * dp[kv] - D) * scale;
            p[kv] = mask * weight;
          }
        else
          for (int kv = 0; kv < visible; kv++) dp[kv] = p[kv] * (dp[kv] - D) * scale;
        std::fill(p + visible, p + keys, Real(0));
        std::fill(dp + visible, dp + keys, Real(0));
      }
      product::multiply_packed<Real>(dQ + q0 * row, row, {}, {dP, size_t(ld), 1}, k_packed,
                                     size_t(T) * product::NR<Real>, rows, HS, keys);
      const size_t panel = size_t(rows) * product::NR<Real>;
      product::pack_b<Real>(block_packed, {Qb, row, 1}, rows, HS);
      product::multiply_packed<Real>(dK, row, {dK, row}, {dP, 1, size_t(ld)}, block_packed, panel, keys, HS, rows);
      product::pack_b<Real>(block_packed, {dOb, size_t(C), 1}, rows, HS);
      product::multiply_packed<Real>(dV, row, {dV, row}, {P, 1, size_t(ld)}, block_packed, panel, keys, HS, rows);
    }
  }
}
