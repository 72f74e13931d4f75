// Attention's forward pass, version 2 in choices.cuh (the lab's version 4): a thread block has a whole head.
// attention.cuh has version 1: read it first. attention_squares.cuh has what both are made of. The results are the
// same, bit for bit: each query meets the same keys in the same order.
//
// Shared memory has all keys and values of the head, up to 256 of each. Nothing there is overwritten: once all have
// arrived, no warp waits for another. We count queries and keys in tiles of 32, of which there are eight. Tile i of the
// queries sees tiles 0 ... i of the keys. Each of the four warps has two tiles of queries, a short one, which sees few
// keys, and a long one, which sees many. Together they make nine steps:
//
//   step      0   1   2   3   4   5   6   7   8
//   warp 0    0|  0   1   2   3   4   5   6   7|      a number: the tile of keys in this step
//   warp 1    0   1|  0   1   2   3   4   5   6|      |: this tile is on the diagonal, where some keys are hidden.
//   warp 2    0   1   2|  0   1   2   3   4   5|         After it the tile of queries is done, and is written
//   warp 3    0   1   2   3|  0   1   2   3   4|
//             ^   ^   ^           ^                   before these steps all wait, for tiles 0; 1; 2 and 3; 4 to 7
//
// defines: attention::whole_head_fits, attention_forward_head_kernel
#pragma once
#include "attention_squares.cuh"
#include "launch.cuh"

namespace attention {

constexpr int head_tile = 32, head_tiles = 2 * warps, head_rows = head_tile * head_tiles;

// Shared memory is rows of HS elements of 16 bits: 256 for the keys, 256 for the values, and 16 for each warp, through
// which its output passes. With 64 channels that is 72 KB: three blocks fit on a multiprocessor of 228 KB.
constexpr int head_values = head_rows, head_own = 2 * head_rows;
constexpr size_t head_smem(int HS) { return size_t(head_own + warps * 16) * HS * 2; }

// The head sizes that version 2 has. With 16 channels, copy_rows takes 64 rows at once, more than a tile; with 128, the
// memory would have to be twice as large.
constexpr bool head_has_size(int HS) { return HS == 32 || HS == 64; }

// Whether version 2 can run, with heads of HS channels and T tokens. smem: the bytes of shared memory that the card gives to
// a block. Turing's 64 KB are too small for 64 channels.
inline bool whole_head_fits(int HS, int T, size_t smem) {
  return head_has_size(HS) && T <= head_rows && head_smem(HS) <= smem;
}

// Begins to copy keys and values BEGIN ... END - 1, as one group of copies, which is empty if T <= BEGIN. Rows from T
// on become zeros.
// K, V (T, HS): `row` elements from row to row
template <int BEGIN, int END, int HS, class Real>
__device__ inline void copy_keys_and_values(Real* smem, const Real* K, const Real* V, int row, int T) {
  if (BEGIN < T) {
    copy_rows<END - BEGIN, HS>(smem, BEGIN, K, row, BEGIN, T);
    copy_rows<END - BEGIN, HS>(smem, head_values + BEGIN, V, row, BEGIN, T);
  }
  copy_async_commit();
}

}  // namespace attention

// Launched with (NH, B) blocks of 128 threads: a block has one head of one batch row.
//   out  (B, T, NH, HS) =       the weighted sums of the values
//   lse  (B, NH, T) = or null   the logarithm of each query's softmax denominator, for backward
//   masks (B, NH, n, n, 32) =   dropout's, if MASKS says so: see StoredMasks
//   qkv  (B, T, 3, NH, HS)
template <class Real, int HS, attention::Masks MASKS>
__global__ void __launch_bounds__(attention::threads, 3 - attention::fewer_blocks)
    attention_forward_head_kernel(Real* out, float* lse, attention::StoredMasks<unsigned char> masks, const Real* qkv,
                                  DeviceDropout drop, int T, int NH) {
  wait_for_inputs();
  using namespace attention;
  using Queries = ForwardQueries<Real, HS, MASKS>;
  static_assert(head_tile == 16 * Queries::R && head_tile == step_keys);
  if (MASKS != Masks::none) drop.read_step();
  const Head head(drop, T, NH, HS);
  const int out_row = NH * HS, row = 3 * out_row, warp = warp_index();
  const Real *Q = qkv + head.qkv, *K = Q + out_row, *V = K + out_row;
  Real* smem = dynamic_smem<Real>();

  // Loads a tile of queries from global memory straight to registers, as left operands: a lane loads pairs of channels.
  // Shared memory has no room for them. For queries from T on we load the last one again; nobody writes their results.
  Queries queries;
  const auto load_queries = [&](int first) {
    for (int r = 0; r < Queries::R; r++)
      for (int i = 0; i < 4; i++) {
        const int query = min(first + r * 16 + row_of(2 * i), T - 1);
        const Real* from = Q + size_t(query) * row + column_of(2 * i);
        for (int k = 0; k < HS / 16; k++) queries.q[r][k][i] = *reinterpret_cast<const uint32_t*>(from + k * 16);
      }
  };

  // 1. Begin all copies, in the order in which we will need them. Load our first queries after the first group.
  copy_keys_and_values<0, 32, HS>(smem, K, V, row, T);
  load_queries(warp * head_tile);
  __syncwarp();  // or the compiler would load the queries after all copies, and they would arrive last
  copy_keys_and_values<32, 64, HS>(smem, K, V, row, T);
  copy_keys_and_values<64, 128, HS>(smem, K, V, row, T);
  copy_keys_and_values<128, 256, HS>(smem, K, V, row, T);

  int step = 0;
  for (int turn = 0; turn < 2; turn++) {  // the warp's short tile, then its long one
    const int first = (turn == 0 ? warp : head_tiles - 1 - warp) * head_tile;
    queries.begin();
    for (int k0 = 0; k0 <= first; k0 += head_tile, step++) {
      // 2. Before the steps with an arrow (see above), wait for the next group of copies: ours, then the other warps'.
      if (step <= 2 || step == 5) {
        if (step == 0) copy_async_wait<3>();
        if (step == 1) copy_async_wait<2>();
        if (step == 2) copy_async_wait<1>();
        if (step == 5) copy_async_wait<0>();
        __syncthreads();
      }
      // 3. The step. A warp whose queries do not exist only helps to copy. Off the diagonal no key is hidden, but
      //    step<false> checks that all the same. The check is one branch. Without it the compiler mixes the code of
      //    both steps, and spills registers.
      if (first >= T) continue;
      if (k0 < first)
        queries.template step<false>(smem, k0, head_values + k0, first, k0, drop, head.draw_head, masks, T);
      else
        queries.template step<true>(smem, k0, head_values + k0, first, k0, drop, head.draw_head, masks, T);
    }

    // 4. Write the finished tile: registers -> shared -> global. Meanwhile the long tile's queries are on their way.
    if (turn == 0) load_queries((head_tiles - 1 - warp) * head_tile);
    const int own = computed_here(head_own + warp * 16);
#pragma unroll
    for (int r = 0; r < Queries::R; r++) {
      __syncwarp();  // no lane still reads from these rows what was in them before
      queries.write(r, out, out_row, lse, head, smem, own, first + r * 16, drop.keep_scale, T);
    }
  }
}
