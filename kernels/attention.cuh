// Causal multi-head self-attention with dropout on the weights, on the GPU. attention.h has the equations and the CPU
// twin, dropout_law.h the numbering of the random draws. bf16 and fp16 run on tensor cores, with the kernels below,
// which doc/attention.md explains; what they are made of is in attention_squares.cuh. float runs on the simpler kernels
// of attention_float.cuh: read those first.
//
// No (T, T) matrix is ever stored. Forward goes through the keys in tiles with a running softmax (Dao et al.,
// "FlashAttention", 2022, algorithm 1); a block of threads has some of the queries (Dao, "FlashAttention-2", 2023,
// section 3). Backward computes the weights again, from the logarithm of the softmax's denominator. It is two kernels:
// one owns queries and writes dq, the other owns keys and writes dk and dv. Both compute the weights, which makes seven
// products where a single kernel needs five. In exchange every sum stays within a warp, in a fixed order, without
// atomics.
//
// Where a whole head fits into shared memory there are second versions of both passes: attention_forward_head.cuh, with
// the same bits, and attention_backward_once.cuh, a single kernel that has an order of its own. Floats have a second
// version, too, attention_tf32.cuh. choices.cuh says which card takes them: none yet.
// defines: attention_mask_bytes, attention_forward, attention_backward
#pragma once
#include <type_traits>

#include "attention_backward_once.cuh"
#include "attention_float.cuh"
#include "attention_forward_head.cuh"
#include "attention_squares.cuh"
#include "attention_tf32.cuh"
#include "choices.cuh"
#include "launch.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Forward, version 1. Launched with (NH, B, ceil(T / rows)) blocks of 128 threads: a block has one head of one batch
// row and rows = 4 * 16 R queries, a warp has 16 R of them. It keeps the queries, their softmax and their output in
// registers while the block goes through the keys up to its last query.
//   out  (B, T, NH, HS) =       the weighted sums of the values
//   lse  (B, NH, T) = or null   the logarithm of each query's softmax denominator, for backward
//   masks (B, NH, n, n, 32) =   dropout's, if MASKS says so: see StoredMasks
//   qkv  (B, T, 3, NH, HS)
template <class Real, int HS, attention::Masks MASKS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_forward_kernel(Real* out, float* lse, attention::StoredMasks<unsigned char> masks, const Real* qkv,
                             DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  constexpr int R = query_squares<HS>, rows = warps * 16 * R;
  if (MASKS != Masks::none) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16 * R;
  // Keys that the block's queries see, and that the warp's queries see: those up to the last query.
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16 * R, T) : 0;

  // 1. Our queries: global -> shared -> registers. The first tiles of keys and values come with them. We wait for both.
  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  tiles.copy(0);
  copy_async_wait<0>();
  __syncthreads();
  const int own = own_row<HS> + warp * 16 * R;
  ForwardQueries<Real, HS, MASKS> queries;
  load_a<HS>(queries.q, smem, own);
  queries.begin();

  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    // 2. A step of 32 keys. A warp whose queries do not see them only helps to copy, in advance().
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    queries.template step<false>(smem, tiles.x_row(k0), tiles.y_row(k0), first, k0, drop, head.draw_head, masks, T);
  }

  // 3. Write lse and the output: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more: their memory takes the outputs
#pragma unroll
  for (int r = 0; r < R; r++)
    queries.write(r, out, int(out_row), lse, head, smem, own + r * 16, first + r * 16, drop.keep_scale, T);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, first kernel: D = rowsum(dout * out) and dq = dS @ k.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads: a block has one head of one batch row and 64 queries, a
// warp has 16 of them and goes through the keys that they see.
//   dqkv (B, T, 3, NH, HS)      dq is written; dk and dv are the other kernel's
//   D    (B, NH, T) =           which the other kernel reads
//   dout, out (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T) from forward
//   masks (B, NH, n, n, 32)     from forward, if MASKS says so
template <class Real, int HS, attention::Masks MASKS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 4 - attention::fewer_blocks : 2)
    attention_backward_queries_kernel(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out,
                                      const float* lse, attention::StoredMasks<const unsigned char> masks,
                                      DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  constexpr int N = step_keys / 16, rows = warps * 16, chunks = HS / 8;
  if (MASKS != Masks::none) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  // Late queries see the most keys, so they begin first.
  const int first_of_block = int(gridDim.z - 1 - blockIdx.z) * rows, first = first_of_block + warp * 16;
  const int keys_of_block = min(first_of_block + rows, T), keys = first < T ? min(first + 16, T) : 0;

  // 1. Our queries and their rows of dout, and the first tiles of keys and values: global -> shared.
  Real* smem = dynamic_smem<Real>();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out, *O = out + head.out;
  const TilePairs<Real, HS> tiles{smem, K, V, int(row), int(row), keys_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, Q, row, first_of_block, T);
  copy_rows<rows, HS>(smem, own_row<HS> + rows, dO, out_row, first_of_block, T);
  tiles.copy(0);
  // 2. Meanwhile D of the warp's queries, from global memory: HS / 8 lanes share a row, eight channels each.
  for (int i = lane(); i < 16 * chunks; i += 32) {
    const int query = first + i / chunks;
    const size_t at = min(query, T - 1) * out_row + i % chunks * 8;
    const float dot = lane_sum<chunks>(dot8(dO + at, O + at));
    if (query < T && i % chunks == 0) D[head.bh * T + query] = dot;
  }
  // 3. Our queries and dout: shared -> registers; lse and D of the lane's rows g and g + 8.
  copy_async_wait<0>();
  __syncthreads();  // all copies have arrived, and D is visible to the warp's other lanes
  const int own = own_row<HS> + warp * 16;
  uint32_t q[1][HS / 16][4], dO_of_q[1][HS / 16][4];
  load_a<HS>(q, smem, own);
  load_a<HS>(dO_of_q, smem, own + rows);
  float lse_of_q[2], D_of_q[2];
  for (int r = 0; r < 2; r++) {
    const int query = first + row_of(2 * r);  // rows from T on get weights of exp(-infinity) = 0
    lse_of_q[r] = query < T ? lse[head.bh * T + query] * log2_e : INFINITY;
    D_of_q[r] = query < T ? D[head.bh * T + query] : 0.0f;
  }

  const float scale = softmax_scale<HS>() * log2_e;
  Square dq[1][HS / 16] = {};
  for (int k0 = 0; k0 < keys_of_block; k0 += step_keys) {
    // 4. A step of 32 keys. A warp whose queries do not see them only helps to copy, in advance().
    if (k0 % tiles.tile == 0) tiles.advance(k0);
    if (k0 >= keys) continue;
    // 5. scores = q @ k^T, dP = dout @ v^T. Meanwhile the masks come, if they are stored.
    SquareMask<MASKS, false> mask[N];
    for (int n = 0; n < N; n++) mask[n].load(masks, head.draw_head, first, k0 + n * 16, T);
    Square s[1][N], ds[1][N];  // ds: dP now, dS after backward_weight
    multiply_transposed<Real, HS>(s, q, smem, tiles.x_row(k0));
    hide_later_keys<false>(s, first, k0);
    multiply_transposed<Real, HS>(ds, dO_of_q, smem, tiles.y_row(k0));
    // 6. dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      mask[n].get(keep, drop, head.draw_head, first, k0 + n * 16, T);
      for (int i = 0; i < 8; i++)
        backward_weight<Real>(s[0][n][i], ds[0][n][i], scale, lse_of_q[i / 2 % 2], D_of_q[i / 2 % 2], keep[i],
                              drop.keep_scale);
    }
    // 7. dq += dS @ k
    multiply_add<Real, HS>(dq, ds, smem, tiles.x_row(k0));
  }

  // 8. Write dq, with the factor that dS lacks: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more
  store_rows<HS>(dqkv + head.qkv + first * row, row, T - first, smem, own, dq[0],
                 {softmax_scale<HS>(), softmax_scale<HS>()});
}

// Backward, second kernel: dv = (m * P)^T @ dout and dk = dS^T @ q.
// Launched with (NH, B, ceil(T / 64)) blocks of 128 threads, after the first kernel: a block has one head of one batch
// row and 64 keys, a warp has 16 of them and goes through the queries that see them. Its scores are transposed, keys by
// queries, because that is the left operand that its products need.
//   dqkv (B, T, 3, NH, HS)      dk and dv are written
//   D    (B, NH, T)             from the first kernel
//   dout (B, T, NH, HS), qkv (B, T, 3, NH, HS), lse (B, NH, T), masks (B, NH, n, n, 32)
template <class Real, int HS, attention::Masks MASKS>
__global__ void __launch_bounds__(attention::threads, HS <= 64 ? 3 - attention::fewer_blocks : 2)
    attention_backward_keys_kernel(Real* dqkv, const float* D, const Real* dout, const Real* qkv, const float* lse,
                                   attention::StoredMasks<const unsigned char> masks, DeviceDropout drop, int T,
                                   int NH) {
  wait_for_inputs();
  using namespace attention;
  constexpr int N = step_queries<HS> / 16, rows = warps * 16;
  if (MASKS != Masks::none) drop.read_step();
  const Head head(drop, T, NH, HS);
  const size_t out_row = size_t(NH) * HS, row = 3 * out_row;
  const int warp = warp_index();
  const int first_of_block = int(blockIdx.z) * rows, first = first_of_block + warp * 16;

  // 1. Our keys and values: global -> shared -> registers. The first tiles of queries and dout come with them, and stay
  //    in shared memory. Behind the tiles it has lse and D of the queries of both stages, (2, tile).
  Real* smem = dynamic_smem<Real>();
  float2* lse_and_D = reinterpret_cast<float2*>(smem + smem_rows<HS, 2 * rows> * HS);
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row, *dO = dout + head.out;
  const TilePairs<Real, HS> tiles{smem,         Q + first_of_block * row, dO + first_of_block * out_row, int(row),
                                  int(out_row), T - first_of_block};
  copy_rows<rows, HS>(smem, own_row<HS>, K, row, first_of_block, T);
  copy_rows<rows, HS>(smem, own_row<HS> + rows, V, row, first_of_block, T);
  tiles.copy(0);
  copy_async_wait<0>();
  __syncthreads();
  const int own = own_row<HS> + warp * 16;
  uint32_t k[1][HS / 16][4], v[1][HS / 16][4];
  load_a<HS>(k, smem, own);
  load_a<HS>(v, smem, own + rows);
  // Threads 2 i and 2 i + 1 fetch lse and D of query i of a tile, one tile ahead. Tiles of 32 need 64 threads; nobody
  // stores what the others fetch.
  static_assert(2 * tiles.tile <= threads);
  const auto load_lse_or_D = [&](int query) {
    // Queries from T on get weights of exp(-infinity) = 0.
    if (threadIdx.x % 2 == 0) return query < T ? lse[head.bh * T + query] * log2_e : INFINITY;
    return query < T ? D[head.bh * T + query] : 0.0f;
  };

  const float scale = softmax_scale<HS>() * log2_e;
  Square dk[1][HS / 16] = {}, dv[1][HS / 16] = {};
  float next = load_lse_or_D(first_of_block + threadIdx.x / 2);
  for (int i = 0; i < tiles.end; i += step_queries<HS>) {  // queries, counted from first_of_block
    // 2. A step of 16 or 32 queries. A new tile: lse and D go to shared memory, before the barrier in advance().
    const int q0 = first_of_block + i;
    if (i % tiles.tile == 0) {
      if (threadIdx.x < 2 * tiles.tile) reinterpret_cast<float*>(lse_and_D + i % (2 * tiles.tile))[threadIdx.x] = next;
      tiles.advance(i);
      next = load_lse_or_D(q0 + tiles.tile + threadIdx.x / 2);
    }
    if (q0 + step_queries<HS> <= first) continue;  // they do not see the warp's keys
    // 3. scores^T = k @ q^T, dP^T = v @ dout^T. Meanwhile the masks come, if they are stored.
    SquareMask<MASKS, true> mask[N];
    for (int n = 0; n < N; n++) mask[n].load(masks, head.draw_head, q0 + n * 16, first, T);
    Square p[1][N], ds[1][N];  // scores and dP now, weights and dS after backward_weight
    multiply_transposed<Real, HS>(p, k, smem, tiles.x_row(i));
    hide_later_keys<true>(p, first, q0);
    multiply_transposed<Real, HS>(ds, v, smem, tiles.y_row(i));
    // 4. Scores become weights after dropout, dP becomes dS.
#pragma unroll
    for (int n = 0; n < N; n++) {
      bool keep[8];
      mask[n].get(keep, drop, head.draw_head, q0 + n * 16, first, T);
      for (int j = 0; j < 8; j++) {
        const float2 of_q = lse_and_D[i % (2 * tiles.tile) + n * 16 + column_of(j)];
        backward_weight<Real>(p[0][n][j], ds[0][n][j], scale, of_q.x, of_q.y, keep[j], drop.keep_scale);
      }
    }
    // 5. dv += weights^T @ dout, dk += dS^T @ q
    multiply_add<Real, HS>(dv, p, smem, tiles.y_row(i));
    multiply_add<Real, HS>(dk, ds, smem, tiles.x_row(i));
  }

  // 6. Write dk and dv, with the factors that backward_weight leaves out: registers -> shared -> global.
  __syncthreads();  // no warp needs the tiles any more
  Real *dK = dqkv + head.qkv + out_row + first * row, *dV = dK + out_row;
  store_rows<HS>(dK, row, T - first, smem, own, dk[0], {softmax_scale<HS>(), softmax_scale<HS>()});
  store_rows<HS>(dV, row, T - first, smem, own + rows, dv[0], {drop.keep_scale, drop.keep_scale});
}

// ---------------------------------------------------------------------------------------------------------------------
// These functions launch the kernels: the ones above, or for floats the ones in attention_float.cuh or
// attention_tf32.cuh.

namespace attention {

inline void check(const char* who, const DeviceDropout& drop, int B, int T, int C, int NH) {
  require(B > 0 && T > 0 && NH > 0 && C % NH == 0, who, ": B = ", B, ", T = ", T, ", C = ", C, ", NH = ", NH);
  require(B <= 65535 && T <= 65535 * warps, who, ": B = ", B, " or T = ", T, " is too large for a grid");
  require(!drop.active() || drop.step_on_device, who, ": dropout needs the step's number");
}

// Calls body(head size) with the size as a type, so that it is a constant in the kernel that body launches.
template <class Body>
void with_head_size(const char* who, int HS, Body body) {
  require(HS == 16 || HS == 32 || HS == 64 || HS == 128, who, ": head size ", HS, " is not 16, 32, 64 or 128");
  if (HS == 16) body(std::integral_constant<int, 16>());
  if (HS == 32) body(std::integral_constant<int, 32>());
  if (HS == 64) body(std::integral_constant<int, 64>());
  if (HS == 128) body(std::integral_constant<int, 128>());
}

// Calls body(head size, where the masks come from), both as types.
template <class Body>
void specialize(const char* who, int HS, const DeviceDropout& drop, const void* mask, Body body) {
  with_head_size(who, HS, [&](auto size) {
    if (!drop.active())
      body(size, std::integral_constant<Masks, Masks::none>());
    else if (mask)
      body(size, std::integral_constant<Masks, Masks::stored>());
    else
      body(size, std::integral_constant<Masks, Masks::drawn>());
  });
}

template <class Byte>
StoredMasks<Byte> stored_masks(Byte* mask, const Dropout& drop, int T, int NH) {
  return {mask, attention_counter(uint64_t(drop.first_row) * NH, 0, 0, T)};
}

// Bytes of shared memory of a kernel whose blocks own OWN_ROWS rows, and `more` for something else.
template <class Real, int HS, int OWN_ROWS>
constexpr size_t smem_bytes(int more = 0) {
  constexpr size_t bytes = smem_rows<HS, OWN_ROWS> * HS * sizeof(Real);
  static_assert(bytes + 4 * tile_rows<HS> * sizeof(float) <= 64 << 10, "Turing has no more");
  return bytes + more;
}

// Whether backward takes version 2: it is chosen, and the type, the sizes and the card's shared memory allow it.
template <class Real>
bool takes_once(int HS, int T) {
  return choices().attention_backward == 2 && sizeof(Real) == 2 && once::fits(HS, T, shared_memory_of_block());
}

}  // namespace attention

// How large `mask` below is: 0 where backward draws dropout's masks again.
template <class Real>
size_t attention_mask_bytes(int B, int T, int NH) {
  const bool stored = sizeof(Real) == 2 && choices().attention_masks == 2;
  return stored ? attention_counter(uint64_t(B) * NH, 0, 0, T) : 0;  // the first byte that no head has
}

// out, lse and mask = attention of qkv, with the shapes that stand above the kernels. lse may be null, and so may mask:
// then backward draws the masks again. Floats never store them.
// A query's result does not depend on B. A score that overflows float makes its query's results NaN.
// tf32: products of floats may take 10 bits of their mantissas (attention_tf32.cuh)
template <class Real>
void attention_forward(Real* out, float* lse, unsigned char* mask, const Real* qkv, const DeviceDropout& drop, int B,
                       int T, int C, int NH, cudaStream_t stream, [[maybe_unused]] bool tf32 = false) {
  using namespace attention;
  check("attention_forward", drop, B, T, C, NH);
  const StoredMasks masks = stored_masks(mask, drop, T, NH);
  specialize("attention_forward", C / NH, drop, mask, [&](auto size, auto where) {
    constexpr int HS = size;
    [[maybe_unused]] constexpr bool dropout = where != Masks::none;
    if constexpr (std::is_same_v<Real, float>) {
      if (has_tf32_kernels()) return forward_by_tf32<HS, dropout>(out, lse, qkv, drop, B, T, NH, stream, tf32);
      launch(attention_forward_float_kernel<HS, dropout>, {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream}, out,
             lse, qkv, drop, T, NH);
    } else {
      if constexpr (head_has_size(HS))
        if (choices().attention_forward == 2 && whole_head_fits(HS, T, shared_memory_of_block()))
          return launch(attention_forward_head_kernel<Real, HS, where>, {dim3(NH, B), threads, head_smem(HS), stream},
                        out, lse, masks, qkv, drop, T, NH);
      constexpr int rows = warps * 16 * query_squares<HS>;
      launch(attention_forward_kernel<Real, HS, where>,
             {dim3(NH, B, ceil_div(T, rows)), threads, smem_bytes<Real, HS, rows>(), stream}, out, lse, masks, qkv,
             drop, T, NH);
    }
  });
}

// dqkv = the gradient of qkv, with the shapes that stand above the kernels. D is scratch memory, which version 2 leaves
// alone. mask: what forward stored there, or null if it got null.
template <class Real>
void attention_backward(Real* dqkv, float* D, const Real* dout, const Real* qkv, const Real* out, const float* lse,
                        const unsigned char* mask, const DeviceDropout& drop, int B, int T, int C, int NH,
                        cudaStream_t stream, [[maybe_unused]] bool tf32 = false) {
  using namespace attention;
  check("attention_backward", drop, B, T, C, NH);
  const StoredMasks masks = stored_masks(mask, drop, T, NH);
  specialize("attention_backward", C / NH, drop, mask, [&](auto size, auto where) {
    constexpr int HS = size;
    [[maybe_unused]] constexpr bool dropout = where != Masks::none;
    if constexpr (std::is_same_v<Real, float>) {
      if (has_tf32_kernels())
        return backward_by_tf32<HS, dropout>(dqkv, D, dout, qkv, out, lse, drop, B, T, NH, stream, tf32);
      const LaunchConfig config = {dim3(NH, B, ceil_div(T, warps)), threads, 0, stream};
      launch(attention_backward_queries_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, out, lse, drop, T, NH);
      launch(attention_backward_keys_float_kernel<HS, dropout>, config, dqkv, D, dout, qkv, lse, drop, T, NH);
    } else if (takes_once<Real>(HS, T)) {
      if constexpr (HS == once::HS)
        attention_backward_once<Real, where>(dqkv, dout, qkv, out, lse, masks, drop, B, T, NH, stream);
    } else {
      const dim3 grid(NH, B, ceil_div(T, warps * 16));
      launch(attention_backward_queries_kernel<Real, HS, where>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(), stream}, dqkv, D, dout, qkv, out, lse, masks, drop, T,
             NH);
      launch(attention_backward_keys_kernel<Real, HS, where>,
             {grid, threads, smem_bytes<Real, HS, warps * 32>(2 * tile_rows<HS> * sizeof(float2)), stream}, dqkv, D,
             dout, qkv, lse, masks, drop, T, NH);
    }
  });
}
