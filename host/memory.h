// The trainers' buffers, and the plan of them that is printed before anything is allocated.
// defines: Buffer, AvailableMemory, MemoryPlan
#pragma once
#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "error.h"
#include "tensors.h"

// One allocation for all tensors of a layout, zeroed, on a cache line's boundary.
template <class Real>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(const Layout& layout) {
    const size_t bytes = (layout.size() * sizeof(Real) + 63) / 64 * 64;
    memory_.reset(static_cast<Real*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
    for (size_t i = 0; i < layout.size(); i++) memory_.get()[i] = 0;
    if constexpr (std::is_floating_point_v<Real>) plant_canaries(memory_.get(), layout);
  }
  Real* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  std::unique_ptr<Real, Free> memory_;
};

struct AvailableMemory {
  double bytes;
  const char* where;  // "this machine has"
};

// Rows of (what for, bytes). require() refuses a plan that there is no memory for, before it is allocated.
class MemoryPlan {
 public:
  void add(std::string what, double bytes) { rows_.push_back({std::move(what), bytes}); }
  double total() const {
    double sum = 0;
    for (const Row& row : rows_) sum += row.bytes;
    return sum;
  }
  std::string print() const;
  void require(const AvailableMemory& available) const;

 private:
  struct Row {
    std::string what;
    double bytes;
  };
  std::vector<Row> rows_;
};

double physical_memory();  // bytes
