// Intel's matrix registers (AMX, Xeons since Sapphire Rapids): eight registers, or tiles, of 16 rows of 64 bytes, and
// an instruction that multiplies two of them. They have sixteen times the rate of float32 in vectors. Products of type
// bfloat16 use them where the processor, the compiler and the operating system know them; elsewhere they are emulated,
// for tests.
// defines: amx::available, enabled, Tiles, load, clear, store, multiply_add
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__)  // clang++ up to 14 defines the second
#define MICROGPT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int side = 16;           // a tile is 16 x 16 numbers of 32 bits: floats, or pairs of bfloat16
constexpr int area = side * side;  // numbers

#ifdef MICROGPT_AMX

// The kernel saves a thread's tiles (8 KB) only if the process has asked it to: arch_prctl(ARCH_REQ_XCOMP_PERM,
// XTILEDATA).
inline bool available() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Whether products of type bfloat16 use the tiles. Tests change it.
inline bool enabled = available();

// Reserves all eight tiles for its thread while it lives. They are given back at once, because the operating system is
// slower to switch a thread that has tiles.
struct Tiles {
  Tiles() {
    if (!enabled) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {side, side, side, side, side, side, side, side};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (enabled) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
};

// tile t = 16 rows of 16 numbers, `stride` numbers apart. Stride 0 loads the same row 16 times.
template <int t, class Number>
inline void load(const Number* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * sizeof *from), "i"(t) : "memory");
}
// tile t = 0
template <int t>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
// to = tile t, 16 rows of 16 floats, `stride` numbers apart
template <int t>
inline void store(float* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * sizeof *to), "i"(t) : "memory");
}
// tile c (16, 16) += tile a (16, 32) @ tile b (32, 16). Row i of a holds 16 pairs of neighbours in k. Row u of b holds,
// for each of its 16 columns, the pair k = 2u, 2u + 1.
template <int c, int a, int b>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else  // the same functions, emulated

inline bool available() { return true; }
inline bool enabled = false;
struct Tiles {
  Tiles() {}
  ~Tiles() {}
};
inline thread_local uint32_t tile[8][side][side];
template <int t, class Number>
inline void load(const Number* from, size_t stride) {
  for (int i = 0; i < side; i++) std::memcpy(tile[t][i], from + i * stride, sizeof tile[t][i]);
}
template <int t>
inline void clear() {
  std::memset(tile[t], 0, sizeof tile[t]);
}
template <int t>
inline void store(float* to, size_t stride) {
  for (int i = 0; i < side; i++) std::memcpy(to + i * stride, tile[t][i], sizeof tile[t][i]);
}
template <int c, int a, int b>
inline void multiply_add() {
  const auto real = [](uint32_t bits) { return std::bit_cast<float>(bits); };
  for (int i = 0; i < side; i++)
    for (int j = 0; j < side; j++) {
      float even = 0, odd = 0;
      for (int u = 0; u < side; u++) {
        even += real(tile[a][i][u] << 16) * real(tile[b][u][j] << 16);
        odd += real(tile[a][i][u] & 0xffff0000u) * real(tile[b][u][j] & 0xffff0000u);
      }
      tile[c][i][j] = std::bit_cast<uint32_t>(real(tile[c][i][j]) + (even + odd));
    }
}

#endif

}  // namespace amx
