// Attention's backward pass, version 2 in choices.cuh (the lab's version 4): one kernel writes dq, dk and dv, and so
// computes the weights once, not twice: five products instead of seven. It runs where 146 KB of shared memory can hold
// a whole head: 64 channels, up to 256 tokens, 16-bit types, on cards like A100, H100 and B200. attention.cuh has the
// two kernels for everything else, and the choice; read it first. attention_squares.cuh has what all are made of.
//
// Who has what. A thread block has one head of one batch row: 8 warps, one block on a multiprocessor. Warp w owns two
// squares of 16 keys, numbers w and 15 - w, and keeps their dk and dv in registers from the beginning to the end.
// Queries come in four tiles of 64, and a warp takes them in steps of 32:
//
//   keys       warp     queries 0    64    128   192         # a step: 16 keys, 32 queries
//     0 -  15    0              d #   # #   # #   # #         d a step on the diagonal, where keys are hidden
//    16 -  31    1              d #   # #   # #   # #
//    32 -  47    2                d   # #   # #   # #
//    48 -  63    3                d   # #   # #   # #
//    64 -  79    4                    d #   # #   # #
//    80 -  95    5                    d #   # #   # #
//    96 - 111    6                      d   # #   # #
//   112 - 127    7                      d   # #   # #
//   128 - 143    7                          d #   # #
//   144 - 159    6                          d #   # #
//   160 - 175    5                            d   # #
//   176 - 191    4                            d   # #
//   192 - 207    3                                d #
//   208 - 223    2                                d #
//   224 - 239    1                                  d
//   240 - 255    0                                  d
//                       tile     0     1     2     3
//
// The tiles come in pairs, first 2 and 1, then 3 and 0, with a barrier after each pair. Every warp has nine steps, four
// or five of them in each pair, so the warps come to the barriers at about the same time.
//
// dq is a sum over keys, which different warps own. So each warp puts its dS into shared memory. After the barrier the
// block multiplies all of it by the keys: from each tile of the pair, a warp takes 16 queries and half of their
// channels, goes through the keys in order, and writes dq once. There are no atomics, and no sum depends on timing.
// defines: attention::once, attention_backward_once_kernel, attention_backward_once
#pragma once
#include "attention_squares.cuh"
#include "launch.cuh"

namespace attention::once {

constexpr int HS = 64, warps = 8, threads = 32 * warps;
constexpr int tile = 64, step = 32;  // queries
constexpr int max_T = 4 * tile, squares_of_keys = max_T / 16;
static_assert(squares_of_keys == 2 * warps, "a warp owns two");

// Shared memory is rows of 64 elements, 128 bytes, with their chunks in the order of chunk_offset. The number on the
// left is the row at which a part begins:
//
//      0 +----------------------------------------+
//        | keys, 256                              |  for the scores, and for dq at the end of each pair
//    256 +----------------------------------------+
//        | values, 256                            |  for dP. At the very end: dv, on its way to memory
//    512 +-------------------+--------------------+
//        | queries: late, 64 | early, 64          |  of the current pair. At the very end: dk, on its way to memory,
//    640 +-------------------+--------------------+  in the rows of queries and dout together
//        | dout:    late, 64 | early, 64          |
//    768 +-------------------+------+-------------+
//        | dS^T, late: 192 or 256   | early: 128  |  a row for each key that the tile sees, a column for each of its
//   1088 +--------------------------+-- or 64 ----+  64 queries
//        | dq, 8 x 16 half rows     |                for each warp 16 queries' dq, on its way to memory
//   1152 +--------------------------+
//        | lse and D of 256 queries |                as pairs of floats, 2 KB
//        +--------------------------+
//        | dropout's masks          |                8 KB, only if forward has stored them: all squares of 16 x 16
//        +--------------------------+
constexpr int key_row = 0, value_row = key_row + max_T, query_row = value_row + max_T, dout_row = query_row + 2 * tile;
constexpr int dS_row = dout_row + 2 * tile, dq_row = dS_row + 5 * tile, end_row = dq_row + warps * 16 / 2;
constexpr size_t smem_bytes = end_row * HS * 2 + max_T * sizeof(float2);
constexpr size_t mask_bytes = squares_of_keys * squares_of_keys * 32;

// A pair of tiles of queries, the late one (i = 0) and the early one (i = 1).
struct Pair {
  int late;  // 2 or 3
  __device__ int first_query(int i) const { return (i == 0 ? late : 3 - late) * tile; }
  __device__ int first_dS_row(int i) const { return dS_row + (i == 0 ? 0 : (late + 1) * tile); }
};

// Whether the kernel can run. smem: the bytes of shared memory that the card gives to a block. We always count the bytes
// of the masks, stored or not. Otherwise storing them could change which kernel runs, and the two round differently.
inline bool fits(int head_size, int T, size_t smem) {
  return head_size == HS && T <= max_T && smem_bytes + mask_bytes <= smem;
}

// s = k @ q^T and dP = v @ dout^T, both (16, 32), for 16 keys and 32 queries. key and query are the rows where k and q
// begin in shared memory; v begins value_row - key_row rows after k, dout dout_row - query_row rows after q. Both
// products go through the channels together. So neither k nor v needs more than four registers at a time, and the
// tensor cores have eight sums to work on that do not wait for each other.
template <class Real>
__device__ inline void scores_and_dP(Square (&s)[1][step / 16], Square (&dP)[1][step / 16], const Real* smem, int key,
                                     int query) {
  // Where this lane's rows are, in the left operand as in load_a, in the right one as in multiply_transposed.
  const int left = chunk_offset<HS>(key + lane() % 16, lane() / 16);
  const int right = chunk_offset<HS>(query + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
  for (int n = 0; n < step / 16; n++) s[0][n] = dP[0][n] = {};
#pragma unroll
  for (int c = 0; c < HS / 16; c++) {
    uint32_t k[4], v[4];
    ldmatrix_x4(k, smem + (left ^ (16 * c)));
    ldmatrix_x4(v, smem + (value_row - key_row) * HS + (left ^ (16 * c)));
    for (int n = 0; n < step / 16; n++) {
      uint32_t q[4], dO[4];
      ldmatrix_x4(q, smem + n * 16 * HS + (right ^ (16 * c)));
      multiply<Real>(s[0][n], k, q);
      ldmatrix_x4(dO, smem + (dout_row - query_row + n * 16) * HS + (right ^ (16 * c)));
      multiply<Real>(dP[0][n], v, dO);
    }
  }
}

}  // namespace attention::once

// Launched with (NH, B) blocks of 256 threads: a block has one head of one batch row.
//   dqkv (B, T, 3, NH, HS) =    dq, dk and dv
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T) from forward
//   masks (B, NH, n, n, 32)     from forward, if MASKS says so: see StoredMasks
template <class Real, attention::Masks MASKS>
__global__ void __launch_bounds__(attention::once::threads, 1)
    attention_backward_once_kernel(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                                   attention::StoredMasks<const unsigned char> masks, DeviceDropout drop, int T,
                                   int NH) {
  wait_for_inputs();
  using namespace attention;
  using once::HS, once::tile, once::step;
  if (MASKS != Masks::none) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out, *O = out + head.out;
  Real *smem = dynamic_smem<Real>(), *dQ = dqkv + head.qkv;
  float2* lse_and_D = reinterpret_cast<float2*>(smem + once::end_row * HS);
  unsigned char* masks_of_head = reinterpret_cast<unsigned char*>(lse_and_D + once::max_T);  // as if T were max_T

  // 1. Begin to copy what the first pair of tiles needs, global -> shared: its queries and dout, and the keys and
  //    values that they see. The second pair brings the last 64 keys and values.
  const auto copy = [&](once::Pair pair) {
    const int last_key = min(pair.first_query(0) + tile, T);
    for (int key = pair.late == 2 ? 0 : 3 * tile; key < last_key; key += tile) {
      copy_rows<tile, HS, once::threads>(smem, once::key_row + key, K, row, key, T);
      copy_rows<tile, HS, once::threads>(smem, once::value_row + key, V, row, key, T);
    }
    for (int i = 0; i < 2; i++) {
      const int query = pair.first_query(i);
      if (query >= T) continue;
      copy_rows<tile, HS, once::threads>(smem, once::query_row + i * tile, Q, row, query, T);
      copy_rows<tile, HS, once::threads>(smem, once::dout_row + i * tile, dO, out_row, query, T);
    }
    copy_async_commit();
  };
  // The masks come with the first pair, all that there are. A thread copies half a square's 32 bytes at a time.
  if constexpr (MASKS == Masks::stored)
    for (int i = threadIdx.x; i < int(once::mask_bytes / 16); i += once::threads) {
      const int q = i / (2 * once::squares_of_keys) * 16, kv = i / 2 % once::squares_of_keys * 16;
      copy_async_16(masks_of_head + i * 16, masks.of_square(head.draw_head, q, kv, T) + i % 2 * 16, kv <= q && q < T);
    }
  copy({2});
  // 2. Meanwhile get lse and D = rowsum(dout * out) of all queries from global memory: eight lanes share a row, so that
  //    a warp reads four whole rows at once. Queries from T on get weights of exp(-infinity) = 0. We leave the factor
  //    keep_scale out of dS and multiply the sums by it at the end, so here D is divided by it.
  const int thread = threadIdx.x;
  static_assert(once::threads == once::max_T, "a thread has the lse of one query");
  lse_and_D[thread].x = thread < T ? lse[head.bh * T + thread] * log2_e : INFINITY;
  constexpr int chunks = HS / 8, at_once = once::threads / chunks;  // at_once: rows that the block reads
  float D[once::max_T / at_once];
  for (int i = 0; i < once::max_T / at_once; i++) {  // all loads come first, so that we wait for them only once
    const size_t at = min(i * at_once + thread / chunks, T - 1) * out_row + thread % chunks * 8;
    D[i] = dot8(dO + at, O + at);
  }
  const float unscale = 1 / drop.keep_scale;
  for (int i = 0; i < once::max_T / at_once; i++) {
    const float sum = lane_sum<chunks>(D[i]);
    if (thread % chunks == 0) lse_and_D[i * at_once + thread / chunks].y = sum * unscale;
  }

  // What stays in registers: dk and dv of the warp's two squares of keys, (2, 16, 64) each. That takes 128 registers of
  // each lane, half of all that it can have, so keys and values stay in shared memory and every step reads them again.
  const float scale = softmax_scale<HS>() * log2_e, dS_factor = softmax_scale<HS>() * drop.keep_scale;
  Square dk[2][1][HS / 16] = {}, dv[2][1][HS / 16] = {};
  for (once::Pair pair = {2}; pair.late <= 3; pair.late++) {
    // 3. Wait. After the barrier all copies are there, lse and D too, and no warp needs the previous pair's dS any
    //    more.
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int own = 0; own < 2; own++) {
      const int key = 16 * (own == 0 ? warp : once::squares_of_keys - 1 - warp);  // the square's first key
#pragma unroll 1
      for (int i = 0; i < 2 * tile; i += step) {  // the pair's queries: the late tile's, then the early tile's
        // 4. A step of 32 queries, if these exist and see the square's keys.
        const int query = pair.first_query(i / tile) + i % tile;
        if (query >= T || query + step <= key) continue;
        // 5. scores^T = k @ q^T, dP^T = v @ dout^T: two squares of each. Their rows are keys, so a lane has two keys, g
        //    and g + 8, and eight of the 32 queries. On the diagonal, some keys are hidden.
        Square p[1][step / 16], ds[1][step / 16];  // scores and dP now, weights and dS after backward_weight
        once::scores_and_dP(p, ds, smem, once::key_row + key, once::query_row + i);
        hide_later_keys<true>(p, key, query);
        // 6. Each lane by itself: scores become weights after dropout, dP becomes dS.
#pragma unroll
        for (int n = 0; n < step / 16; n++) {
          SquareMask<MASKS, true> mask;
          mask.load({masks_of_head, 0}, 0, query + n * 16, key, once::max_T);
          bool keep[8];
          mask.get(keep, drop, head.draw_head, query + n * 16, key, T);
          for (int j = 0; j < 8; j++) {
            const float2 of_q = lse_and_D[query + n * 16 + column_of(j)];
            backward_weight<Real>(p[0][n][j], ds[0][n][j], scale, of_q.x, of_q.y, keep[j], 1);
          }
        }
        // 7. dS^T goes to shared memory, for dq. No other warp writes the rows of our 16 keys.
        const int offset = chunk_offset<HS>(pair.first_dS_row(i / tile) + key + lane() / 4, i % tile / 8);
        for (int n = 0; n < step / 16; n++) {
          uint32_t pairs[4];
          pack_square<Real>(pairs, ds[0][n]);
          put_square<HS>(smem, offset ^ (n * 16), pairs);
        }
        // 8. dv += weights^T @ dout, dk += dS^T @ q. The lanes already hold weights^T and dS^T as a left operand needs
        //    it.
        multiply_add<Real, HS>(dv[own], p, smem, once::dout_row + i);
        multiply_add<Real, HS>(dk[own], ds, smem, once::query_row + i);
      }
    }
    // 9. Wait. After the barrier the pair's dS is complete, and no warp needs its queries and dout any more: the next
    //    pair's come while we compute dq.
    __syncthreads();
    if (pair.late == 2) copy({3});
    // 10. dq = dS @ k. A tile has four squares of 16 queries. The warp has square warp % 4 of the late tile, then
    //     square 3 - warp % 4 of the early one. Together these see 17 squares of keys, the same number for every warp.
    //     Warps 0 ... 3 have channels 0 ... 31, the others channels 32 ... 63.
    const int channel = warp / 4 * (HS / 2);
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
      const int square = i == 0 ? warp % 4 : 3 - warp % 4;
      const int first = pair.first_query(i) + square * 16;  // the first of our queries
      if (first >= T) continue;
      Square dq[1][HS / 32] = {};
      // The left operand is dS, but memory has dS^T, with a row for each key, so ldmatrix transposes it. Lanes 0-7
      // point to keys 0-7 of queries 0-7, lanes 8-15 to keys 0-7 of queries 8-15, lanes 16-31 likewise to keys 8-15.
      const int left =
          chunk_offset<HS>(pair.first_dS_row(i) + lane() % 8 + lane() / 16 * 8, 2 * square + lane() / 8 % 2);
      const int right = chunk_offset<HS>(once::key_row + lane() % 16, channel / 8 + lane() / 16);
      for (int k = 0; k <= first; k += 16) {
        uint32_t of_dS[1][4];
        ldmatrix_x4_trans(of_dS[0], smem + k * HS + left);
        multiply_add_rows(dq, of_dS, smem + k * HS, right);
      }
      __syncwarp();  // no lane still reads the rows of our square before
      store_rows<HS / 2>(dQ + first * row + channel, row, T - first, smem + once::dq_row * HS, warp * 16, dq[0],
                         {dS_factor, dS_factor});
    }
  }

  // 11. Write dk and dv, with the factors that we left out: registers -> shared -> global. No other warp uses the rows
  //     of shared memory through which they go.
#pragma unroll
  for (int own = 0; own < 2; own++) {
    const int key = 16 * (own == 0 ? warp : once::squares_of_keys - 1 - warp);
    Real *dK = dQ + out_row + key * row, *dV = dK + out_row;
    store_rows<HS>(dK, row, T - key, smem, once::query_row + key, dk[own][0], {dS_factor, dS_factor});
    store_rows<HS>(dV, row, T - key, smem, once::value_row + key, dv[own][0], {drop.keep_scale, drop.keep_scale});
  }
}

// Launches the kernel. attention_backward calls this where once::fits, with its own arguments.
template <class Real, attention::Masks MASKS>
void attention_backward_once(Real* dqkv, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                             const attention::StoredMasks<const unsigned char>& masks, const DeviceDropout& drop, int B,
                             int T, int NH, cudaStream_t stream) {
  using namespace attention;
  const size_t smem = once::smem_bytes + (MASKS == Masks::stored ? once::mask_bytes : 0);
  launch(attention_backward_once_kernel<Real, MASKS>, {dim3(NH, B), once::threads, smem, stream}, dqkv, dout, qkv, out,
         lse, masks, drop, T, NH);
}
