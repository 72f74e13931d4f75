// The product of a linear layer, forward: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T, in bf16, with sums in
// float. It is timed at the shape of the feed-forward layer's first product, OC = 4 C.
//
// It reads and writes 64 MB, which an H100 copies in 21 us, and computes 19.3 GFLOP, for which the tensor cores need 24
// us. All versions add up the same products; they differ in how often they load each number.
//
//   1  a thread has an element       It loads two numbers for each product that it adds. Neighbouring threads read
//                                    weights that lie a whole row apart: of 32 bytes, a thread uses two at a time.
//   2  tiles in shared memory        16 x 16 threads load a tile of each operand together. Neighbours load neighbouring
//                                    numbers, and each number serves 16 threads. But there are still two loads, from
//                                    shared memory, for each product.
//   3  a thread has 8 x 8 elements   Its sums are in registers, so 16 numbers from shared memory serve 64 products. Now
//                                    the float units are the limit.
//   4  tensor cores                  They multiply small matrices. The 32 lanes of a warp together pass a 16 x 16 and a
//                                    16 x 8 matrix to one instruction, which adds up 2048 products. Now waiting is the
//                                    limit: a block computes nothing until its tiles have come.
//   5  loads in the background       The next tiles arrive, by cp.async, while these are in use.
//   6  the shipped product           cuBLASLt. The trainer times several of its algorithms and takes the fastest.
//
// device.cuh has the instructions that versions 4 and 5 use: mma_16x8x16, ldmatrix_x4, copy_async_16.
#include "../../kernels/matmul.cuh"
#include "../../kernels/matmul.h"

#include <optional>

#include "lab.cuh"

namespace {

// Launched with (ceil(OC / 32), ceil(rows / 8)) blocks of 256 threads: a block has 8 rows and 32 columns of out.
//   out (rows, OC) =;  inp (rows, C), weight (OC, C)
__global__ void __launch_bounds__(256)
    matmul_1(bf16* out, const bf16* inp, const bf16* weight, int rows, int C, int OC) {
  const int row = blockIdx.y * 8 + threadIdx.x / 32, o = blockIdx.x * 32 + threadIdx.x % 32;
  if (row >= rows || o >= OC) return;
  float sum = 0;
  for (int c = 0; c < C; c++) sum += float(inp[size_t(row) * C + c]) * float(weight[size_t(o) * C + c]);
  out[size_t(row) * OC + o] = bf16(sum);
}

// Launched with (ceil(OC / 16), ceil(rows / 16)) blocks of 256 threads: a block has 16 x 16 elements of out.
__global__ void __launch_bounds__(256)
    matmul_2(bf16* out, const bf16* inp, const bf16* weight, int rows, int C, int OC) {
  constexpr int tile = 16;
  __shared__ float a[tile][tile], b[tile][tile + 1];  // of inp, of weight; + 1: so a column of b lies in 16 banks
  const int first_row = blockIdx.y * tile, first_o = blockIdx.x * tile;
  const int i = threadIdx.x / tile, j = threadIdx.x % tile;
  float sum = 0;
  for (int c = 0; c < C; c += tile) {
    // 1. A thread loads one number of each tile, or zero where inp or weight ends.
    a[i][j] = first_row + i < rows && c + j < C ? float(inp[size_t(first_row + i) * C + c + j]) : 0;
    b[i][j] = first_o + i < OC && c + j < C ? float(weight[size_t(first_o + i) * C + c + j]) : 0;
    __syncthreads();
    // 2. It adds the products of row i of a and row j of b.
    for (int k = 0; k < tile; k++) sum += a[i][k] * b[j][k];
    __syncthreads();  // before anyone overwrites the tiles
  }
  if (first_row + i < rows && first_o + j < OC) out[size_t(first_row + i) * OC + first_o + j] = bf16(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Versions 3, 4 and 5 are launched with (ceil(OC / 128), ceil(rows / 128)) blocks of 256 threads: a block has a tile of
// 128 x 128 elements of out. C is a multiple of 8, so a chunk lies within its row or behind it, never half.

constexpr int tile = 128;
dim3 tiles_of(int rows, int OC) { return dim3(ceil_div(OC, tile), ceil_div(rows, tile)); }

// A thread has rows i ... i + 7 of the tile, and columns j ... j + 3 and j + 64 ... j + 67. The columns are in two
// pieces so that eight neighbouring threads read 128 neighbouring bytes of shared memory, no two from the same bank.
__global__ void __launch_bounds__(256)
    matmul_3(bf16* out, const bf16* inp, const bf16* weight, int rows, int C, int OC) {
  constexpr int depth = 16;
  __shared__ __align__(16) float a[depth][tile], b[depth][tile];  // columns c ... c + 15 of inp and weight, transposed
  const int first_row = blockIdx.y * tile, first_o = blockIdx.x * tile;
  const int i = threadIdx.x / 16 * 8, j = threadIdx.x % 16 * 4;
  float sum[8][8] = {};
  for (int c = 0; c < C; c += depth) {
    // 1. A thread loads eight numbers of a row for each tile.
    const int row = threadIdx.x % tile, k8 = threadIdx.x / tile * 8;
    const bool inside = c + k8 < C;
    const Float8 x = inside && first_row + row < rows ? load8(inp + size_t(first_row + row) * C + c + k8) : Float8{};
    const Float8 y = inside && first_o + row < OC ? load8(weight + size_t(first_o + row) * C + c + k8) : Float8{};
    for (int k = 0; k < 8; k++) a[k8 + k][row] = x[k], b[k8 + k][row] = y[k];
    __syncthreads();
    // 2. For each k it loads eight numbers of a and eight of b, and adds their 64 products.
    for (int k = 0; k < depth; k++) {
      const Float8 u = load8(&a[k][i]);
      Float8 v;
      for (int n = 0; n < 4; n++) v[n] = b[k][j + n], v[n + 4] = b[k][j + n + 64];
#pragma unroll
      for (int m = 0; m < 8; m++)
#pragma unroll
        for (int n = 0; n < 8; n++) sum[m][n] += u[m] * v[n];
    }
    __syncthreads();
  }
  // 3. Round and store, four numbers at a time.
  for (int m = 0; m < 8; m++)
    for (int n = 0; n < 8; n += 4) {
      const int row = first_row + i + m, o = first_o + j + n * 16;
      if (row < rows && o < OC)
        *reinterpret_cast<uint2*>(out + size_t(row) * OC + o) = {pack2<bf16>(sum[m][n], sum[m][n + 1]),
                                                                 pack2<bf16>(sum[m][n + 2], sum[m][n + 3])};
    }
}

// In versions 4 and 5, each of the block's eight warps has 64 rows and 32 columns of the tile: 4 x 4 matrices of 16 x
// 8, as the tensor cores make them. device.cuh shows which of their numbers a lane holds.
constexpr int depth = 32;
struct alignas(16) Tiles {
  // Rows lie 80 bytes apart. ldmatrix reads 16 bytes of eight rows at once; at this distance each row has four banks of
  // its own.
  bf16 a[tile][depth + 8], b[tile][depth + 8];  // columns c ... c + 31 of inp and weight
};
using Sums = float[4][4][4];  // 16 rows, 8 columns, and the lane's four numbers

// to (128, 32) = rows first ... first + 127 and columns c ... c + 31 of x (count, C); zeros where x ends. ASYNC: the
// copy goes on in the background
template <bool ASYNC>
__device__ inline void fetch(bf16 (&to)[tile][depth + 8], const bf16* x, int first, int count, int c, int C) {
  for (int turn = 0; turn < tile * depth / 8 / 256; turn++) {  // the compiler knows the number of turns and unrolls
    const int i = turn * 256 + threadIdx.x, row = i / (depth / 8), k = i % (depth / 8) * 8;
    const bf16* const from = x + size_t(first + row) * C + c + k;
    const bool inside = first + row < count && c + k < C;
    if constexpr (ASYNC)
      copy_async_16(&to[row][k], from, inside);
    else
      *reinterpret_cast<uint4*>(&to[row][k]) = inside ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  }
}

// sums (64, 32) += rows i ... i + 63 of a @ (rows j ... j + 31 of b)^T
__device__ inline void multiply(Sums& sums, const Tiles& tiles, int i, int j) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    // 1. The operands: shared -> registers. Each lane gives ldmatrix the address of eight numbers of a row. For a:
    //    lanes 0-15 rows 0-15, lanes 16-31 the same rows' next eight numbers. For b: lanes 0-7 rows 0-7, lanes 8-15 the
    //    same rows' next eight numbers; lanes 16-23 rows 8-15, lanes 24-31 their next eight numbers.
    uint32_t a[4][4], b[2][4];
    for (int m = 0; m < 4; m++) ldmatrix_x4(a[m], &tiles.a[i + m * 16 + lane % 16][k + lane / 16 * 8]);
    for (int n = 0; n < 2; n++)
      ldmatrix_x4(b[n], &tiles.b[j + n * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
      // 2. Six loads serve 16 instructions of the tensor cores.
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
      for (int n = 0; n < 4; n++) mma_16x8x16<bf16>(sums[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
  }
}

// Rounds sums (64, 32) and stores them in out, from row `row` and column o on.
__device__ inline void store(bf16* out, const Sums& sums, int row, int o, int rows, int OC) {
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; m++)
    for (int n = 0; n < 4; n++)
      for (int half = 0; half < 2; half++) {
        const int r = row + m * 16 + half * 8 + lane / 4, at = o + n * 8 + lane % 4 * 2;
        if (r < rows && at < OC)
          *reinterpret_cast<uint32_t*>(out + size_t(r) * OC + at) =
              pack2<bf16>(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
}

__global__ void __launch_bounds__(256)
    matmul_4(bf16* out, const bf16* inp, const bf16* weight, int rows, int C, int OC) {
  __shared__ Tiles tiles;
  const int first_row = blockIdx.y * tile, first_o = blockIdx.x * tile, warp = threadIdx.x / 32;
  const int i = warp / 4 * 64, j = warp % 4 * 32;
  Sums sums = {};
  for (int c = 0; c < C; c += depth) {
    fetch<false>(tiles.a, inp, first_row, rows, c, C);
    fetch<false>(tiles.b, weight, first_o, OC, c, C);
    __syncthreads();
    multiply(sums, tiles, i, j);
    __syncthreads();
  }
  store(out, sums, first_row + i, first_o + j, rows, OC);
}

__global__ void __launch_bounds__(256)
    matmul_5(bf16* out, const bf16* inp, const bf16* weight, int rows, int C, int OC) {
  __shared__ Tiles stages[2];
  const int first_row = blockIdx.y * tile, first_o = blockIdx.x * tile, warp = threadIdx.x / 32;
  const int i = warp / 4 * 64, j = warp % 4 * 32;
  const auto begin_to_fetch = [&](Tiles& to, int c) {
    fetch<true>(to.a, inp, first_row, rows, c, C);
    fetch<true>(to.b, weight, first_o, OC, c, C);
    copy_async_commit();
  };
  Sums sums = {};
  begin_to_fetch(stages[0], 0);
  for (int c = 0; c < C; c += depth) {
    // 1. Wait for this step's tiles. After the barrier all threads' copies are there, and no warp uses the tiles of the
    //    step before any more.
    copy_async_wait<0>();
    __syncthreads();
    // 2. Begin to copy the next tiles into the other stage. They arrive while we multiply.
    const int stage = c / depth % 2;
    if (c + depth < C) begin_to_fetch(stages[1 - stage], c + depth);
    multiply(sums, stages[stage], i, j);
  }
  store(out, sums, first_row + i, first_o + j, rows, OC);
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), C = s.C, OC = 4 * C;
  const lab::Array<bf16> inp = lab.noise<bf16>(size_t(rows) * C, 1, 1, true),
                         weight = lab.noise<bf16>(size_t(OC) * C, 2, 0.02), out = lab.output<bf16>(size_t(rows) * OC);
  if (lab.checks()) {
    std::vector<double> want(size_t(rows) * OC);
    ::reference::matmul_forward<double>(want.data(), inp.values().data(), weight.values().data(), nullptr, rows, C, OC);
    out.expect(want, rounding_of<bf16> + 4 * std::sqrt(C) * 0x1p-24);  // out is rounded, and so are sums of C floats
  }
  lab.needs(2.0 * (double(rows) * C + double(OC) * C + double(rows) * OC), 2.0 * rows * C * OC);

  const auto version = [&](const lab::Version& v, auto kernel, const dim3& grid) {
    lab.version(v, [=](int set, cudaStream_t stream) {
      launch(kernel, {grid, 256, 0, stream}, out[set], inp[set], weight[set], rows, C, OC);
    });
  };
  version({1, "a thread has an element", 30000}, matmul_1, dim3(ceil_div(OC, 32), ceil_div(rows, 8)));
  version({2, "tiles in shared memory", 4000}, matmul_2, dim3(ceil_div(OC, 16), ceil_div(rows, 16)));
  version({3, "a thread has 8 x 8 elements", 500}, matmul_3, tiles_of(rows, OC));
  version({4, "tensor cores", 120}, matmul_4, tiles_of(rows, OC));
  version({5, "loads in the background", 75}, matmul_5, tiles_of(rows, OC));
  // A Matmul belongs to a stream, and chooses its algorithm in the first launch.
  const auto library = std::make_shared<std::optional<Matmul>>();
  lab.version({6, "shipped: cuBLASLt", 34}, [=](int set, cudaStream_t stream) {
    if (!*library) library->emplace(false, stream);
    (*library)->forward(out[set], inp[set], weight[set], nullptr, rows, C, OC, OC);
  });
}
const lab::Listed listed({"matmul", describe, {{3, 31, 48}, {1, 1, 8}, {5, 31, 24}, {1, 3, 136}}});

}  // namespace
