// Building blocks of the kernels: eight numbers at a time, sums over lanes, and the tensor cores' instructions. The
// only file of the kernels, besides matmul_library.cuh, that knows whether it is compiled for a GPU or for the CPU
// (CUDA_ON_CPU).
// defines: bf16, fp16, wait_for_inputs, Float8, load8, store8, lane_sum, lane_max, exp2_approx, computed_here,
//          dynamic_smem, pack2, mma_16x8x16, round_to_tf32, mma_16x8x8_tf32, ldmatrix_x4, ldmatrix_x4_trans,
//          transpose_8x8, copy_async_16, copy_async_commit, copy_async_wait
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr unsigned all_lanes = 0xffffffffu;

// Each kernel begins with this, because it may have been started while the kernel before it still runs (launch.cuh). The
// first line waits until that one has ended and its results can be read. That kernel has waited in the same way, so
// everything earlier in the stream has ended, too. The second line lets the next kernel start as soon as all blocks of
// this one have started.
__device__ inline void wait_for_inputs() {
#if defined(CUDA_ON_CPU) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Eight neighbouring elements of a row: 16 bytes of bf16 or fp16, 32 of float, and the draws of one call of the random
// number generator. All arithmetic is in float.

struct Float8 {
  float v[8];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ const float& operator[](int i) const { return v[i]; }
};

template <class Real>
struct __align__(16) Eight {
  Real v[8];
};

// from, to: aligned to 16 bytes
template <class Real>
__device__ inline Float8 load8(const Real* from) {
  const Eight<Real> e = *reinterpret_cast<const Eight<Real>*>(from);
  Float8 out;
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = float(e.v[i]);
  return out;
}
template <class Real>
__device__ inline void store8(Real* to, const Float8& x) {
  Eight<Real> e;
#pragma unroll
  for (int i = 0; i < 8; i++) e.v[i] = Real(x[i]);
  *reinterpret_cast<Eight<Real>*>(to) = e;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over LANES neighbouring lanes of a warp, given to each of them. All 32 lanes must call together.

template <int LANES = 32>
__device__ inline float lane_sum(float x) {
#pragma unroll
  for (int d = LANES / 2; d > 0; d /= 2) x += __shfl_xor_sync(all_lanes, x, d);
  return x;
}
template <int LANES = 32>
__device__ inline float lane_max(float x) {
#pragma unroll
  for (int d = LANES / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(all_lanes, x, d));
  return x;
}

// 2^x with an error of 2^-22 of it, in one instruction; 0 instead of a denormal result.
__device__ inline float exp2_approx(float x) {
#ifdef CUDA_ON_CPU
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// x itself, which the compiler has to take for something new. So it computes what depends on x here, and not before the
// loop around, in which the results would take up registers.
__device__ inline int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The block's dynamic shared memory: as many bytes as the launch asked for.
template <class Real>
__device__ inline Real* dynamic_smem() {
#ifdef CUDA_ON_CPU
  return static_cast<Real*>(cuda_on_cpu::dynamic_smem());
#else
  extern __shared__ __align__(128) unsigned char dynamic_smem_bytes[];
  return reinterpret_cast<Real*>(dynamic_smem_bytes);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. A warp works together: every lane holds a few elements of each matrix, its fragment. The layouts are
// those of the PTX manual's section on mma.m16n8k16; g = lane / 4, t = lane % 4, a register holds two 16-bit elements:
//   a (16 x 16):  a[0] = (g, 2t..2t+1)   a[1] = (g + 8, 2t..)   a[2] = (g, 2t + 8..)   a[3] = (g + 8, 2t + 8..)
//   b (16 x 8):   b[0] = (2t..2t+1, g)   b[1] = (2t + 8.., g)
//   d (16 x 8):   d[0], d[1] = (g, 2t), (g, 2t + 1)   d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1)
// So two d's side by side, rounded to 16 bits, are again an a: the product of a product needs no exchange between
// lanes.
//
// Floats are multiplied as TF32 numbers, which have float's 8 bits of exponent and the upper 10 bits of its mantissa. A
// register has one number. A lane holds these elements (mma.m16n8k8 in the PTX manual):
//   a (16 x 8):  a[0] = (g, t)   a[1] = (g + 8, t)   a[2] = (g, t + 4)   a[3] = (g + 8, t + 4)
//   b (8 x 8):   b[0] = (t, g)   b[1] = (t + 4, g)
//   d (16 x 8):  as above
// Here a d is an a if the columns change their places: a lane's columns 2t and 2t + 1 of d become t and t + 4 of a, and
// the rows of b have to follow.

// Two floats, rounded to Real (bf16 or fp16), in one register: lo in the low half.
template <class Real>
__device__ inline uint32_t pack2(float lo, float hi) {
  const Real pair[2] = {Real(lo), Real(hi)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

#ifdef CUDA_ON_CPU
#include "tensor_core.h"  // the same functions, for a warp of fibers
#else

// d (16 x 8) += a (16 x 16) @ b (16 x 8), sums in float.
template <class Real>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // no bf16 before sm_80: the trainer refuses it
#endif
}

template <>
__device__ inline void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 multiplies eight terms at a time
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

// x rounded to the nearest TF32 number, halves away from zero or, where there is one instruction for it, to even. We
// assume that tensor cores ignore the 13 bits of a float that a TF32 number does not have. That would round towards
// zero, so round before. PTX leaves open what these bits become; here they are 0, so that x - round_to_tf32(x) is exact.
__device__ inline float round_to_tf32(float x) {
  uint32_t bits = __float_as_uint(x);
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#elif __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return __uint_as_float(bits & 0xffffe000u);
}

// d (16 x 8) += a (16 x 8) @ b (8 x 8), where a and b are TF32 numbers. Sums are floats, rounded towards zero.
__device__ inline void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  __trap();  // no TF32 before sm_80
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l passes the address of row l % 8 of matrix l / 8,
// aligned to 16 bytes, and receives of matrix i the elements (g, 2t) and (g, 2t + 1) in r[i].
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same, each matrix transposed: (2t, g) and (2t + 1, g).
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements whose lanes hold (g, 2t..2t+1), transposed.
__device__ inline uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Copies 16 bytes from global to shared memory, both aligned to 16, in the background; zeros instead if not `valid`,
// and then `global` is not read. Whoever reads them waits first, and all threads meet in a barrier. Before sm_80 there
// is no background: the copy is done at once.
__device__ inline void copy_async_16(void* smem, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = uint32_t(__cvta_generic_to_shared(smem));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}
// Ends a group of copies.
__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most PENDING of this thread's groups are on their way.
template <int PENDING>
__device__ inline void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
#endif
