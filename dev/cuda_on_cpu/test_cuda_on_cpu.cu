// CUDA on the CPU (dev/cuda_on_cpu): right kernels give right results in every order of their threads, and the engine
// reports wrong ones. Hidden test cases hold mistakes that only a sanitizer sees. In builds with that sanitizer, the
// last test cases run them as programs of their own.
#include "../../test/cuda.h"

#ifdef CUDA_ON_CPU
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN
#elif defined(__SANITIZE_THREAD__)
#define WITH_TSAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN
#elif __has_feature(thread_sanitizer)
#define WITH_TSAN
#endif
#endif

namespace {

constexpr float nan32 = std::numeric_limits<float>::quiet_NaN(), inf32 = std::numeric_limits<float>::infinity();

#ifdef WITH_TSAN  // ThreadSanitizer is slow with many threads
constexpr int n_seeds = 3;
#else
constexpr int n_seeds = 11;
#endif

// Runs body for the seeds 0 ... n - 1.
template <class Body>
void for_each_seed(int n, Body body) {
  const int before = cuda_on_cpu::set_seed(0);
  for (int seed = 0; seed < n; seed++) {
    cuda_on_cpu::set_seed(seed);
    INFO("seed " << seed);
    body();
  }
  cuda_on_cpu::set_seed(before);
}

// The message of the CudaError that body raises, or that waiting for its launches raises.
template <class Body>
std::string failure_of(Body body) {
  try {
    body();
    CUDA_CHECK(cudaDeviceSynchronize());
  } catch (const CudaError& e) { return e.what(); }
  return "no error";
}

// Runs a hidden test case as a program of its own.
Run run_alone(const std::string& test_case, const std::string& environment = "") {
  return run(environment + " '" + std::filesystem::read_symlink("/proc/self/exe").string() + "' '" + test_case + "'");
}

template <class Kernel>
void launch_early(Kernel kernel, unsigned threads, float* x) {
  choices().kernel_starts = 2;
  launch(kernel, {1, threads}, x);
  choices().kernel_starts = 1;
}

std::vector<float> counting(int n) {
  std::vector<float> x;
  for (int i = 0; i < n; i++) x.push_back(float(i));
  return x;
}

}  // namespace

// No unnamed namespace for kernels: the linker must export their names for reports.
namespace on_cpu {

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and shared memory

// out (gridDim.x, blockDim.x) = every block's x in reverse, added up over `rounds` rotations
__global__ void turn_kernel(float* out, const float* x, int rounds) {
  __shared__ float fixed[1024];
  float* chosen = dynamic_smem<float>();
  const int t = int(threadIdx.x), n = int(blockDim.x);
  const size_t at = size_t(blockIdx.x) * blockDim.x;
  fixed[t] = x[at + t];
  float sum = 0;
  for (int round = 0; round < rounds; round++) {
    __syncthreads();
    chosen[n - 1 - t] = fixed[(t + round) % n];
    __syncthreads();
    sum += chosen[t];
  }
  out[at + t] = sum;
}

__global__ void count_kernel(int* out) {
  const int t = int(threadIdx.x);
  const int count = __syncthreads_count(t % 3 == 0), any = __syncthreads_or(t == 77), none = __syncthreads_or(t > 1000);
  const int all = __syncthreads_and(t < 1000), not_all = __syncthreads_and(t != 5);
  out[t] = count * 16 + any * 8 + none * 4 + all * 2 + not_all;
}

// Writes the order in which the threads of all blocks run, before and after a barrier.
__global__ void order_kernel(int* out, int* count) {
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int turn = 0; turn < 2; turn++) {
    out[atomicAdd(count, 1)] = thread;
    __syncthreads();
  }
}

// x (64) = x in reverse, + 1. MISTAKE 1: reads before it waits for the launch before; 2: does not wait.
template <int MISTAKE>
__global__ void turn_around(float* x) {
  const int t = int(threadIdx.x);
  if (MISTAKE == 0) cudaGridDependencySynchronize();
  const float other = x[63 - t];
  if (MISTAKE == 1) cudaGridDependencySynchronize();
  __syncthreads();
  x[t] = other + 1;
  cudaTriggerProgrammaticLaunchCompletion();
}

// Copies unwritten shared memory to out (gridDim.x, 128), then writes that memory.
__global__ void unwritten_kernel(unsigned* out) {
  __shared__ unsigned fixed[64];
  unsigned* chosen = dynamic_smem<unsigned>();
  const size_t at = size_t(blockIdx.x) * 128 + threadIdx.x;
  out[at] = fixed[threadIdx.x];
  out[at + 64] = chosen[threadIdx.x];
  fixed[threadIdx.x] = chosen[threadIdx.x] = 1;
}

}  // namespace on_cpu

TEST_CASE("CUDA on the CPU: threads meet at barriers, in any order", "[cuda_on_cpu]") {
  for (const int n : {1, 32, 96, 100, 1024}) {
    const int blocks = 3, rounds = 5;
    const std::vector<float> x = counting(blocks * n);
    std::vector<float> want(x.size());
    for (int b = 0; b < blocks; b++)
      for (int t = 0; t < n; t++)
        for (int round = 0; round < rounds; round++) want[b * n + t] += x[b * n + (n - 1 - t + round) % n];
    const DeviceArray<float> in(x);
    for_each_seed(n_seeds, [&] {
      const DeviceArray<float> out(x.size());
      launch(on_cpu::turn_kernel, {blocks, n, n * sizeof(float)}, out.data(), in.data(), rounds);
      CHECK((out.read() == want));
    });
  }
  for_each_seed(n_seeds, [&] {
    const DeviceArray<int> out(128);
    launch(on_cpu::count_kernel, {1, 128}, out.data());
    CHECK((out.read() == std::vector<int>(128, 43 * 16 + 8 + 2)));
  });
}

TEST_CASE("CUDA on the CPU: seed 0 is in order, the others differ, and each is the same every time", "[cuda_on_cpu]") {
  const int blocks = 4, n = 64;
  const auto order = [&] {
    const DeviceArray<int> out(2 * blocks * n), count(std::vector<int>{0});
    launch(on_cpu::order_kernel, {blocks, n}, out.data(), count.data());
    return out.read();
  };
  std::vector<int> in_order;
  for (int b = 0; b < blocks; b++)
    for (int i = 0; i < 2 * n; i++) in_order.push_back(b * n + i % n);
  std::vector<std::vector<int>> orders;
  for (int again = 0; again < 2; again++) for_each_seed(5, [&] { orders.push_back(order()); });
  CHECK((orders[0] == in_order));
  for (size_t a = 0; a < 5; a++) {
    CHECK((orders[a] == orders[a + 5]));
    for (size_t b = 0; b < a; b++) CHECK((orders[a] != orders[b]));
    if (a == 0) continue;
    const std::vector<int>& o = orders[a];
    CHECK((std::vector<int>{o[0] / n, o[2 * n] / n, o[4 * n] / n} != std::vector<int>{0, 1, 2}));  // the blocks' order
    for (const int turn : {0, 1}) {  // counts threads of the first block that run right after their neighbour
      int in_order_here = 0;
      for (int i = turn * n + 1; i < turn * n + n; i++) in_order_here += o[i] == o[i - 1] + 1;
      CHECK(in_order_here < n / 2);
    }
  }
}

TEST_CASE("CUDA on the CPU: shared and fresh device memory are all ones", "[cuda_on_cpu]") {
  for_each_seed(3, [] {
    const DeviceArray<unsigned> out(3 * 128);
    launch(on_cpu::unwritten_kernel, {3, 64, 64 * sizeof(unsigned)}, out.data());
    CHECK((out.read() == std::vector<unsigned>(3 * 128, ~0u)));
    std::vector<unsigned> fresh(1000);
    unsigned* memory = nullptr;
    CUDA_CHECK(cudaMalloc(&memory, fresh.size() * sizeof(unsigned)));
    CUDA_CHECK(cudaMemcpy(fresh.data(), memory, fresh.size() * sizeof(unsigned), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(memory));
    CHECK((fresh == std::vector<unsigned>(1000, ~0u)));
  });
  CHECK(std::isnan(__uint_as_float(~0u)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps

namespace on_cpu {

// out (4, 32): what each lane receives from the four kinds of shuffle
template <class Value>
__global__ void shuffle_kernel(Value* out, const Value* x, int by, int width) {
  const int l = int(threadIdx.x);
  out[l] = __shfl_sync(all_lanes, x[l], by + l, width);
  out[l + 32] = __shfl_xor_sync(all_lanes, x[l], by, width);
  out[l + 64] = __shfl_down_sync(all_lanes, x[l], unsigned(by), width);
  out[l + 96] = __shfl_up_sync(all_lanes, x[l], unsigned(by), width);
}

// out (9, 32): only the lanes of the mask take part
__global__ void vote_kernel(int* out, const int* x, unsigned mask) {
  const int l = int(threadIdx.x), v = x[l];
  if (!(mask >> l & 1)) return;
  out[l] = int(__ballot_sync(mask, v > 0));
  out[l + 32] = __any_sync(mask, v > 0);
  out[l + 64] = __all_sync(mask, v > 0);
  out[l + 96] = __reduce_add_sync(mask, v);
  out[l + 128] = __reduce_min_sync(mask, v);
  out[l + 160] = __reduce_max_sync(mask, v);
  out[l + 192] = int(__reduce_min_sync(mask, unsigned(v)));
  out[l + 224] = int(__reduce_and_sync(mask, unsigned(v)));
  out[l + 256] = int(__reduce_or_sync(mask, unsigned(v)));
}

// Lanes pass numbers on through shared memory; then each block counts itself in `counter`.
__global__ void relay_kernel(int* out, unsigned* counter) {
  __shared__ int line[4][32];
  const int w = int(threadIdx.x / 32), l = int(threadIdx.x % 32);
  line[w][l] = l;
  for (int i = 0; i < 5; i++) {
    __syncwarp();
    const int next = line[w][(l + 1) % 32];
    __syncwarp();
    line[w][l] = next;
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = line[w][l];
  if (threadIdx.x == 0 && atomicAdd(counter, 1u) == gridDim.x - 1) {
    atomicMax(counter, 100u);  // the last block also tries the other atomics
    atomicMin(counter, 90u);
    atomicOr(counter, 128u);
    atomicSub(counter, 18u);
    atomicCAS(counter, 200u, 7u);
    atomicCAS(counter, 1u, 8u);
    atomicAnd(counter, 5u);
  }
}

}  // namespace on_cpu

TEMPLATE_TEST_CASE("CUDA on the CPU: shuffles", "[cuda_on_cpu]", float, double, int) {
  std::vector<TestType> x(32);
  for (int l = 0; l < 32; l++) x[l] = TestType(l * l + 1);
  const DeviceArray<TestType> in(x);
  for (const int width : {1, 2, 4, 8, 16, 32})
    for (const int by : {0, 1, 2, 3, 7, 16, 31}) {
      // Lanes form groups of `width`. A lane whose source lies outside its group keeps its own value, but xor may reach
      // into the groups before.
      std::vector<TestType> want;
      const auto group = [&](int l) { return l / width; };
      for (int l = 0; l < 32; l++) want.push_back(x[group(l) * width + (by + l) % width]);
      for (int l = 0; l < 32; l++) want.push_back(group(l ^ by) <= group(l) ? x[l ^ by] : x[l]);
      for (int l = 0; l < 32; l++) want.push_back(group(l + by) == group(l) ? x[l + by] : x[l]);
      for (int l = 0; l < 32; l++) want.push_back(l >= by && group(l - by) == group(l) ? x[l - by] : x[l]);
      INFO("width " << width << ", by " << by);
      for_each_seed(5, [&] {
        const DeviceArray<TestType> out(128);
        launch(on_cpu::shuffle_kernel<TestType>, {1, 32}, out.data(), in.data(), by, width);
        CHECK((out.read() == want));
      });
    }
}

TEST_CASE("CUDA on the CPU: votes and reductions, also of some lanes", "[cuda_on_cpu]") {
  for (const unsigned mask : {~0u, 0x0000ffffu, 0xf0f0f0f0u, 1u << 31})
    for (const int offset : {-40, -10, 1}) {
      std::vector<int> x(32), want(9 * 32, -1);
      int ballot = 0, all = 1, sum = 0, least = INT32_MAX, most = INT32_MIN;
      unsigned least_unsigned = ~0u, bits_and = ~0u, bits_or = 0;
      for (int l = 0; l < 32; l++) {
        const int v = x[l] = l * 37 % 32 + offset;
        if (!(mask >> l & 1)) continue;
        ballot |= int(unsigned(v > 0) << l);
        all &= v > 0;
        sum += v;
        least = std::min(least, v);
        most = std::max(most, v);
        least_unsigned = std::min(least_unsigned, unsigned(v));
        bits_and &= unsigned(v);
        bits_or |= unsigned(v);
      }
      const int results[] = {ballot, ballot != 0,         all,           sum,         least,
                             most,   int(least_unsigned), int(bits_and), int(bits_or)};
      for (int i = 0; i < 9; i++)
        for (int l = 0; l < 32; l++)
          if (mask >> l & 1) want[i * 32 + l] = results[i];
      const DeviceArray<int> in(x);
      for_each_seed(5, [&] {
        const DeviceArray<int> out(9 * 32);
        launch(on_cpu::vote_kernel, {1, 32}, out.data(), in.data(), mask);
        CHECK((out.read() == want));
      });
    }
}

TEST_CASE("CUDA on the CPU: __syncwarp, and integer atomics between blocks", "[cuda_on_cpu]") {
  std::vector<int> want;
  for (int i = 0; i < 7 * 128; i++) want.push_back((i + 5) % 32);
  for_each_seed(n_seeds, [&] {
    const DeviceArray<int> out(7 * 128);
    const DeviceArray<unsigned> counter(std::vector<unsigned>{0});
    launch(on_cpu::relay_kernel, {7, 128}, out.data(), counter.data());
    CHECK((out.read() == want));
    CHECK(counter.read()[0] == 5);  // 7 blocks; 100; 90; 218; 200; 7; 7; 7 & 5
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores, background copies

namespace on_cpu {

// d (16, 8) += a (16, 16) @ b (16, 8), thrice: b's fragments by ldmatrix from b, from its transpose bt, by hand
template <class Real>
__global__ void mma_kernel(float* d, const Real* a, const Real* b, const Real* bt) {
  __shared__ __align__(16) Real sa[16][16], sb[16][16], st[16][16];  // sb uses 8 columns
  const int l = int(threadIdx.x), g = l / 4, t = l % 4 * 2;
  for (int i = l; i < 256; i += 32) {
    sa[i / 16][i % 16] = a[i];
    sb[i / 16][i % 16] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : Real(0);
    st[i / 16][i % 16] = i < 128 ? bt[i] : Real(0);
  }
  __syncwarp();
  uint32_t fa[4], fb[4], ft[4], by_hand[2];
  ldmatrix_x4(fa, &sa[l % 16][l / 16 * 8]);
  ldmatrix_x4_trans(fb, &sb[l % 16][l / 16 * 8]);
  ldmatrix_x4(ft, &st[l % 8 + l / 16 * 8][l / 8 % 2 * 8]);
  for (int i = 0; i < 2; i++) by_hand[i] = pack2<Real>(float(sb[t + i * 8][g]), float(sb[t + i * 8 + 1][g]));
  for (int kind = 0; kind < 3; kind++) {
    float sum[4];
    float* out = d + kind * 128;
    for (int i = 0; i < 4; i++) sum[i] = out[(g + i / 2 * 8) * 8 + t + i % 2];
    if (kind == 0) mma_16x8x16<Real>(sum, fa, {fb[0], fb[1]});
    if (kind == 1) mma_16x8x16<Real>(sum, fa, {ft[0], ft[1]});
    if (kind == 2) mma_16x8x16<Real>(sum, fa, by_hand);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i];
  }
}

// d (16, 8) += a (16, 8) @ b (8, 8) by TF32 numbers, which are rounded before if ROUND, else left to the tensor cores.
template <bool ROUND>
__global__ void mma_tf32_kernel(float* d, const float* a, const float* b) {
  const int l = int(threadIdx.x), g = l / 4, t = l % 4;
  float fa[4], fb[2], sum[4];
  for (int i = 0; i < 4; i++) fa[i] = a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
  for (int i = 0; i < 2; i++) fb[i] = b[(t + i * 4) * 8 + g];
  for (int i = 0; i < 4; i++) sum[i] = d[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  for (float& x : fa) x = ROUND ? round_to_tf32(x) : x;
  for (float& x : fb) x = ROUND ? round_to_tf32(x) : x;
  mma_16x8x8_tf32(sum, fa, fb);
  for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}

__global__ void round_to_tf32_kernel(float* out, const float* x) { out[threadIdx.x] = round_to_tf32(x[threadIdx.x]); }

__global__ void transpose_kernel(uint32_t* out, const uint32_t* x) { out[threadIdx.x] = transpose_8x8(x[threadIdx.x]); }

// Copies x to out (stages, 4 blockDim.x) through two buffers: we fill one while we read the other. Rows from `valid` on
// are zero. BUG 1: nobody waits for the copies; 2: no barrier before we read; 3: no barrier before we fill again.
template <int BUG>
__global__ void copy_kernel(float* out, const float* x, int stages, int valid) {
  __shared__ __align__(16) float buffer[2][4 * 64];
  const int t = int(threadIdx.x), width = 4 * int(blockDim.x);
  const auto copy = [&](int stage) {
    copy_async_16(&buffer[stage % 2][4 * t], x + std::min(stage, valid - 1) * width + 4 * t, stage < valid);
    copy_async_commit();
  };
  copy(0);
  for (int stage = 0; stage < stages; stage++) {
    if (stage + 1 < stages) copy(stage + 1);
    if (BUG != 1 && stage + 1 < stages)
      copy_async_wait<1>();
    else if (BUG != 1)
      copy_async_wait<0>();
    if (BUG != 2) __syncthreads();
    for (int i = t; i < width; i += int(blockDim.x)) out[stage * width + i] = buffer[stage % 2][width - 1 - i];
    if (BUG != 3) __syncthreads();
  }
}

}  // namespace on_cpu

TEMPLATE_TEST_CASE("CUDA on the CPU: products of tensor cores are exactly the plain loops'", "[cuda_on_cpu]", bf16,
                   fp16) {
  // Small integers and halves: every sum is exact, whatever its order.
  std::vector<float> a(256), b(128), bt(128), d(128), want, start;
  for (int i = 0; i < 256; i++) a[i] = float(i * 29 % 31 - 15) / 2;
  for (int i = 0; i < 128; i++) b[i] = float(i * 23 % 37 - 18), bt[i % 8 * 16 + i / 8] = b[i], d[i] = float(i * i % 53);
  for (int kind = 0; kind < 3; kind++)
    for (int i = 0; i < 128; i++) {
      float sum = d[i];
      for (int k = 0; k < 16; k++) sum += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
      want.push_back(sum);
      start.push_back(d[i]);
    }
  const DeviceArray<TestType> da(a), db(b), dbt(bt);
  for_each_seed(n_seeds, [&] {
    const DeviceArray<float> out(start);
    launch(on_cpu::mma_kernel<TestType>, {1, 32}, out.data(), da.data(), db.data(), dbt.data());
    CHECK((out.read() == want));
  });
}

TEST_CASE("CUDA on the CPU: products of floats take ten bits of their mantissas", "[cuda_on_cpu]") {
  // Small integers, so that every sum is exact, and to some of them we add what is lost: up to six sevenths of a unit in
  // the tensor cores, up to three by rounding before. (Halves would depend on the card.)
  std::vector<float> a(128), b(64), d(128), rounds_up(128), exact_b(64);
  const auto integer = [](int i) { return float(1024 + i * 29 % 31) * (i % 3 ? 1 : -1); };  // eleven bits
  const auto lost = [](int i) { return float(i * 5 % 7) / 7 * (i % 3 ? 1 : -1); };
  for (int i = 0; i < 128; i++) {
    a[i] = integer(i) + lost(i);
    rounds_up[i] = integer(i) + (i * 5 % 7 >= 4 ? (i % 3 ? 1.0f : -1.0f) : 0.0f);
    d[i] = float(i * i % 53);
  }
  for (int i = 0; i < 64; i++) exact_b[i] = float(i * 23 % 37 - 18), b[i] = exact_b[i] + exact_b[i] * 0x1p-12f;
  const auto product = [&](const std::vector<float>& left) {
    std::vector<float> out = d;
    for (int i = 0; i < 128; i++)
      for (int k = 0; k < 8; k++) out[i] += left[i / 8 * 8 + k] * exact_b[k * 8 + i % 8];
    return out;
  };
  std::vector<float> integers(128);
  for (int i = 0; i < 128; i++) integers[i] = integer(i);
  const DeviceArray<float> da(a), db(b);
  for_each_seed(n_seeds, [&] {
    const DeviceArray<float> truncated(d), rounded(d);
    launch(on_cpu::mma_tf32_kernel<false>, {1, 32}, truncated.data(), da.data(), db.data());
    launch(on_cpu::mma_tf32_kernel<true>, {1, 32}, rounded.data(), da.data(), db.data());
    CHECK((truncated.read() == product(integers)));
    CHECK((rounded.read() == product(rounds_up)));
  });
  const float tiny = 0x1p-149f, unit = 0x1p-10f, inf = INFINITY;
  const float more = 0.5f + 0x1p-13f, less = 0.5f - 0x1p-13f;
  const std::vector<float> x = {1,   1 + more * unit, -1 - more * unit, 1 + less * unit, -1 - less * unit, 0, inf, -inf,
                                tiny};
  const std::vector<float> want = {1, 1 + unit, -1 - unit, 1, -1, 0, inf, -inf, 0};
  const DeviceArray<float> in(x), out(x.size());
  launch(on_cpu::round_to_tf32_kernel, {1, unsigned(x.size())}, out.data(), in.data());
  CHECK((out.read() == want));
  const DeviceArray<float> nan(std::vector<float>{NAN, std::bit_cast<float>(0x7fffffffu)}), still(2);
  launch(on_cpu::round_to_tf32_kernel, {1, 2}, still.data(), nan.data());
  for (const float y : still.read()) CHECK(std::isnan(y));
#ifdef CUDA_ON_CPU
  // A sum is rounded towards zero. Row 0: 1 + 3 / 4 of a unit, row 1: -1 - 3 / 4, row 2: 1 + 1 1 / 4, row 3: infinity.
  const float ulp = 0x1p-23f;
  std::vector<float> left(128), right(64), sums(128);
  left[0] = 0.75f * ulp, left[8] = -0.75f * ulp, left[16] = 1.25f * ulp, left[24] = 0x1p127f, right[0] = 1;
  sums[0] = 1, sums[8] = -1, sums[16] = 1, sums[24] = 0x1p127f;
  const DeviceArray<float> dl(left), dr(right), ds(sums);
  launch(on_cpu::mma_tf32_kernel<true>, {1, 32}, ds.data(), dl.data(), dr.data());
  sums[16] += ulp, sums[24] = INFINITY;
  CHECK((ds.read() == sums));
#endif
}

TEST_CASE("CUDA on the CPU: an 8 x 8 matrix, transposed", "[cuda_on_cpu]") {
  std::vector<uint32_t> x(32), want(32);
  const auto element = [](int row, int column) { return uint32_t(row * 1000 + column + 1); };
  for (int l = 0; l < 32; l++) {
    x[l] = element(l / 4, l % 4 * 2) | element(l / 4, l % 4 * 2 + 1) << 16;
    want[l] = element(l % 4 * 2, l / 4) | element(l % 4 * 2 + 1, l / 4) << 16;
  }
  for_each_seed(5, [&] {
    const DeviceArray<uint32_t> in(x), out(32);
    launch(on_cpu::transpose_kernel, {1, 32}, out.data(), in.data());
    CHECK((out.read() == want));
  });
}

TEST_CASE("CUDA on the CPU: background copies, early and late", "[cuda_on_cpu]") {
  const int stages = 6, valid = 4, width = 4 * 64;
  const std::vector<float> x = counting(valid * width);
  std::vector<float> want(stages * width);
  for (int i = 0; i < valid * width; i++) want[i] = x[i / width * width + width - 1 - i % width];
  const DeviceArray<float> in(x);
  for_each_seed(n_seeds, [&] {
    const DeviceArray<float> out(stages * width);
    launch(on_cpu::copy_kernel<0>, {1, 64}, out.data(), in.data(), stages, valid);
    CHECK((out.read() == want));
  });
#ifndef WITH_TSAN  // ThreadSanitizer would report the race
  int nobody_needed_to_wait = 0;
  for_each_seed(n_seeds, [&] {
    const DeviceArray<float> out(stages * width);
    launch(on_cpu::copy_kernel<1>, {1, 64}, out.data(), in.data(), stages, valid);
    nobody_needed_to_wait += out.read() == want;
  });
  CHECK(nobody_needed_to_wait > 0);
  CHECK(nobody_needed_to_wait < n_seeds);
  for_each_seed(1, [&] {
    const DeviceArray<float> out(stages * width);
    launch(on_cpu::copy_kernel<1>, {1, 64}, out.data(), in.data(), stages, valid);
    CHECK(std::isnan(out.read()[0]));
  });
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers of 16 bits. The reference computes them by definition, in double, where everything is exact.

namespace {

struct Format {
  int digits, min_exponent;  // of the mantissa with its leading one; of the smallest normal number
  double largest;
};
template <class Real>
constexpr Format format_of = {8, -126, 0x1.fep127};
template <>
constexpr Format format_of<fp16> = {11, -14, 65504};

double nearest(double x, const Format& f) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const double unit = std::ldexp(1, std::max(std::ilogb(x), f.min_exponent) - (f.digits - 1));
  const double rounded = std::nearbyint(x / unit) * unit;  // ties to even, the processor's default
  return std::fabs(rounded) > f.largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

bool same_number(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

}  // namespace

TEMPLATE_TEST_CASE("CUDA on the CPU: numbers of 16 bits", "[cuda_on_cpu]", bf16, fp16) {
  const Format f = format_of<TestType>;
  const int exponent_bits = 16 - f.digits;
  size_t wrong = 0;
  for (uint32_t pattern = 0; pattern < 65536; pattern++) {
    const uint32_t exponent = pattern >> (f.digits - 1) & ((1u << exponent_bits) - 1);
    const uint32_t mantissa = pattern & ((1u << (f.digits - 1)) - 1);
    double want = std::ldexp(exponent ? double(mantissa) + (1 << (f.digits - 1)) : double(mantissa),
                             f.min_exponent - (f.digits - 1) + std::max(int(exponent), 1) - 1);
    if (exponent == (1u << exponent_bits) - 1) want = mantissa ? nan32 : inf32;
    if (pattern >> 15) want = -want;
    const TestType number = __builtin_bit_cast(TestType, uint16_t(pattern));
    wrong += !same_number(float(number), want);
    const uint16_t back = __builtin_bit_cast(uint16_t, TestType(float(number)));
    wrong += back != (std::isnan(want) ? 0x7fff : pattern);
    // The middle between this number and the next larger one, and the floats on either side of the middle.
    const double next = float(__builtin_bit_cast(TestType, uint16_t(pattern + 1)));
    if (!std::isfinite(want) || !std::isfinite(next) || pattern == 0x7fff) continue;
    const float middle = float((want + next) / 2);
    for (const float x : {middle, std::nextafterf(middle, inf32), std::nextafterf(middle, -inf32)})
      wrong += !same_number(float(TestType(x)), nearest(x, f));
  }
  CHECK(wrong == 0);
  for (uint64_t i = 0; i < 500000; i++) {
    const Philox4 r = random4(1, 2, 3, i);
    for (const uint32_t word : r.word) {
      const float x = __uint_as_float(word);                                // most floats are outside fp16's range;
      const float y = __uint_as_float((word & 0x87ffffffu) + (98u << 23));  // y is within it, or nearly
      wrong += !same_number(float(TestType(x)), nearest(x, f)) + !same_number(float(TestType(y)), nearest(y, f));
    }
  }
  CHECK(wrong == 0);
  for (const float x : {65504.0f, 65519.996f, 65520.0f, 65536.0f, 0x1.fefffep127f, 0x1.ffp127f, 0x1.fffffep127f, inf32,
                        0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1p-149f, 0x1p-133f, 0x1p-134f, 0.0f})
    for (const float s : {1.0f, -1.0f}) CHECK(same_number(float(TestType(s * x)), nearest(s * x, f)));
  CHECK(__builtin_bit_cast(uint16_t, TestType(-nan32)) == 0x7fff);
}

// ---------------------------------------------------------------------------------------------------------------------
// Device memory

namespace {

size_t free_memory() {
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace

TEST_CASE("CUDA on the CPU: device memory is limited, and comes back", "[cuda_on_cpu]") {
  const size_t before = free_memory();
  char* p = nullptr;
  CHECK(cudaMalloc(&p, before + 1) == cudaErrorMemoryAllocation);
  CHECK(p == nullptr);
  CHECK(contains(cudaGetErrorString(cudaErrorMemoryAllocation),
                 "out of memory: " + std::to_string(before + 1) + " bytes"));
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaMalloc(&p, 10000) == cudaSuccess);
  CHECK(uintptr_t(p) % 256 == 0);
  CHECK(free_memory() <= before - 10000);
  CHECK(cudaFree(p + 256) == cudaErrorInvalidValue);
  CHECK(cudaFree(p) == cudaSuccess);
  CHECK(cudaFree(p) == cudaErrorInvalidValue);
  CHECK(cudaFree(nullptr) == cudaSuccess);
  CHECK(free_memory() == before);

  CHECK(setenv("CUDA_ON_CPU_DEVICES", "0", 1) == 0);
  int count = -1;
  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
  CHECK(count == 0);
  CHECK(unsetenv("CUDA_ON_CPU_DEVICES") == 0);
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
  CHECK(count == 1);
}

__global__ void nothing_kernel() {}

TEST_CASE("CUDA on the CPU: cards of several kinds, some of which fail", "[cuda_on_cpu]") {
  const auto capability = [](int device) {
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, device) == cudaSuccess);
    return 10 * card.major + card.minor;
  };
  const cudaLaunchConfig_t one = {1, 1, 0, nullptr, nullptr, 0};
  int count = 0, device = 0;
  cudaDeviceProp none;
  unsetenv("CUDA_VISIBLE_DEVICES");
  setenv("CUDA_ON_CPU_DEVICES", "61 90:46 75:222", 1);
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
  CHECK(count == 3);
  CHECK(capability(0) == 61);
  CHECK(capability(2) == 75);
  CHECK(cudaGetDeviceProperties(&none, 3) == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(3) == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(1) == cudaErrorDevicesUnavailable);
  CHECK(cudaSetDevice(2) == cudaSuccess);
  CHECK(cudaGetDevice(&device) == cudaSuccess);
  CHECK(device == 2);
  CHECK(cudaLaunchKernelEx(&one, nothing_kernel) == cudaErrorUnsupportedPtxVersion);
  for (const char* visible : {"2,0", "2,0,-1,1"}) {
    setenv("CUDA_VISIBLE_DEVICES", visible, 1);
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
    CHECK(count == 2);
    CHECK(capability(0) == 75);
  }
  for (const char* hidden : {"", "-1"}) {
    setenv("CUDA_VISIBLE_DEVICES", hidden, 1);
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
  }
  unsetenv("CUDA_VISIBLE_DEVICES");
  unsetenv("CUDA_ON_CPU_DEVICES");
  CHECK(cudaSetDevice(0) == cudaSuccess);
  CHECK(cudaLaunchKernelEx(&one, nothing_kernel) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  cudaGetLastError();

  setenv("CUDA_ON_CPU_DRIVER", "12040", 1);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver);
  unsetenv("CUDA_ON_CPU_DRIVER");
}

TEST_CASE("CUDA on the CPU: little memory, used again and again", "[cuda_on_cpu]") {
  const Run little = run_alone("alone: little memory", "CUDA_ON_CPU_MEMORY=1000000");
  INFO(little.out << little.err);
  CHECK(little.code == 0);
}
TEST_CASE("alone: little memory", "[.alone]") {
  REQUIRE(free_memory() <= 1000000);
  struct Piece {
    unsigned char* memory;
    size_t size;
    int value;
  };
  std::vector<Piece> pieces, kept;
  const auto check_and_free = [](const Piece& piece) {
    std::vector<unsigned char> content(piece.size);
    CUDA_CHECK(cudaMemcpy(content.data(), piece.memory, piece.size, cudaMemcpyDeviceToHost));
    REQUIRE(std::count(content.begin(), content.end(), piece.value) == long(piece.size));
    CUDA_CHECK(cudaFree(piece.memory));
  };
  size_t bytes = 0, failed = 0;
  for (int i = 0; i < 1500; i++) {  // in total 20 times the device's memory
    const Philox4 r = random4(7, 0, 0, uint64_t(i));
    Piece piece{nullptr, r.word[0] % (i % 10 == 5 ? 200000 : 5000) + 1, i % 251};
    const size_t before = free_memory();
    if (cudaMalloc(&piece.memory, piece.size) == cudaSuccess) {
      CUDA_CHECK(cudaMemset(piece.memory, piece.value, piece.size));
      (i % 40 == 0 && i < 400 ? kept : pieces).push_back(piece);
      bytes += piece.size;
    } else {
      failed++;
      REQUIRE(piece.size + 8192 > before);
    }
    while (!pieces.empty() && (bytes > 500000 || r.word[1] % 3 == 0)) {
      const size_t which = r.word[2] % pieces.size();
      check_and_free(pieces[which]);
      bytes -= pieces[which].size;
      pieces.erase(pieces.begin() + long(which));
      if (bytes <= 500000) break;
    }
  }
  for (const std::vector<Piece>* left : {&pieces, &kept})
    for (const Piece& piece : *left) check_and_free(piece);
  CHECK(failed < 500);
  CHECK(free_memory() > 990000);
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams, events, graphs

namespace on_cpu {

__global__ void add_kernel(float* out, const float* x, float y) { out[threadIdx.x] = x[threadIdx.x] + y; }

// out += 1 / (step + thread), then step += 1: a graph's runs can differ only by what lies in device memory
__global__ void step_kernel(float* out, int* step) {
  out[threadIdx.x] += 1 / float(*step + int(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) ++*step;
}

}  // namespace on_cpu

namespace {

struct TestStream {
  cudaStream_t stream;
  explicit TestStream(unsigned flags = cudaStreamNonBlocking) { CUDA_CHECK(cudaStreamCreateWithFlags(&stream, flags)); }
  ~TestStream() { cudaStreamDestroy(stream); }
  operator cudaStream_t() const { return stream; }
};

}  // namespace

TEST_CASE("CUDA on the CPU: streams wait for events, and need to", "[cuda_on_cpu]") {
  for (const bool with_event : {true, false}) {
    int wrong = 0;
    for_each_seed(20, [&] {
      const TestStream first, second;
      cudaEvent_t event, end;
      CUDA_CHECK(cudaEventCreate(&event));
      CUDA_CHECK(cudaEventCreate(&end));
      const DeviceArray<float> x(counting(32)), y(32), z(32);
      launch(on_cpu::add_kernel, {1, 32, 0, first}, y.data(), x.data(), 1.0f);
      CUDA_CHECK(cudaEventRecord(event, first));
      if (with_event) CUDA_CHECK(cudaStreamWaitEvent(second, event, 0));
      launch(on_cpu::add_kernel, {1, 32, 0, second}, z.data(), y.data(), 1.0f);
      CUDA_CHECK(cudaEventRecord(end, second));
      std::vector<float> out(32);
      CUDA_CHECK(cudaMemcpyAsync(out.data(), z.data(), 32 * sizeof(float), cudaMemcpyDeviceToHost, second));
      CUDA_CHECK(cudaStreamSynchronize(second));
      wrong += out[31] != 33;
      float milliseconds = -1;
      if (with_event) {
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, event, end));
        CHECK(milliseconds >= 0);
      }
      CUDA_CHECK(cudaEventDestroy(event));
      CUDA_CHECK(cudaEventDestroy(end));
    });
    CHECK((wrong > 0) == !with_event);
    CHECK(wrong < 20);
  }
}

TEST_CASE("CUDA on the CPU: a kernel that may start early has to wait for the one before", "[cuda_on_cpu]") {
  const DeviceArray<float> x(std::vector<float>(64, 0));
  for (int i = 0; i < 3; i++) launch_early(on_cpu::turn_around<0>, 64, x.data());
  CHECK(x.read() == std::vector<float>(64, 3));
  const std::string message = failure_of([&] { launch_early(on_cpu::turn_around<2>, 64, x.data()); });
  CHECK(contains(message, "has ended without cudaGridDependencySynchronize()"));
  CHECK(contains(message, "on_cpu::turn_around<2>, block (0,0,0)"));
  CHECK(failure_of([&] { launch(on_cpu::turn_around<2>, {1, 64}, x.data()); }) == "no error");
}

TEST_CASE("CUDA on the CPU: the default stream and the others", "[cuda_on_cpu]") {
  for (const int variant : {0, 1, 2, 3}) {
    const unsigned flags = variant % 2 ? cudaStreamNonBlocking : cudaStreamDefault;
    const bool copy = variant / 2;
    int wrong = 0;
    for_each_seed(20, [&] {
      const TestStream stream(flags);
      const DeviceArray<float> x(counting(32)), y(32);
      std::vector<float> zeros(32);
      if (copy) {  // returns when it has read the host's memory, before all has arrived
        CUDA_CHECK(cudaMemcpy(x.data(), zeros.data(), 32 * sizeof(float), cudaMemcpyHostToDevice));
        zeros.assign(32, 7);
      } else {
        CUDA_CHECK(cudaMemset(x.data(), 0, 32 * sizeof(float)));  // does not wait either
      }
      launch(on_cpu::add_kernel, {1, 32, 0, stream}, y.data(), x.data(), 1.0f);
      CUDA_CHECK(cudaStreamSynchronize(stream));
      wrong += y.read()[31] != 1;
    });
    CHECK((wrong > 0) == (flags == cudaStreamNonBlocking));  // such a stream does not wait for the default stream
    CHECK(wrong < 20);
  }
  // Nothing runs before somebody waits for it.
  const TestStream stream;
  const DeviceArray<float> x(counting(32)), y(32);
  std::vector<float> early(32);
  launch(on_cpu::add_kernel, {1, 32, 0, stream}, y.data(), x.data(), 1.0f);
  CUDA_CHECK(cudaMemcpy(early.data(), y.data(), 32 * sizeof(float), cudaMemcpyDeviceToHost));
  int order = 0;
  CUDA_CHECK(cuda_on_cpu::enqueue(stream, [&] { order = 1; }));
  CHECK(order == 0);
  CUDA_CHECK(cudaStreamSynchronize(stream));
  CHECK(order == 1);
  CHECK(y.read()[31] == 32);
}

TEST_CASE("CUDA on the CPU: a graph is the calls that it was captured from", "[cuda_on_cpu]") {
  for_each_seed(5, [] {
    std::vector<float> results[2];
    for (const bool graph : {false, true}) {
      const TestStream stream, side;
      const DeviceArray<float> sum(std::vector<float>(32)), copy(32);
      const DeviceArray<int> step(std::vector<int>{1});
      cudaEvent_t fork, join;
      CUDA_CHECK(cudaEventCreate(&fork));
      CUDA_CHECK(cudaEventCreate(&join));
      const auto work = [&] {
        launch(on_cpu::step_kernel, {1, 32, 0, stream}, sum.data(), step.data());
        CUDA_CHECK(cudaEventRecord(fork, stream));
        CUDA_CHECK(cudaStreamWaitEvent(side, fork));
        launch(on_cpu::add_kernel, {1, 32, 0, side}, copy.data(), sum.data(), 0.5f);
        CUDA_CHECK(cudaEventRecord(join, side));
        CUDA_CHECK(cudaStreamWaitEvent(stream, join));
        CUDA_CHECK(cudaMemcpyAsync(sum.data(), copy.data(), 16 * sizeof(float), cudaMemcpyDeviceToDevice, stream));
      };
      if (graph) {
        cudaGraph_t captured;
        cudaGraphExec_t executable;
        CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work();
        float* p = nullptr;
        CHECK(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported);
        CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
        CHECK(cudaMemset(sum.data(), 0, 4) == cudaErrorStreamCaptureImplicit);
        CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
        CUDA_CHECK(cudaGraphInstantiate(&executable, captured));
        CUDA_CHECK(cudaGraphDestroy(captured));
        CHECK((sum.read() == std::vector<float>(32)));  // captured, not run
        for (int i = 0; i < 4; i++) CUDA_CHECK(cudaGraphLaunch(executable, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CUDA_CHECK(cudaGraphExecDestroy(executable));
      } else {
        for (int i = 0; i < 4; i++) work();
        CUDA_CHECK(cudaStreamSynchronize(stream));
      }
      CHECK(step.read()[0] == 5);
      results[graph] = sum.read();
      CUDA_CHECK(cudaEventDestroy(fork));
      CUDA_CHECK(cudaEventDestroy(join));
    }
    CHECK((results[0] == results[1]));
    CHECK(results[0][0] == Approx(1 + 1 / 2.0 + 1 / 3.0 + 1 / 4.0 + 4 * 0.5));
  });
}

TEST_CASE("CUDA on the CPU: streams in a graph wait where their events say so, and nowhere else", "[cuda_on_cpu]") {
  const auto run = [](int seed, bool wait) {
    const int before = cuda_on_cpu::set_seed(seed);
    const TestStream stream, side;
    std::string order;
    cudaEvent_t fork, written, join;
    for (cudaEvent_t* event : {&fork, &written, &join}) CUDA_CHECK(cudaEventCreate(event));
    const auto note = [&](cudaStream_t on, char letter) {
      CUDA_CHECK(cuda_on_cpu::enqueue(on, [&order, letter] { order += letter; }));
    };
    cudaGraph_t captured;
    cudaGraphExec_t executable;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CUDA_CHECK(cudaEventRecord(fork, stream));
    CUDA_CHECK(cudaStreamWaitEvent(side, fork));
    note(stream, 'w');
    CUDA_CHECK(cudaEventRecord(written, stream));
    if (wait) CUDA_CHECK(cudaStreamWaitEvent(side, written));
    note(side, 'r');
    note(stream, 'x');
    CUDA_CHECK(cudaEventRecord(join, side));
    CUDA_CHECK(cudaStreamWaitEvent(stream, join));
    note(stream, 'e');
    CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
    CUDA_CHECK(cudaGraphInstantiate(&executable, captured));
    CUDA_CHECK(cudaGraphDestroy(captured));
    for (int i = 0; i < 2; i++) CUDA_CHECK(cudaGraphLaunch(executable, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGraphExecDestroy(executable));
    for (const cudaEvent_t event : {fork, written, join}) CUDA_CHECK(cudaEventDestroy(event));
    cuda_on_cpu::set_seed(before);
    return order;
  };
  CHECK(run(0, true) == "wrxewrxe");  // the order of the calls
  std::set<std::string> with_event, without;
  for (int seed = 1; seed <= 20; seed++) {
    with_event.insert(run(seed, true).substr(0, 4));
    without.insert(run(seed, false).substr(0, 4));
  }
  CHECK(with_event == std::set<std::string>{"wrxe", "wxre"});
  CHECK(without == std::set<std::string>{"wrxe", "wxre", "rwxe"});
}

TEST_CASE("CUDA on the CPU: a capture refuses work that is not joined, and events from before it", "[cuda_on_cpu]") {
  const TestStream stream, side;
  cudaEvent_t event;
  CUDA_CHECK(cudaEventCreate(&event));
  CUDA_CHECK(cudaEventRecord(event, side));
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CHECK(cudaStreamWaitEvent(stream, event) == cudaErrorStreamCaptureIsolation);
  CUDA_CHECK(cudaEventRecord(event, stream));
  CUDA_CHECK(cudaStreamWaitEvent(side, event));
  CUDA_CHECK(cuda_on_cpu::enqueue(side, [] {}));
  cudaGraph_t captured;
  CHECK(cudaStreamEndCapture(stream, &captured) == cudaErrorStreamCaptureUnjoined);
  CUDA_CHECK(cudaGraphDestroy(captured));
  CUDA_CHECK(cudaEventDestroy(event));
}

TEST_CASE("CUDA on the CPU: a capture that an exception cut short is forgotten", "[cuda_on_cpu]") {
  {
    const TestStream stream;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported);
  }
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("CUDA on the CPU: after an error nothing of what was waiting runs", "[cuda_on_cpu]") {
  const TestStream stream;
  bool ran = false;
  CUDA_CHECK(cuda_on_cpu::enqueue(stream, [] { throw std::runtime_error("thrown"); }));
  CUDA_CHECK(cuda_on_cpu::enqueue(stream, [&] { ran = true; }));
  CHECK(cudaStreamSynchronize(stream) == cudaErrorLaunchFailure);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorLaunchFailure);  // the same error until somebody asks
  CHECK(cudaGetErrorString(cudaErrorLaunchFailure) == std::string("thrown"));
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(!ran);
}

// ---------------------------------------------------------------------------------------------------------------------
// Planted mistakes that every build reports

namespace planted {

__global__ void early_return(float* x) {
  if (threadIdx.x >= 100) return;
  __syncthreads();
  x[threadIdx.x] = 0;
}
__global__ void two_barriers(float* x) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  x[threadIdx.x] = 0;
}
__global__ void shuffle_in_a_branch(float* x) {
  if (threadIdx.x != 9) x[threadIdx.x] = __shfl_xor_sync(all_lanes, x[threadIdx.x], 1);
  __syncthreads();
}
__global__ void two_shuffles(float* x) {
  if (threadIdx.x % 2)
    x[threadIdx.x] = __shfl_xor_sync(all_lanes, x[threadIdx.x], 1);
  else
    x[threadIdx.x] = __shfl_xor_sync(all_lanes, x[threadIdx.x], 1);
}
__global__ void lane_outside_the_mask(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 16);
}
__global__ void not_in_its_own_mask(float* x) { x[threadIdx.x] = __shfl_xor_sync(0xfffffffeu, x[threadIdx.x], 0); }
__global__ void misaligned_matrix(float* x) {
  __shared__ __align__(16) bf16 tile[512];
  uint32_t r[4];
  ldmatrix_x4(r, tile + 12);
  x[threadIdx.x] = float(r[0]);
}
__global__ void copy_to_global(float* x) { copy_async_16(x, x + 4, true); }
__global__ void copy_misaligned(float* x) {
  __shared__ __align__(16) float buffer[8];
  copy_async_16(buffer + 1, x, true);
}
__global__ void trap(float*) { __trap(); }
__global__ void throws(float*) { throw std::runtime_error("thrown"); }
__global__ void nothing(float*) {}

// Sums the block's x. BUG 1: no barrier before we read `partial`; 2: no barrier before we write it again.
template <int BUG>
__global__ void sum_twice(float* out, const float* x) {
  __shared__ float partial[4];
  float total = 0;
  for (int turn = 0; turn < 2; turn++) {
    const float s = lane_sum(x[threadIdx.x] * float(turn + 1));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
    if (BUG != 1) __syncthreads();
    total += partial[0] + partial[1] + partial[2] + partial[3];
    if (BUG != 2) __syncthreads();
  }
  out[threadIdx.x] = total;
}
// Lanes pass numbers on through shared memory; with BUG, nothing orders their accesses.
template <bool BUG>
__global__ void pass_on(float* out, const float* x) {
  __shared__ float line[32];
  line[threadIdx.x] = x[threadIdx.x];
  if (!BUG) __syncwarp();
  out[threadIdx.x] = line[(threadIdx.x + 1) % 32];
}

}  // namespace planted

TEST_CASE("CUDA on the CPU: threads that do not meet are reported", "[cuda_on_cpu]") {
  const DeviceArray<float> x(std::vector<float>(128));
  const auto report = [&](void (*kernel)(float*), int block) {
    return failure_of([&] { launch(kernel, {1, block}, x.data()); });
  };
  for_each_seed(n_seeds, [&] {
    std::string text = report(planted::early_return, 128);
    CHECK(contains(text, "divergence"));
    CHECK(contains(text, "threads 100-127 have returned"));
    CHECK(contains(text, "threads 0-99 wait in __syncthreads at"));
    CHECK(contains(text, "(early_return)"));
    CHECK(contains(text, "in kernel planted::early_return, block (0,0,0) of (1,1,1), threads (128,1,1), seed"));

    text = report(planted::two_barriers, 64);
    CHECK(contains(text, "threads 0-31 wait in __syncthreads at"));
    CHECK(contains(text, "threads 32-63 wait in __syncthreads at"));

    text = report(planted::shuffle_in_a_branch, 32);
    CHECK(contains(text, "threads 9 wait in __syncthreads at"));
    CHECK(contains(text, "threads 0-8 10-31 wait for their warp at"));
    CHECK(contains(text, "mask ffffffff"));

    CHECK(contains(report(planted::two_shuffles, 32), "threads 0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 wait for"));
    CHECK(contains(report(planted::lane_outside_the_mask, 32), "reads lane 16, which is not in the mask"));
    CHECK(contains(report(planted::not_in_its_own_mask, 32), "lane 0 is not in its own mask fffffffe"));
    CHECK(contains(report(planted::two_shuffles, 16), "mask ffffffff names lanes that the block does not have"));
    CHECK(contains(report(planted::misaligned_matrix, 32), "is not aligned to 16 bytes"));
    CHECK(contains(report(planted::copy_to_global, 1), "is not shared memory"));
    CHECK(contains(report(planted::copy_misaligned, 1), "is not aligned to 16 bytes"));
    CHECK(contains(report(planted::trap, 1), "__trap() at"));
    CHECK(contains(report(planted::throws, 64), "exception: thrown"));
    CHECK(report(planted::nothing, 128) == "no error");  // and the next kernel runs
  });
}

TEST_CASE("CUDA on the CPU: launches and copies that no GPU would make are refused", "[cuda_on_cpu]") {
  const DeviceArray<float> x(std::vector<float>(128));
  const auto report = [&](const LaunchConfig& config, float* p) {
    return failure_of([&] { launch(planted::nothing, config, p); });
  };
  float* freed = DeviceArray<float>(10).data();
  float on_host[32] = {};
  CHECK(report({1, 1}, x.data()) == "no error");
  CHECK(report({1, 1}, nullptr) == "no error");
  CHECK(contains(report({1, 1}, on_host), "kernel argument 0"));
  CHECK(contains(report({1, 1}, on_host), "is not device memory"));
  CHECK(contains(report({1, 1}, freed), "in no array of device memory"));
  CHECK(report({1, 1024}, x.data()) == "no error");
  CHECK(contains(report({1, 1025}, x.data()), "grid (1,1,1) of blocks (1025,1,1)"));
  CHECK(contains(report({0, 32}, x.data()), "cudaErrorInvalidConfiguration"));
  CHECK(contains(report({dim3(1, 65536), 32}, x.data()), "cudaErrorInvalidConfiguration"));
  CHECK(contains(report({1, dim3(1, 1, 65)}, x.data()), "cudaErrorInvalidConfiguration"));
  CHECK(contains(report({1, 32, (227 << 10) + 1}, x.data()), "of dynamic shared memory"));

  const auto without_asking = [&](size_t smem) {
    cudaLaunchConfig_t config{};
    config.dynamicSmemBytes = smem;
    return failure_of([&] { CUDA_CHECK(cudaLaunchKernelEx(&config, planted::trap, nullptr)); });
  };
  CHECK(contains(without_asking((48 << 10) + 1), "49153 bytes of dynamic shared memory, without cudaFuncSetAttribute"));
  CHECK(contains(without_asking(48 << 10), "__trap()"));

  const size_t bytes = sizeof on_host;
  const auto copy = [&](void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    return failure_of([&] { CUDA_CHECK(cudaMemcpy(to, from, n, kind)); });
  };
  CHECK(copy(x.data(), on_host, bytes, cudaMemcpyHostToDevice) == "no error");
  CHECK(copy(on_host, x.data(), bytes, cudaMemcpyDefault) == "no error");
  CHECK(contains(copy(x.data(), on_host, bytes, cudaMemcpyDeviceToHost), "which is not 128 bytes of host memory"));
  CHECK(contains(copy(x.data(), on_host, bytes, cudaMemcpyDeviceToDevice), "which is not 128 bytes of device memory"));
  CHECK(contains(copy(on_host, on_host, bytes, cudaMemcpyHostToDevice), "which is not 128 bytes of device memory"));
  CHECK(contains(copy(x.data() + 100, on_host, 100 * sizeof(float), cudaMemcpyHostToDevice),
                 "400 bytes of device memory"));
  CHECK(contains(failure_of([&] { CUDA_CHECK(cudaMemset(on_host, 0, bytes)); }), "bytes of device memory"));
}

TEST_CASE("CUDA on the CPU: a missing barrier shows", "[cuda_on_cpu]") {
  const DeviceArray<float> x(counting(128));
  // The number of seeds with which every thread gets `want`.
  const auto results = [&](void (*kernel)(float*, const float*), int block, float want) {
    int right = 0;
    for_each_seed(n_seeds, [&] {
      const DeviceArray<float> out(block);
      launch(kernel, {1, block}, out.data(), x.data());
      const std::vector<float> got = out.read();
      right += std::count(got.begin(), got.end(), want) == block;
    });
    return right;
  };
  const float sum = 3 * 127 * 64;
  CHECK(results(planted::sum_twice<0>, 128, sum) == n_seeds);
#ifndef WITH_TSAN  // ThreadSanitizer would report the races
  CHECK(results(planted::sum_twice<1>, 128, sum) == 0);
  CHECK(results(planted::sum_twice<2>, 128, sum) < n_seeds);
  const DeviceArray<float> out(32);
  int wrong = 0;
  for_each_seed(n_seeds, [&] {
    launch(planted::pass_on<true>, {1, 32}, out.data(), x.data());
    wrong += out.read()[0] != 1;
  });
  CHECK(wrong > 0);
#endif
}

TEST_CASE("CUDA on the CPU: an error that nobody asks for ends the program with 1", "[cuda_on_cpu]") {
  const Run forgotten = run_alone("alone: error not asked for");
  CHECK(forgotten.code == 1);
  CHECK(contains(forgotten.err, "__trap() at"));
  CHECK(contains(forgotten.err, "in kernel planted::trap"));
}
TEST_CASE("alone: error not asked for", "[.alone]") {
  const DeviceArray<float> x(1);
  launch(planted::trap, {1, 1}, x.data());
  cudaStreamSynchronize(nullptr);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  CHECK(cudaStreamSynchronize(nullptr) == cudaErrorLaunchFailure);  // the same error as long as nobody asks
}

// ---------------------------------------------------------------------------------------------------------------------
// Planted mistakes that end the program: accesses outside all arrays in every build, the others under a sanitizer.

namespace planted {

__global__ void write_at(float* x, size_t i) { x[i] = 1; }
__global__ void read_at(float* out, const float* x, size_t i) { *out = x[i]; }
__global__ void beyond_dynamic_smem(float* out, int i) {
  dynamic_smem<float>()[i] = 1;
  *out = 1;
}
__global__ void beyond_static_smem(float* out, int i) {
  __shared__ float line[10];
  line[i] = 1;
  *out = line[0];
}
__global__ void copy_beyond(float* x, size_t i) {
  __shared__ __align__(16) float line[4];
  copy_async_16(line, x + i, true);
  copy_async_commit();
  copy_async_wait<0>();
  x[0] = line[0];
}
__global__ void misaligned(float4* out, const float* x) { *out = *reinterpret_cast<const float4*>(x + 1); }

__global__ void all_write(float* out) { *out = float(threadIdx.x); }
__global__ void blocks_add(float* out) { *out += 1; }
__global__ void blocks_add_atomically(int* out) { atomicAdd(out, 1); }

}  // namespace planted

#define ALONE(name) TEST_CASE("alone: " name, "[.alone]")
ALONE("host reads device memory") {
  const DeviceArray<float> x(10);
  volatile float y = *x.data();
  CHECK(y == y);
}
ALONE("far out of bounds") {
  const DeviceArray<float> x(10), y(10);
  launch(planted::write_at, {1, 1}, x.data(), size_t(64 + 64));  // behind the guard and the end of the page
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("out of bounds") {
  float* x = nullptr;
  CUDA_CHECK(cudaMalloc(&x, 10 * sizeof(float)));
  launch(planted::write_at, {1, 1}, x, size_t(10));
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("before the array") {
  float* x = nullptr;
  CUDA_CHECK(cudaMalloc(&x, 10 * sizeof(float)));
  launch(planted::read_at, {1, 1}, x, x, size_t(-1));
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("beyond dynamic shared memory") {
  const DeviceArray<float> x(1);
  launch(planted::beyond_dynamic_smem, {1, 1, 10 * sizeof(float)}, x.data(), 10);
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("beyond static shared memory") {
  const DeviceArray<float> x(1);
  launch(planted::beyond_static_smem, {1, 1}, x.data(), 10);
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("copy from out of bounds") {
  float* x = nullptr;
  CUDA_CHECK(cudaMalloc(&x, 16 * sizeof(float)));
  launch(planted::copy_beyond, {1, 1}, x, size_t(16));
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("misaligned") {
  const DeviceArray<float> x(10);
  const DeviceArray<float4> out(1);
  launch(planted::misaligned, {1, 1}, out.data(), x.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no barrier before the sum is read") {
  const DeviceArray<float> x(counting(128)), out(128);
  launch(planted::sum_twice<1>, {1, 128}, out.data(), x.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no barrier before the buffer is used again") {
  const DeviceArray<float> x(counting(128)), out(128);
  launch(planted::sum_twice<2>, {1, 128}, out.data(), x.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no __syncwarp") {
  const DeviceArray<float> x(counting(32)), out(32);
  launch(planted::pass_on<true>, {1, 32}, out.data(), x.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no wait for copies") {
  const DeviceArray<float> x(counting(4 * 256)), out(6 * 256);
  launch(on_cpu::copy_kernel<1>, {1, 64}, out.data(), x.data(), 6, 4);
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no barrier before copies are read") {
  const DeviceArray<float> x(counting(4 * 256)), out(6 * 256);
  launch(on_cpu::copy_kernel<2>, {1, 64}, out.data(), x.data(), 6, 4);
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: no barrier before the next copies") {
  const DeviceArray<float> x(counting(4 * 256)), out(6 * 256);
  launch(on_cpu::copy_kernel<3>, {1, 64}, out.data(), x.data(), 6, 4);
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: all write") {
  const DeviceArray<float> out(1);
  launch(planted::all_write, {1, 2}, out.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: blocks add") {
  const DeviceArray<float> out(1);
  launch(planted::blocks_add, {2, 1}, out.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("race: reads before it waits") {
  const DeviceArray<float> x(std::vector<float>(64, 0));
  launch_early(on_cpu::turn_around<0>, 64, x.data());
  launch_early(on_cpu::turn_around<1>, 64, x.data());
  CUDA_CHECK(cudaDeviceSynchronize());
}
ALONE("no race") {
  const DeviceArray<int> counter(std::vector<int>{0});
  launch(planted::blocks_add_atomically, {5, 32}, counter.data());
  launch(planted::blocks_add_atomically, {5, 32}, counter.data());
  CHECK(counter.read()[0] == 320);
  const DeviceArray<float> x(std::vector<float>(64, 0));
  launch_early(on_cpu::turn_around<0>, 64, x.data());
  launch_early(on_cpu::turn_around<0>, 64, x.data());
  CHECK(x.read() == std::vector<float>(64, 2));
}

TEST_CASE("CUDA on the CPU: device memory is closed to the host, and to kernels beyond the arrays", "[cuda_on_cpu]") {
  const Run host = run_alone("alone: host reads device memory"), far = run_alone("alone: far out of bounds");
  CHECK(host.code != 0);
  CHECK(far.code != 0);
#if !defined(WITH_ASAN) && !defined(WITH_TSAN)
  CHECK(contains(host.err, "is device memory, and host code used it"));
  CHECK(contains(far.err, "outside all arrays of device memory"));
#endif
#ifndef WITH_TSAN
  CHECK(contains(far.err, "in kernel planted::write_at, block (0,0,0) of (1,1,1), thread (0,0,0) of (1,1,1)"));
#endif
}

#ifdef WITH_ASAN
TEST_CASE("CUDA on the CPU: AddressSanitizer sees what a kernel does out of bounds", "[cuda_on_cpu]") {
  for (const auto& [name, kernel] : {std::pair{"out of bounds", "write_at"},
                                     {"before the array", "read_at"},
                                     {"beyond dynamic shared memory", "beyond_dynamic_smem"},
                                     {"copy from out of bounds", "copy_beyond"}}) {
    const Run mistake = run_alone(std::string("alone: ") + name);
    INFO(name);
    CHECK(mistake.code != 0);
    CHECK(contains(mistake.err, "ERROR: AddressSanitizer"));
    CHECK(contains(mistake.err, std::string("in kernel planted::") + kernel));
  }
  const Run line = run_alone("alone: beyond static shared memory"), address = run_alone("alone: misaligned");
  CHECK(line.code != 0);
  CHECK(contains(line.err, "out of bounds"));
  CHECK(address.code != 0);
  CHECK(contains(address.err, "misaligned address"));
}
#endif

#ifdef WITH_TSAN
TEST_CASE("CUDA on the CPU: ThreadSanitizer sees races", "[cuda_on_cpu]") {
  for (const char* name : {"no barrier before the sum is read", "no barrier before the buffer is used again",
                           "no __syncwarp", "no wait for copies", "no barrier before copies are read",
                           "no barrier before the next copies", "all write", "blocks add", "reads before it waits"}) {
    const Run race = run_alone(std::string("alone: race: ") + name);
    INFO(name);
    CHECK(race.code != 0);
    CHECK(contains(race.err, "WARNING: ThreadSanitizer: data race"));
    CHECK(contains(race.err, "in kernel "));
  }
  CHECK(run_alone("alone: no race").code == 0);
}
#endif
#endif
