// CUDA on the CPU (see cuda_runtime.h): the functions whose PTX is in kernels/device.cuh, which describes them.
// defines: mma_16x8x16, round_to_tf32, mma_16x8x8_tf32, ldmatrix_x4, ldmatrix_x4_trans, transpose_8x8, copy_async_16,
//          copy_async_commit, copy_async_wait
#pragma once
#include <bit>
#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

// Element i of a fragment, whose registers hold two elements each.
inline uint16_t bits_of(const uint32_t* registers, int i) { return uint16_t(registers[i / 2] >> 16 * (i % 2)); }
template <class Real>
float number_of(const uint32_t* registers, int i) {
  return float(__builtin_bit_cast(Real, bits_of(registers, i)));
}

// Where lane l's element i lies in a 16 x 16 matrix a. For d (16 x 8), i goes only to 3.
constexpr int fragment_row(int l, int i) { return l / 4 + i / 2 % 2 * 8; }
constexpr int fragment_column(int l, int i) { return l % 4 * 2 + i / 4 * 8 + i % 2; }

struct MmaSlot {
  float* d;
  const uint32_t *a, *b;
};
template <class Real>
void mma(void* const slots[32], unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaSlot& slot = *static_cast<const MmaSlot*>(slots[l]);
    for (int i = 0; i < 8; i++) a[fragment_row(l, i)][fragment_column(l, i)] = number_of<Real>(slot.a, i);
    for (int i = 0; i < 4; i++) b[l % 4 * 2 + i / 2 * 8 + i % 2][l / 4] = number_of<Real>(slot.b, i);
    for (int i = 0; i < 4; i++) d[fragment_row(l, i)][fragment_column(l, i)] = slot.d[i];
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++)
      static_cast<const MmaSlot*>(slots[l])->d[i] = d[fragment_row(l, i)][fragment_column(l, i)];
}

// What a tensor core takes of a float in a TF32 product: it ignores the 13 low bits.
inline float tf32_of(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); }
// Tensor cores round sums towards zero (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021).
inline float towards_zero(double x) {
  const float y = float(x);
  return std::isfinite(y) && std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

struct MmaTf32Slot {
  float* d;
  const float *a, *b;
};
inline void mma_tf32(void* const slots[32], unsigned) {
  float a[16][8], b[8][8];
  double d[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaTf32Slot& slot = *static_cast<const MmaTf32Slot*>(slots[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = tf32_of(slot.a[i]);
    for (int i = 0; i < 2; i++) b[t + i * 4][g] = tf32_of(slot.b[i]);
    for (int i = 0; i < 4; i++) d[fragment_row(l, i)][fragment_column(l, i)] = slot.d[i];
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 8; k++)
      for (int column = 0; column < 8; column++) d[row][column] += double(a[row][k]) * b[k][column];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++)
      static_cast<const MmaTf32Slot*>(slots[l])->d[i] = towards_zero(d[fragment_row(l, i)][fragment_column(l, i)]);
}

// Every lane reads its row before the warp meets, so that a sanitizer blames the right lane.
struct LdmatrixSlot {
  uint16_t row[8];
  uint32_t* out;
};
template <bool TRANSPOSED>
void ldmatrix(uint32_t* out, const void* row, Site site) {
  if (uintptr_t(row) % 16) fail("%s:%d: ldmatrix: row %p is not aligned to 16 bytes", site.file, site.line, row);
  LdmatrixSlot slot;
  for (int i = 0; i < 8; i++) slot.row[i] = static_cast<const uint16_t*>(row)[i];
  slot.out = out;
  collective(
      ~0u, &slot,
      [](void* const* slots, unsigned) {
        for (int l = 0; l < 32; l++)
          for (int matrix = 0; matrix < 4; matrix++) {
            const auto at = [&](int r, int c) {
              return uint32_t(static_cast<LdmatrixSlot*>(slots[8 * matrix + r])->row[c]);
            };
            const int g = l / 4, t = l % 4 * 2;
            static_cast<LdmatrixSlot*>(slots[l])->out[matrix] =
                TRANSPOSED ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
          }
      },
      site);
}

}  // namespace cuda_on_cpu

template <class Real>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::MmaSlot slot{d, a, b};
  cuda_on_cpu::collective(~0u, &slot, cuda_on_cpu::mma<Real>, site);
}

inline float round_to_tf32(float x) {
  return std::isfinite(x) ? std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u) : x;
}
inline void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2],
                            cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::MmaTf32Slot slot{d, a, b};
  cuda_on_cpu::collective(~0u, &slot, cuda_on_cpu::mma_tf32, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::ldmatrix<false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::ldmatrix<true>(r, row, site);
}

inline uint32_t transpose_8x8(uint32_t x, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  struct Slot {
    uint32_t in, out;
  };
  Slot slot{x, 0};
  cuda_on_cpu::collective(
      ~0u, &slot,
      [](void* const* slots, unsigned) {
        const auto at = [&](int r, int c) {
          return uint32_t(cuda_on_cpu::bits_of(&static_cast<Slot*>(slots[r * 4 + c / 2])->in, c % 2));
        };
        for (int l = 0; l < 32; l++)
          static_cast<Slot*>(slots[l])->out = at(l % 4 * 2, l / 4) | at(l % 4 * 2 + 1, l / 4) << 16;
      },
      site);
  return slot.out;
}

inline void copy_async_16(void* smem, const void* global, bool valid, cuda_on_cpu::Site site = cuda_on_cpu::here()) {
  cuda_on_cpu::copy_async(smem, valid ? global : nullptr, site);
}
inline void copy_async_commit() { cuda_on_cpu::copy_async_commit(); }
template <int PENDING>
void copy_async_wait() {
  cuda_on_cpu::copy_async_wait(PENDING);
}
