// The sums of a matrix's columns, such as the gradient of a bias. They are computed in two steps, so that the order of
// every sum is fixed. First each block of rows writes its own sums, called partials. Then one launch, add_partials,
// adds them up for all layers at once. layernorm.cuh and embedding.cuh compute partials of their own and use the same
// add_partials. The first step costs next to nothing in a kernel that has the elements in its registers anyway, as
// relu_backward's has.
// defines: sums_block_rows, partials_size, column_partials, Sums, sums_of, add_partials
#pragma once
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"

constexpr int sums_block_rows = 64;  // so many rows of the matrix make one row of partials

// How many floats the partials of a matrix (rows, columns) take.
inline size_t partials_size(int rows, int columns) { return size_t(ceil_div(rows, sums_block_rows)) * columns; }

// ---------------------------------------------------------------------------------------------------------------------
// Step one.

constexpr int sums_block_columns = 256, sums_warps = 8;

// Launched with (ceil(OC / 256), ceil(rows / 64)) blocks of 256 threads. A block has 64 rows of 256 columns: a lane has
// eight columns, and the eight warps take turns at the rows. The last rows come first, because the product before wrote
// them last, so they are still in the cache.
//   partials (ceil(rows / 64), OC) =
//   x        (rows, OC), a row of which is ld elements long. With RELU it is a gradient, and becomes 0 where relu_out
//            is 0, before it is added
//   relu_out (rows, OC), laid out like x; RELU only, else null

template <class Real, bool RELU>
__global__ void __launch_bounds__(32 * sums_warps)
    column_partials_kernel(float* partials, Real* x, const Real* relu_out, int rows, int OC, int ld) {
  wait_for_inputs();
  constexpr int batch = 4;  // rows whose loads are under way together
  __shared__ __align__(16) float warp_partials[sums_warps][sums_block_columns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int c = blockIdx.x * sums_block_columns + lane * 8;
  const int row_block = gridDim.y - 1 - blockIdx.y, block_row = row_block * sums_block_rows;
  // 1. The warp's rows of the 64, four at a time: load all, then add.
  Float8 sum = {};
  for (int r = warp; r < sums_block_rows; r += batch * sums_warps) {
    Float8 v[batch], passed[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int row = block_row + r + i * sums_warps;
      const bool there = row < rows && c < OC;
      v[i] = there ? load8(x + size_t(row) * ld + c) : Float8{};
      if constexpr (RELU) passed[i] = there ? load8(relu_out + size_t(row) * ld + c) : Float8{};
    }
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int row = block_row + r + i * sums_warps;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if constexpr (RELU) v[i][j] = passed[i][j] <= 0 ? 0 : v[i][j];
        sum[j] += v[i][j];
      }
      if constexpr (RELU)
        if (row < rows && c < OC) store8(x + size_t(row) * ld + c, v[i]);
    }
  }
  // 2. The warps' sums, added in order: a thread has one column.
  store8(&warp_partials[warp][lane * 8], sum);
  __syncthreads();
  const int column = blockIdx.x * sums_block_columns + threadIdx.x;
  if (column >= OC) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < sums_warps; w++) total += warp_partials[w][threadIdx.x];
  partials[size_t(row_block) * OC + column] = total;
}

template <bool RELU, class Real>
void launch_column_partials(float* partials, Real* x, const Real* relu_out, int rows, int OC, int ld,
                            cudaStream_t stream) {
  require(rows > 0 && OC > 0, "column_partials: rows = ", rows, ", OC = ", OC);
  require(ld >= OC && ld % 8 == 0, "column_partials: rows of ", ld, " elements for OC = ", OC);
  const dim3 grid(ceil_div(OC, sums_block_columns), ceil_div(rows, sums_block_rows));
  launch(column_partials_kernel<Real, RELU>, {grid, 32 * sums_warps, 0, stream}, partials, x, relu_out, rows, OC, ld);
}

// partials (ceil(rows / 64), OC) = the sums of each 64 rows of x (rows, OC). A row of x is ld elements long; those
// behind the first OC are ignored.
template <class Real>
void column_partials(float* partials, const Real* x, int rows, int OC, int ld, cudaStream_t stream) {
  launch_column_partials<false, Real>(partials, const_cast<Real*>(x), nullptr, rows, OC, ld, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step two, in one launch for a list of jobs.

// One job for add_partials: it adds up partials (layers, blocks, count, C) over the blocks. The result is `count`
// vectors of C numbers for each layer; vector i goes to first[i], or nowhere if that is null. A stride is the distance
// from one layer's vector to the next layer's, in elements.
struct Sums {
  int blocks, C, layers, count;
  const float* partials;
  size_t partials_stride;
  float* first[3];
  size_t stride[3];
};

// The job that finishes column_partials or relu_backward: sums (C) of the columns of a matrix (rows, C); or sums
// (layers, C) for one such matrix in each layer, where Slices has the `first` layer's slice and the `stride` to the
// next.
inline Sums sums_of(float* sums, const float* partials, int rows, int C) {
  return {ceil_div(rows, sums_block_rows), C, 1, 1, partials, 0, {sums}, {}};
}
template <class Slices>
Sums sums_of(const Slices& sums, const Slices& partials, int rows, int C, int layers) {
  return {ceil_div(rows, sums_block_rows), C, layers, 1, partials.first, partials.stride, {sums.first}, {sums.stride}};
}

constexpr int adding_columns = 32, adding_groups = 8, max_sums = 8;
struct SumsList {
  Sums sums[max_sums];
  unsigned blocks_before[max_sums];  // the number of thread blocks that work on earlier jobs; all, behind the last job
};

// Launched with 256 threads a block, and for each job and layer as many blocks as it has 32 columns. A block adds up 32
// columns of a layer's partials: eight groups of 32 threads take turns at the rows of partials.
[[maybe_unused]] static __global__ void __launch_bounds__(adding_columns* adding_groups)
    add_partials_kernel(SumsList list) {
  wait_for_inputs();
  __shared__ float group_partials[adding_groups][adding_columns];
  // 1. Which job is it, which layer of it, which column?
  int which = 0;
#pragma unroll
  for (int i = 1; i < max_sums; i++) which += blockIdx.x >= list.blocks_before[i];
  const Sums& s = list.sums[which];
  const unsigned number = blockIdx.x - list.blocks_before[which], width = unsigned(s.count) * s.C;
  const unsigned column_blocks = ceil_div(width, adding_columns), l = number / column_blocks;
  const int column = threadIdx.x % adding_columns, group = threadIdx.x / adding_columns;
  const unsigned c = number % column_blocks * adding_columns + column, part = c / s.C;
  float* out = c < width ? s.first[part] : nullptr;
  // 2. This thread's rows of the column.
  float own = 0;
  if (out) {
    const float* const partials = s.partials + l * s.partials_stride + c;
#pragma unroll 16
    for (int k = group; k < s.blocks; k += adding_groups) own += partials[size_t(k) * width];
  }
  // 3. The groups' sums, added in order.
  group_partials[group][column] = own;
  __syncthreads();
  if (group == 0 && out) {
    float total = 0;
#pragma unroll
    for (int k = 0; k < adding_groups; k++) total += group_partials[k][column];
    out[l * s.stride[part] + c % s.C] = total;
  }
}

// Does all jobs of the list: each one's vectors = its partials, added up.
template <size_t N>
void add_partials(const Sums (&list)[N], cudaStream_t stream) {
  static_assert(N <= max_sums);
  SumsList all{};
  unsigned blocks = 0;
  for (size_t i = 0; i < N; i++) {
    const Sums& s = all.sums[i] = list[i];
    require(s.blocks > 0 && s.C > 0 && s.count > 0 && s.count <= 3 && s.layers >= 0,
            "add_partials: blocks = ", s.blocks, ", C = ", s.C, ", layers = ", s.layers);
    all.blocks_before[i] = blocks;
    blocks += unsigned(ceil_div(size_t(s.count) * s.C, adding_columns) * s.layers);
  }
  std::fill(all.blocks_before + N, all.blocks_before + max_sums, blocks);
  require(blocks > 0, "add_partials: there is nothing to add");
  launch(add_partials_kernel, {blocks, adding_columns * adding_groups, 0, stream}, all);
}
