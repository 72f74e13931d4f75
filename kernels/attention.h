// Causal multi-head self-attention with dropout on the weights:
//   P = softmax(q @ k^T / sqrt(HS), keys up to the query),  out = dropout(P) @ v
// Vaswani et al., "Attention Is All You Need", 2017, equation 1. No (T, T) matrix is stored, only the rows of a block
// of queries while it is computed. Backward computes P again, from q, k and the logarithm of the softmax's denominator
// (lse), as in Dao et al., "FlashAttention", 2022, section 3.1.
// defines: attention_forward, attention_backward, their reference:: loops
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "dropout.h"
#include "product.h"
#include "simd.h"

namespace reference {

// out (B, T, C) =, lse (B, NH, T) =; qkv (B, T, 3, NH, HS)
template <class Real>
void attention_forward(Real* out, Real* lse, const Real* qkv, const Dropout& drop, int B, int T, int C, int NH) {
  const int HS = C / NH;
  const Real scale = 1 / std::sqrt(Real(HS)), keep_scale = Real(dropout_scale(drop.threshold));
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
          for (int i = 0; i < HS; i++) row[i] += weights[kv] / sum * keep_scale * values[size_t(kv) * 3 * C + i];
        }
        lse[size_t(b * NH + h) * T + q] = max + std::log(sum);
      }
}

// dqkv (B, T, 3, NH, HS) =; dout (B, T, C), qkv (B, T, 3, NH, HS), out (B, T, C), lse (B, NH, T)
// With P the weights, m the mask (0 or the scale), dP = dout @ v^T and D = sum_kv P * m * dP = dout . out:
//   dv = (m * P)^T @ dout,  dS = P * (m * dP - D) / sqrt(HS),  dq = dS @ k,  dk = dS^T @ q
template <class Real>
void attention_backward(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const Real* lse,
                        const Dropout& drop, int B, int T, int C, int NH) {
  const int HS = C / NH;
  const Real scale = 1 / std::sqrt(Real(HS)), keep_scale = Real(dropout_scale(drop.threshold));
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
          const Real mask = keep ? keep_scale : Real(0), P = std::exp(dot * scale - lse[size_t(b * NH + h) * T + q]);
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
// The blocked version. A thread takes one head of one batch row, packs its keys and values once (product.h), and goes
// through the queries in blocks. Tiles of keys that come after all queries of a tile are skipped. Factor is the type of
// the products' operands (factors.h); the softmax is computed in Real.

namespace attention {

constexpr int QB = 96;  // queries of a block: a multiple of the product's row tile and of draw_block

// T keys, rounded up to whole panels.
template <class Real>
int padded(int T) {
  return (T + product::NR<Real> - 1) / product::NR<Real> * product::NR<Real>;
}

// x (M, K), whose rows are `row` numbers apart, as a product's left operand. It is read in place if Factor is its own
// type, else copied to `memory` (packed_a_size(M, K)) and rounded.
template <class Factor>
product::PackedA<Factor> left_operand(Unit<Factor>* memory, const Sum<Factor>* x, size_t row, int M, int K) {
  if constexpr (std::is_same_v<Unit<Factor>, Sum<Factor>>)
    return {x, row, 1, product::MR * row};
  else
    return product::pack_a<Factor>(memory, {x, row, 1}, M, K);
}

}  // namespace attention

// out (B, T, C) =, lse (B, NH, T) =; qkv (B, T, 3, NH, HS)
// With first > 0, which needs B = 1 and no dropout, only the queries first ... T - 1 are computed, and out is
// (T - first, C). The earlier rows of qkv serve as cached keys and values. A query's result does not depend on which
// others are computed with it.
template <class Real, class Factor = Real>
void attention_forward(Real* out, Real* lse, const Real* qkv, const Dropout& drop, int B, int T, int C, int NH,
                       int first = 0) {
  using namespace attention;
  using namespace product;
  constexpr int W = lanes<Real>;
  const int HS = C / NH, ld = padded<Factor>(T) + W;
  const size_t by_channel = packed_size<Factor>(HS, NR<Factor>), by_key = packed_size<Factor>(T, NR<Factor>);
  const Real scale = 1 / std::sqrt(Real(HS)),
             keep_scale = drop.active() ? Real(dropout_scale(drop.threshold)) : Real(1);
#pragma omp parallel for schedule(dynamic) if (size_t(B) * T * T * C > 8 * worth_threads)
  for (int bh = 0; bh < B * NH; bh++) {
    [[maybe_unused]] const Registers<Factor> registers{};
    const int b = bh / NH, h = bh % NH;
    const size_t row = size_t(3) * C;
    const Real *Q = qkv + b * T * row + h * HS, *K = Q + C, *V = K + C;
    // Tags for scratch(), see simd.h.
    struct Keys;
    struct Values;
    struct Left;
    struct Weights;
    struct Draws;
    Unit<Factor>* k_packed = scratch<Keys, Unit<Factor>>(packed_size<Factor>(HS, T));
    Unit<Factor>* v_packed = scratch<Values, Unit<Factor>>(packed_size<Factor>(T, HS));
    Unit<Factor>* a = scratch<Left, Unit<Factor>>(packed_a_size<Factor>(QB, std::max(T, HS)));
    Real* P = scratch<Weights, Real>(size_t(QB) * ld);
    uint16_t* draws = scratch<Draws, uint16_t>(QB * draws_row(T));
    // 1. This head's keys and values, packed once: K^T (HS, T) and V (T, HS) as right operands.
    pack_b<Factor>(k_packed, {K, 1, row}, HS, T);
    pack_b<Factor>(v_packed, {V, row, 1}, T, HS);
    for (int q0 = first; q0 < T; q0 += QB) {
      // 2. A block of queries: P (rows, keys) = q @ k^T, and the block's draws.
      const int rows = std::min(QB, T - q0), keys = q0 + rows;
      multiply_packed<Factor>(P, ld, {}, left_operand<Factor>(a, Q + q0 * row, row, rows, HS), k_packed, by_channel,
                              rows, padded<Factor>(keys), HS, {.n_end = q0 + 1});
      if (drop.active()) block_draws(draws, drop, uint64_t(drop.first_row + b) * NH + h, q0, rows, T);
      // 3. Softmax, row by row: first all maxima, then all exponentials. In loops of their own, rows do not wait for
      //    each other. P becomes exp(score - maximum) after dropout, not yet divided by the sum before it.
      Real tops[QB], norm[QB];
      for (int i = 0; i < rows; i++) {
        Real* p = P + size_t(i) * ld;
        const int visible = q0 + i + 1;
        for (int kv = visible; kv % W != 0; kv++) p[kv] = -std::numeric_limits<Real>::infinity();
        Vec<Real> max = load(p);
        for (int kv = W; kv < visible; kv += W) {
          const Vec<Real> x = load(p + kv);
          max = x > max ? x : max;
        }
        tops[i] = horizontal_max<Real>(max) * scale;
      }
      for (int i = 0; i < rows; i++) {
        Real* p = P + size_t(i) * ld;
        const int visible = q0 + i + 1;
        const Real top = tops[i];
        Vec<Real> sums{};
        for (int kv = 0; kv < visible; kv += W) {
          const Vec<Real> e = exp_vec(load(p + kv) * scale - top);
          sums += e;
          store(p + kv, drop.active() ? zero_dropped<Real>(e, draws + i * draws_row(T) + kv, drop.threshold) : e);
        }
        const Real sum = horizontal_sum<Real>(sums);
        lse[size_t(bh) * T + q0 + i] = top + std::log(sum);
        norm[i] = keep_scale / sum;
        std::fill(p + visible, p + keys, Real(0));
      }
      // 4. out = P @ v, divided.
      Real* o = out + (size_t(b) * (T - first) + q0 - first) * C + h * HS;
      multiply_packed<Factor>(o, C, {}, left_operand<Factor>(a, P, ld, rows, keys), v_packed, by_key, rows, HS, keys,
                              {.k_end = q0 + 1});
      for (int i = 0; i < rows; i++)
        for (int c = 0; c < HS; c++) o[size_t(i) * C + c] *= norm[i];
    }
  }
}

// dqkv (B, T, 3, NH, HS) =; dout (B, T, C), qkv (B, T, 3, NH, HS), out (B, T, C), lse (B, NH, T). The equations stand
// above reference::attention_backward.
template <class Real, class Factor = Real>
void attention_backward(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const Real* lse,
                        const Dropout& drop, int B, int T, int C, int NH) {
  using namespace attention;
  using namespace product;
  constexpr int W = lanes<Real>;
  const int HS = C / NH, ld = padded<Factor>(T) + W;
  const size_t row = size_t(3) * C;
  const size_t by_channel = packed_size<Factor>(HS, NR<Factor>), by_key = packed_size<Factor>(T, NR<Factor>);
  const Real scale = 1 / std::sqrt(Real(HS)),
             keep_scale = drop.active() ? Real(dropout_scale(drop.threshold)) : Real(1);
#pragma omp parallel for schedule(dynamic) if (size_t(B) * T * T * C > 8 * worth_threads)
  for (int bh = 0; bh < B * NH; bh++) {
    [[maybe_unused]] const Registers<Factor> registers{};
    const int b = bh / NH, h = bh % NH;
    const size_t head = size_t(b) * T * row + h * HS;
    const Real *Q = qkv + head, *K = Q + C, *V = K + C;
    const Real *dO = dout + size_t(b) * T * C + h * HS, *O = out + size_t(b) * T * C + h * HS;
    Real *dQ = dqkv + head, *dK = dQ + C, *dV = dK + C;
    // Tags for scratch(), see simd.h.
    struct KeysByChannel;
    struct ValuesByChannel;
    struct Keys;
    struct Block;
    struct Left;
    struct Weights;
    struct Gradients;
    struct Draws;
    Unit<Factor>* kt_packed = scratch<KeysByChannel, Unit<Factor>>(packed_size<Factor>(HS, T));
    Unit<Factor>* vt_packed = scratch<ValuesByChannel, Unit<Factor>>(packed_size<Factor>(HS, T));
    Unit<Factor>* k_packed = scratch<Keys, Unit<Factor>>(packed_size<Factor>(T, HS));
    Unit<Factor>* block_packed = scratch<Block, Unit<Factor>>(packed_size<Factor>(QB, HS));
    Unit<Factor>* a =
        scratch<Left, Unit<Factor>>(std::max(packed_a_size<Factor>(QB, std::max(T, HS)), packed_a_size<Factor>(T, QB)));
    Real* P = scratch<Weights, Real>(size_t(QB) * ld);
    Real* dP = scratch<Gradients, Real>(size_t(QB) * ld);
    uint16_t* draws = scratch<Draws, uint16_t>(QB * draws_row(T));
    // 1. This head's K^T (HS, T), V^T (HS, T) and K (T, HS), packed once as right operands.
    pack_b<Factor>(kt_packed, {K, 1, row}, HS, T);
    pack_b<Factor>(vt_packed, {V, 1, row}, HS, T);
    pack_b<Factor>(k_packed, {K, row, 1}, T, HS);
    // The last queries see all keys, so their block comes first and writes dK and dV. The blocks before it add to them.
    for (int q0 = (T - 1) / QB * QB; q0 >= 0; q0 -= QB) {
      const int rows = std::min(QB, T - q0), keys = q0 + rows, columns = padded<Factor>(keys);
      // 2. A block of queries: P (rows, keys) = q @ k^T and dP (rows, keys) = dout @ v^T, and the block's draws.
      const Real *Qb = Q + q0 * row, *dOb = dO + size_t(q0) * C, *Ob = O + size_t(q0) * C;
      multiply_packed<Factor>(P, ld, {}, left_operand<Factor>(a, Qb, row, rows, HS), kt_packed, by_channel, rows,
                              columns, HS, {.n_end = q0 + 1});
      multiply_packed<Factor>(dP, ld, {}, left_operand<Factor>(a, dOb, C, rows, HS), vt_packed, by_channel, rows,
                              columns, HS, {.n_end = q0 + 1});
      if (drop.active()) block_draws(draws, drop, uint64_t(drop.first_row + b) * NH + h, q0, rows, T);
      // 3. D = dout . out for each query.
      Real dots[QB];
      for (int i = 0; i < rows; i++) {
        Real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < HS; c++) dot += dOb[size_t(i) * C + c] * Ob[size_t(i) * C + c];
        dots[i] = dot;
      }
      // 4. Row by row, scores become weights after dropout, and dP becomes dS. Keys after the query get 0.
      for (int i = 0; i < rows; i++) {
        Real *p = P + size_t(i) * ld, *dp = dP + size_t(i) * ld;
        const int visible = q0 + i + 1;
        const Real log_sum = lse[size_t(bh) * T + q0 + i], D = dots[i];
        for (int kv = 0; kv < visible; kv += W) {
          const Vec<Real> weight = exp_vec(load(p + kv) * scale - log_sum);
          Vec<Real> dweight = load(dp + kv) * keep_scale, dropped = weight * keep_scale;
          if (drop.active()) {
            const uint16_t* draw = draws + i * draws_row(T) + kv;
            dweight = zero_dropped<Real>(dweight, draw, drop.threshold);
            dropped = zero_dropped<Real>(dropped, draw, drop.threshold);
          }
          store(dp + kv, weight * (dweight - D) * scale);
          store(p + kv, dropped);
        }
        std::fill(p + visible, p + keys, Real(0));
        std::fill(dp + visible, dp + keys, Real(0));
      }
      // 5. dq = dS @ k
      multiply_packed<Factor>(dQ + q0 * row, row, {}, left_operand<Factor>(a, dP, ld, rows, keys), k_packed, by_key,
                              rows, HS, keys, {.k_end = q0 + 1});
      // 6. dk += dS^T @ q, dv += P^T @ dout
      const size_t panel = packed_size<Factor>(rows, NR<Factor>);
      const auto add = [&](Real* to) { return keys < T ? Start<Real>{to, row} : Start<Real>{}; };
      pack_b<Factor>(block_packed, {Qb, row, 1}, rows, HS);
      multiply_packed<Factor>(dK, row, add(dK), pack_a<Factor>(a, {dP, 1, size_t(ld)}, keys, rows), block_packed, panel,
                              keys, HS, rows, {.k_begin = -q0});
      pack_b<Factor>(block_packed, {dOb, size_t(C), 1}, rows, HS);
      multiply_packed<Factor>(dV, row, add(dV), pack_a<Factor>(a, {P, 1, size_t(ld)}, keys, rows), block_packed, panel,
                              keys, HS, rows, {.k_begin = -q0});
    }
  }
}
