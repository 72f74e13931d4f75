// Embedding: out (B, T, C) = wte[x] + wpe, the token's vector plus the position's. The gradient of a token's vector is
// the sum of all rows of dout where the token stands, and likewise for a position. No two threads add to the same
// number, so there are no atomics, and the order of every sum depends on the shapes and the tokens alone.
// defines: embedding_forward, embedding_partials, embedding_backward, embedding_sums
#pragma once
#include <algorithm>

#include "column_sums.cuh"
#include "device.cuh"
#include "launch.cuh"

constexpr int embedding_threads = 256;

// A thread has eight channels of one row.
template <class Real>
__global__ void __launch_bounds__(embedding_threads)
    embedding_forward_kernel(Real* out, const int* x, const Real* wte, const Real* wpe, unsigned count, int T, int C) {
  wait_for_inputs();
  const unsigned i = blockIdx.x * embedding_threads + threadIdx.x;
  if (i >= count) return;
  const unsigned chunks = C / 8, row = i / chunks, c = i % chunks * 8;
  Float8 sum = load8(wpe + size_t(row % T) * C + c);
  const Float8 token = load8(wte + size_t(x[row]) * C + c);
#pragma unroll
  for (int k = 0; k < 8; k++) sum[k] += token[k];
  store8(out + size_t(i) * 8, sum);
}

// out (B, T, C) = wte[x[b, t]] (V, C) + wpe[t] (T, C)
template <class Real>
void embedding_forward(Real* out, const int* x, const Real* wte, const Real* wpe, int B, int T, int C,
                       cudaStream_t stream) {
  require(C % 8 == 0, "embedding_forward: C = ", C, " is not a multiple of 8");
  const size_t count = size_t(B) * T * (C / 8);
  require(count > 0 && count < size_t{1} << 31, "embedding_forward: B * T * C = ", count * 8,
          " is not between 1 and 2^34");
  launch(embedding_forward_kernel<Real>, {unsigned(ceil_div(count, embedding_threads)), embedding_threads, 0, stream},
         out, x, wte, wpe, unsigned(count), T, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. Some tokens of a text are far more frequent than others. With a block for each token, all others would wait
// for the block of the most frequent one, the space. So the rows of dout are cut into segments:
//
//   rows of dout     0 ... 511 | 512 ... 1023 | ...      a segment is one or more pieces of 512 rows
//   position t       block t, over all rows              the first T blocks add the rows of one position each
//   token 0          block T   | block T + V  | ...      the others add the rows of one token in one segment each
//   token 1          block T+1 | ...
//
// add_partials adds up the segments.

constexpr int embedding_piece = 512;  // rows that a block searches for its token at a time

// How many pieces make a segment: one, unless V is so large that the partials (segments, V, C) would be larger than
// dout.
inline int pieces_per_segment(int rows, int V) {
  const int pieces = ceil_div(rows, embedding_piece);
  return ceil_div(pieces, std::clamp(rows / V, 1, pieces));
}
inline int embedding_segments(int rows, int V) {
  return ceil_div(ceil_div(rows, embedding_piece), pieces_per_segment(rows, V));
}

// Finds the rows from `first` to end - 1, at most 512, in which `token` stands. list = their numbers, in order; returns
// how many they are. All threads of the block call together, and all may read the list afterwards. The next call
// changes it only after its first barrier, when every thread is done with it.
//   list (512): in shared memory;  x (B * T): the tokens
static __device__ inline int rows_of_token(int* list, const int* x, int token, int first, int end) {
  // 1. Each warp compares 32 tokens at a time: found has one bit for each row.
  __shared__ unsigned found[embedding_piece / 32];
#pragma unroll
  for (int j = 0; j < embedding_piece / embedding_threads; j++) {
    const int i = j * embedding_threads + threadIdx.x;
    const int here = first + i < end ? x[first + i] : -1;
    const unsigned bits = __ballot_sync(all_lanes, here == token);
    if (i % 32 == 0) found[i / 32] = bits;
  }
  __syncthreads();
  // 2. Each warp writes the rows found in its words, which are every eighth. A row's place in the list is the number of
  //    set bits before it, so every thread goes through all words and counts.
  int count = 0;
#pragma unroll
  for (int word = 0; word < embedding_piece / 32; word++) {
    const int i = word * 32 + threadIdx.x % 32;
    const bool mine = word % (embedding_threads / 32) == int(threadIdx.x) / 32;
    if (mine && found[word] >> (i % 32) & 1) list[count + __popc(found[word] & ((1u << (i % 32)) - 1))] = first + i;
    count += __popc(found[word]);
  }
  __syncthreads();
  return count;
}

// What a thread of backward owns: eight columns, from c on. C / 8 threads make a group, which together own a row; a
// block has `groups` of them, which take turns at the rows. Threads that are left over have group == groups.
struct ColumnOwner {
  int groups, group, c;
  __device__ explicit ColumnOwner(int C)
      : groups(embedding_threads / (C / 8)), group(threadIdx.x / (C / 8)), c(threadIdx.x % (C / 8) * 8) {}
};

// Adds this thread's eight columns of its group's rows to sum. Of the rows row(0) ... row(n - 1) of dout (rows, C), a
// group has row(group), row(group + groups), ... Four loads are under way together. Past the end the last row is loaded
// again and not added: a thread would wait for a load within a branch right there.
template <class Real, class Row>
__device__ inline void add_rows(Float8& sum, const Real* dout, Row row, int n, const ColumnOwner& own, int C) {
  constexpr int at_once = 4;
  if (own.group >= own.groups) n = 0;
  for (int i = own.group; i < n; i += at_once * own.groups) {
    Float8 x[at_once];
#pragma unroll
    for (int j = 0; j < at_once; j++) x[j] = load8(dout + size_t(row(min(i + j * own.groups, n - 1))) * C + own.c);
#pragma unroll
    for (int j = 0; j < at_once; j++) {
      if (i + j * own.groups >= n) continue;
#pragma unroll
      for (int k = 0; k < 8; k++) sum[k] += x[j][k];
    }
  }
}

// Launched with T + segments * V blocks of 256 threads. Block t < T adds the rows of position t. Block
// T + segment * V + token adds the rows of one token in one segment.
//   dwpe     (T, C) =              dout summed over B
//   partials (segments, V, C) =    for each segment and token, the sum of the rows in which the token stands, or zeros
//   dout     (B, T, C)
//   x        (B, T)                the tokens
template <class Real>
__global__ void __launch_bounds__(embedding_threads)
    embedding_backward_kernel(float* dwpe, float* partials, const Real* dout, const int* x, int segment_rows, int B,
                              int T, int C, int V) {
  wait_for_inputs();
  __shared__ int list[embedding_piece];
  __shared__ __align__(16) float group_partials[embedding_threads * 8];  // (groups, C)
  const ColumnOwner own(C);
  Float8 sum{};
  float* out;
  // 1. Each thread adds up its columns of the block's rows: of a position, b * T + t; of a token, where it stands.
  if (int(blockIdx.x) < T) {
    const int t = blockIdx.x;
    const auto of_position = [=](int b) { return b * T + t; };
    add_rows(sum, dout, of_position, B, own, C);
    out = dwpe + size_t(t) * C;
  } else {
    const int sum_number = blockIdx.x - T, token = sum_number % V, segment = sum_number / V;
    const auto of_token = [=](int i) { return list[i]; };
    const int begin = segment * segment_rows, end = min(B * T, begin + segment_rows);
    for (int first = begin; first < end; first += embedding_piece) {
      const int n = rows_of_token(list, x, token, first, min(end, first + embedding_piece));
      add_rows(sum, dout, of_token, n, own, C);
    }
    out = partials + size_t(sum_number) * C;
  }
  // 2. The groups' sums, added in order.
  if (own.group < own.groups) store8(group_partials + own.group * C + own.c, sum);
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += embedding_threads) {
    float total = 0;
    for (int g = 0; g < own.groups; g++) total += group_partials[g * C + c];
    out[c] = total;
  }
}

// How many floats embedding_backward writes to `partials`: no more than dout or wte has, whichever is larger.
inline size_t embedding_partials(int B, int T, int C, int V) { return size_t(embedding_segments(B * T, V)) * V * C; }

// dwpe = the gradient of wpe, from dout. The kernel above has the shapes. partials has
// embedding_partials(B, T, C, V) floats; add_partials makes dwte of them, see embedding_sums.
template <class Real>
void embedding_backward(float* dwpe, float* partials, const Real* dout, const int* x, int B, int T, int C, int V,
                        cudaStream_t stream) {
  require(C % 8 == 0 && C > 0 && C <= 8 * embedding_threads, "embedding_backward: C = ", C,
          " is not a multiple of 8 up to ", 8 * embedding_threads);
  require(B > 0 && T > 0 && V > 0, "embedding_backward: B = ", B, ", T = ", T, ", V = ", V);
  const int segments = embedding_segments(B * T, V), segment_rows = pieces_per_segment(B * T, V) * embedding_piece;
  launch(embedding_backward_kernel<Real>, {unsigned(T) + unsigned(segments) * V, embedding_threads, 0, stream}, dwpe,
         partials, dout, x, segment_rows, B, T, C, V);
}

// The job for add_partials after embedding_backward: dwte (V, C) = partials, summed over the segments.
inline Sums embedding_sums(float* dwte, const float* partials, int B, int T, int C, int V) {
  return {embedding_segments(B * T, V), V * C, 1, 1, partials, 0, {dwte}, {}};
}
