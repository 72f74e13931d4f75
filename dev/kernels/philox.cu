// Random draws, as dropout needs them, from the generator Philox. A call of it gives eight draws of 16 bits. Number i
// of the array is a draw of call i / 8 (draw_of in dropout_law.h). Every version must leave exactly the CPU's numbers.
//
// 6.3 million draws, for one (B * T, C) tensor, are 12.6 MB to write, 4 us. A call has ten rounds of two products of 32
// by 32 bits, and uses the high and the low half of each product. No kernel of the trainer stores draws: each makes
// them where it needs them, in the middle of a LayerNorm for example, so a call's time comes on top of other work.
//
//   1  a call for each number        Seven of eight draws are thrown away, and all the time goes into calls. The high
//                                    half of a product is the 64-bit product, shifted. nvcc 13 multiplies a second time
//                                    for the low half: 39 multiplications a call.
//   2  __umulhi                      host/random.h gets the high half by __umulhi, and nvcc 13 makes one instruction
//                                    that gives both halves: 20 multiplications, and 63 instructions instead of 85.
//   3  as shipped: all eight draws   A thread makes one call and stores 16 bytes. The trainer has no such kernel, but
//                                    dropout8 in dropout.cuh takes all eight draws of a call in this way.
#include "../../kernels/dropout_law.h"
#include "lab.cuh"

namespace {

constexpr uint64_t seed = 0x123456789abcdef0;
constexpr uint32_t step = 4711, place = site::fc_dropout + 5;

// random4, but it gets the high halves by shifts.
__device__ inline Philox4 random4_by_shift(uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = step, c3 = place;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < philox::rounds; round++) {
    const uint32_t high0 = uint32_t(uint64_t{philox::multiplier0} * c0 >> 32), low0 = philox::multiplier0 * c0;
    const uint32_t high1 = uint32_t(uint64_t{philox::multiplier1} * c2 >> 32), low1 = philox::multiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += philox::weyl0;
    key1 += philox::weyl1;
  }
  return {{c0, c1, c2, c3}};
}

// draw_of for an i that the compiler does not know. An array that is indexed by such an i must lie in memory, so we
// choose among the words by conditions: then they stay in registers.
__device__ inline uint16_t one_draw_of(const Philox4& r, int i) {
  const uint32_t low = i & 2 ? r.word[1] : r.word[0], high = i & 2 ? r.word[3] : r.word[2], word = i & 4 ? high : low;
  return uint16_t(word >> 16 * (i & 1));
}

// Launched with ceil(count / 256) blocks of 256 threads.
//   draws (count) =
__global__ void __launch_bounds__(256) philox_1(uint16_t* draws, size_t count) {
  const size_t i = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) draws[i] = one_draw_of(random4_by_shift(i / 8), i % 8);
}
__global__ void __launch_bounds__(256) philox_2(uint16_t* draws, size_t count) {
  const size_t i = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) draws[i] = one_draw_of(random4(seed, step, place, i / 8), i % 8);
}

// Launched with ceil(count / 8 / 256) blocks of 256 threads. count is a multiple of 8.
__global__ void __launch_bounds__(256) philox_3(uint16_t* draws, size_t count) {
  const size_t call = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (8 * call >= count) return;
  const Philox4 r = random4(seed, step, place, call);
  Eight<uint16_t> eight;
#pragma unroll
  for (int i = 0; i < 8; i++) eight.v[i] = uint16_t(draw_of(r, i));
  reinterpret_cast<Eight<uint16_t>*>(draws)[call] = eight;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const size_t count = size_t(s.rows()) * s.C;
  const lab::Array<uint16_t> draws = lab.output<uint16_t>(count);
  if (lab.checks()) {
    std::vector<double> want(count);
    for (size_t i = 0; i < count; i++) want[i] = draw_of(random4(seed, step, place, i / 8), int(i % 8));
    draws.expect(want, 1e-6);  // exactly: a draw is at most 65535, so an error of 1 is more than 7 times the tolerance
  }
  lab.needs(double(count) * sizeof(uint16_t), 0);

  const auto version = [&](const lab::Version& number, auto kernel, int draws_of_block) {
    lab.version(number, [=](int set, cudaStream_t stream) {
      launch(kernel, {unsigned(ceil_div(count, draws_of_block)), 256, 0, stream}, draws[set], count);
    });
  };
  version({1, "a call for each number, by a shift", 25}, philox_1, 256);
  version({2, "a call for each number, by __umulhi", 18}, philox_2, 256);
  version({3, "as shipped: all eight draws of a call", 6}, philox_3, 2048);
}
const lab::Listed listed({"philox", describe, {{3, 31, 48}, {1, 1, 8}, {1, 31, 72}}});

}  // namespace
