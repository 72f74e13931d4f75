// ReLU, backward, and the gradient of the bias that was added before it: dx becomes 0 where forward's result is 0, and
// dbias[c] is the sum of the new dx[r][c] over all rows r. In the model, dx is the hidden layer's gradient: 16384 rows
// of 4 C = 1536.
//
// It reads 100.7 MB, writes 50.3 MB and computes next to nothing: the floor is the copy of these bytes, 50 us. A part
// of dx is still in the cache, because the product before has just written it.
//
//   1  a thread has a column         1536 threads, on a card with room for 270 000. Each goes down 16384 rows, and at
//                                    every row it waits for memory: the compiler cannot load the next row before this
//                                    one is stored, because for all it knows the store changes that row.
//   2  two passes                    In the first, for dx, a thread has eight neighbouring elements, 16 bytes, and
//                                    there are enough threads. The second is column_sums.cu's last version. It reads
//                                    dx again: a third more bytes in all.
//   3  one pass                      A thread has eight columns of 64 rows. It adds up what it has in registers, so
//                                    each byte moves once, and writes the sums of its 64 rows. A small second kernel,
//                                    add_partials, adds these up. But there are only 49 000 threads, each with one row
//                                    under way: too few loads to keep the memory busy.
//   4  warps share the rows          Eight warps take turns at the 64 rows, which makes 393 000 threads. Their sums
//                                    meet in shared memory.
//   5  the shipped kernel            A thread loads four rows before it works on them. The last rows come first,
//                                    because the product before wrote them last, so they are still in the cache.
#include "../../kernels/relu.cuh"
#include "../../kernels/relu.h"
#include "lab.cuh"

namespace {

// Launched with ceil(OC / 128) blocks of 128 threads.
//   dx (rows, OC): updated;  dbias (OC) =;  out (rows, OC), forward's result
__global__ void __launch_bounds__(128) relu_backward_1(bf16* dx, float* dbias, const bf16* out, int rows, int OC) {
  const int c = blockIdx.x * 128 + threadIdx.x;
  if (c >= OC) return;
  float sum = 0;
  for (int r = 0; r < rows; r++) {
    const size_t at = size_t(r) * OC + c;
    const float d = float(out[at]) <= 0 ? 0 : float(dx[at]);
    dx[at] = bf16(d);
    sum += d;
  }
  dbias[c] = sum;
}

// Sets the chunk of dx at `at` to 0 where `out` is 0, stores it, and returns it.
__device__ inline Float8 relu_backward_8(bf16* dx, const bf16* out, size_t at) {
  Float8 d = load8(dx + at);
  const Float8 passed = load8(out + at);
#pragma unroll
  for (int i = 0; i < 8; i++) d[i] = passed[i] <= 0 ? 0 : d[i];
  store8(dx + at, d);
  return d;
}

// The first pass, launched with ceil(chunks / 256) blocks of 256 threads: a thread has a chunk of eight elements.
//   dx (chunks, 8): updated;  out (chunks, 8)
__global__ void __launch_bounds__(256) relu_backward_2(bf16* dx, const bf16* out, size_t chunks) {
  const size_t chunk = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (chunk < chunks) relu_backward_8(dx, out, chunk * 8);
}

// Launched with (ceil(OC / 256), ceil(rows / 64)) blocks of 32 threads: a thread has eight columns of 64 rows.
//   dx (rows, OC): updated;  partials (ceil(rows / 64), OC) = the sums of each 64 rows;  out (rows, OC)
__global__ void __launch_bounds__(32) relu_backward_3(bf16* dx, float* partials, const bf16* out, int rows, int OC) {
  const int c = (blockIdx.x * 32 + threadIdx.x) * 8, first = blockIdx.y * sums_block_rows;
  const int end = min(rows, first + sums_block_rows);
  if (c >= OC) return;
  Float8 sum = {};
  for (int r = first; r < end; r++) {
    const Float8 d = relu_backward_8(dx, out, size_t(r) * OC + c);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += d[i];
  }
  store8(partials + size_t(blockIdx.y) * OC + c, sum);
}

// Launched with (ceil(OC / 256), ceil(rows / 64)) blocks of 256 threads: a lane has eight columns, and each of the
// block's eight warps every eighth of its 64 rows. The arguments are those of version 3.
__global__ void __launch_bounds__(256) relu_backward_4(bf16* dx, float* partials, const bf16* out, int rows, int OC) {
  __shared__ __align__(16) float warp_partials[8][256];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 256 + lane * 8;
  const int first = blockIdx.y * sums_block_rows, end = min(rows, first + sums_block_rows);
  // 1. Add up the warp's rows.
  Float8 sum = {};
  if (c < OC)
    for (int r = first + warp; r < end; r += 8) {
      const Float8 d = relu_backward_8(dx, out, size_t(r) * OC + c);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += d[i];
    }
  // 2. Add the warps' sums, in order: a thread has one column.
  store8(&warp_partials[warp][lane * 8], sum);
  __syncthreads();
  const int column = blockIdx.x * 256 + threadIdx.x;
  if (column >= OC) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < 8; w++) total += warp_partials[w][threadIdx.x];
  partials[size_t(blockIdx.y) * OC + column] = total;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), OC = 4 * s.C;
  const size_t count = size_t(rows) * OC;
  std::vector<bf16> passed;  // forward's result: half of it is 0
  for (const float x : noise(count, 1)) passed.push_back(bf16(x > 0 ? x : 0));
  const lab::Array<bf16> out = lab.input(passed), dx = lab.updated<bf16>(count, 2, 1, true);
  const lab::Array<float> partials = lab.output<float>(partials_size(rows, OC)), dbias = lab.output<float>(OC);
  if (lab.checks()) {
    std::vector<double> want = dx.values(), sums(OC);
    ::relu_backward(want.data(), out.values().data(), count);
    for (size_t i = 0; i < count; i++) sums[i % OC] += want[i];
    dx.expect(want, 0x1p-24);                           // only the correct 16 bits pass
    dbias.expect(sums, 4 * std::sqrt(rows) * 0x1p-24);  // how far float sums of that many terms may be off
  }
  lab.needs(3.0 * double(count) * sizeof(bf16) + 4.0 * OC, 0);

  const dim3 grid(ceil_div(OC, 256), ceil_div(rows, sums_block_rows));
  const auto add = [=](int set, cudaStream_t stream) {
    add_partials({sums_of(dbias[set], partials[set], rows, OC)}, stream);
  };
  lab.version({1, "a thread has a column", 11000}, [=](int set, cudaStream_t stream) {
    launch(relu_backward_1, {unsigned(ceil_div(OC, 128)), 128, 0, stream}, dx[set], dbias[set], out[set], rows, OC);
  });
  lab.version({2, "two passes", 72}, [=](int set, cudaStream_t stream) {
    launch(relu_backward_2, {unsigned(ceil_div(count / 8, 256)), 256, 0, stream}, dx[set], out[set], count / 8);
    column_partials(partials[set], dx[set], rows, OC, OC, stream);
    add(set, stream);
  });
  lab.version({3, "one pass: a thread has 8 columns of 64 rows", 85}, [=](int set, cudaStream_t stream) {
    launch(relu_backward_3, {grid, 32, 0, stream}, dx[set], partials[set], out[set], rows, OC);
    add(set, stream);
  });
  lab.version({4, "eight warps share the 64 rows", 56}, [=](int set, cudaStream_t stream) {
    launch(relu_backward_4, {grid, 256, 0, stream}, dx[set], partials[set], out[set], rows, OC);
    add(set, stream);
  });
  lab.version({5, "shipped: four rows under way, the last rows first", 49}, [=](int set, cudaStream_t stream) {
    relu_backward(dx[set], partials[set], out[set], rows, OC, stream);
    add(set, stream);
  });
}
// Sizes: one row; a last block of rows that is not full; columns for two blocks, of which the second is not full.
const lab::Listed listed({"relu_backward", describe, {{1, 1, 8}, {3, 31, 48}, {2, 33, 72}}});

}  // namespace
