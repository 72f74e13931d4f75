// The ways to compute a product of type bfloat16: by vectors, and by matrix registers (kernels/amx.h), which we emulate
// if the compiler does not target a processor that has them.
// defines: ways_of, TakeTiles
#pragma once
#include <vector>

#include "../kernels/matmul.h"

template <class Factor>
std::vector<bool> ways_of() {
  if (product::tiles_possible<Factor> && amx::available()) return {false, true};
  return {false};
}

struct TakeTiles {
  const bool before = amx::enabled;
  explicit TakeTiles(bool tiles) { amx::enabled = tiles; }
  ~TakeTiles() { amx::enabled = before; }
};
