// The sums of a matrix's columns: sums[c] = the sum of x[r][c] over all rows r. In the model it is the gradient of the
// head's bias: 16384 rows of V = 65 columns. A row is 72 elements long; the last seven are padding.
//
// It reads 2.4 MB. The kernel before has just written them, and the cache still has them, so bytes are not the limit.
// The limit is how many loads are under way at once. All versions add in a fixed order, without atomics.
//
//   1  a thread has a column         65 threads, on a card with room for 270 000, and each goes down 16384 rows.
//   2  a block has 32 columns        32 warps share the rows. Their sums meet in shared memory. Now 3 blocks work, and
//                                    129 of the 132 multiprocessors have nothing to do.
//   3  two steps                     A block has 64 rows of 32 columns and writes its sums to memory: 768 blocks.
//                                    A second kernel adds up these partial sums, called partials. It is version 1
//                                    again, but each of its 65 threads has 256 numbers to add, not 16384.
//   4  the second step by groups     Eight threads share a column of partials: add_partials, the shipped second step.
//   5  the shipped kernel            A lane has eight columns, 16 bytes at a time, and loads four rows before it adds.
#include "../../kernels/column_sums.cuh"

#include <limits>

#include "lab.cuh"

namespace {

// Launched with ceil(OC / 128) blocks of 128 threads.
//   sums (OC) =;  x (rows, OC), a row of which is ld elements long
__global__ void __launch_bounds__(128) column_sums_1(float* sums, const bf16* x, int rows, int OC, int ld) {
  const int c = blockIdx.x * 128 + threadIdx.x;
  if (c >= OC) return;
  float sum = 0;
  for (int r = 0; r < rows; r++) sum += float(x[size_t(r) * ld + c]);
  sums[c] = sum;
}

// The sum of `own` over the block's warps, lane by lane: lane l of the first warp gets the sum over the lanes l of all
// warps. The other warps get 0.
template <int WARPS>
__device__ inline float sum_of_warps(float own) {
  __shared__ float warp_sums[WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  warp_sums[warp][lane] = own;
  __syncthreads();
  float total = 0;
  if (warp == 0)
    for (int w = 0; w < WARPS; w++) total += warp_sums[w][lane];
  return total;
}

// Launched with ceil(OC / 32) blocks of 1024 threads: a lane has a column, the 32 warps take turns at the rows.
//   sums (OC) =;  x (rows, OC), a row of which is ld elements long
__global__ void __launch_bounds__(1024) column_sums_2(float* sums, const bf16* x, int rows, int OC, int ld) {
  const int c = blockIdx.x * 32 + threadIdx.x % 32;
  float own = 0;
  if (c < OC)
    for (int r = threadIdx.x / 32; r < rows; r += 32) own += float(x[size_t(r) * ld + c]);
  const float total = sum_of_warps<32>(own);  // threads without a column call it, too: it has a barrier
  if (threadIdx.x < 32 && c < OC) sums[c] = total;
}

// Launched with (ceil(OC / 32), ceil(rows / 64)) blocks of 256 threads: a block has 64 rows of 32 columns, a lane has a
// column, and the eight warps take turns at the rows.
//   partials (ceil(rows / 64), OC) =;  x (rows, OC), a row of which is ld elements long
__global__ void __launch_bounds__(256) column_sums_3(float* partials, const bf16* x, int rows, int OC, int ld) {
  const int c = blockIdx.x * 32 + threadIdx.x % 32, first = blockIdx.y * sums_block_rows;
  const int end = min(rows, first + sums_block_rows);
  float own = 0;
  if (c < OC)
    for (int r = first + threadIdx.x / 32; r < end; r += 8) own += float(x[size_t(r) * ld + c]);
  const float total = sum_of_warps<8>(own);
  if (threadIdx.x < 32 && c < OC) partials[size_t(blockIdx.y) * OC + c] = total;
}

// The second step of version 3, launched with ceil(OC / 128) blocks of 128 threads.
//   sums (OC) =;  partials (blocks, OC)
__global__ void __launch_bounds__(128) column_sums_3_add(float* sums, const float* partials, int blocks, int OC) {
  const int c = blockIdx.x * 128 + threadIdx.x;
  if (c >= OC) return;
  float sum = 0;
  for (int k = 0; k < blocks; k++) sum += partials[size_t(k) * OC + c];
  sums[c] = sum;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), OC = s.V, ld = ceil_div(OC, 8) * 8;
  // The padding is NaN: a version that adds it to a sum gets NaN.
  std::vector<bf16> padded(size_t(rows) * ld, bf16(std::numeric_limits<float>::quiet_NaN()));
  const std::vector<float> numbers = noise(size_t(rows) * OC, 1);
  for (size_t i = 0; i < numbers.size(); i++) padded[i / OC * ld + i % OC] = bf16(numbers[i]);
  const lab::Array<bf16> x = lab.input(padded, true);
  const lab::Array<float> partials = lab.output<float>(partials_size(rows, OC)), sums = lab.output<float>(OC);
  if (lab.checks()) {
    const std::vector<double> values = rounded<bf16>(numbers);
    std::vector<double> want(OC);
    for (size_t i = 0; i < values.size(); i++) want[i % OC] += values[i];
    sums.expect(want, 4 * std::sqrt(rows) * 0x1p-24);  // how far float sums of that many terms may be off
  }
  lab.needs(double(rows) * ld * sizeof(bf16) + 4.0 * OC, 0);

  const unsigned blocks = unsigned(ceil_div(rows, sums_block_rows)), strips = unsigned(ceil_div(OC, 32));
  lab.version({1, "a thread has a column", 2500}, [=](int set, cudaStream_t stream) {
    launch(column_sums_1, {unsigned(ceil_div(OC, 128)), 128, 0, stream}, sums[set], x[set], rows, OC, ld);
  });
  lab.version({2, "a block has 32 columns", 80}, [=](int set, cudaStream_t stream) {
    launch(column_sums_2, {strips, 1024, 0, stream}, sums[set], x[set], rows, OC, ld);
  });
  lab.version({3, "two steps: sums of 64 rows, then their sums", 30}, [=](int set, cudaStream_t stream) {
    launch(column_sums_3, {{strips, blocks}, 256, 0, stream}, partials[set], x[set], rows, OC, ld);
    launch(column_sums_3_add, {unsigned(ceil_div(OC, 128)), 128, 0, stream}, sums[set], partials[set], int(blocks), OC);
  });
  lab.version({4, "the second step by eight threads a column", 9}, [=](int set, cudaStream_t stream) {
    launch(column_sums_3, {{strips, blocks}, 256, 0, stream}, partials[set], x[set], rows, OC, ld);
    add_partials({sums_of(sums[set], partials[set], rows, OC)}, stream);
  });
  lab.version({5, "shipped: 16 bytes at a time, four rows at once", 7}, [=](int set, cudaStream_t stream) {
    column_partials(partials[set], x[set], rows, OC, ld, stream);
    add_partials({sums_of(sums[set], partials[set], rows, OC)}, stream);
  });
}
// Sizes: one row; a last block of rows that is not full; columns for several strips of 32, the last not full.
const lab::Listed listed({"column_sums", describe, {{1, 1, 8}, {5, 31, 8}, {2, 33, 8, 1, 264}, {5, 13, 8, 1, 8}}});

}  // namespace
