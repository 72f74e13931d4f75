// The trainers' buffers, and the plan of them that is printed before anything is allocated.
// defines: Pages, allocate_pages, Buffer, AvailableMemory, MemoryPlan
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "error.h"
#include "tensors.h"

// Pages from the system: zero, and not there until they are touched; large ones where it has them, for gigabytes of small
// ones take seconds to appear. Raises Error if there are none.
struct PageDeleter {
  size_t bytes = 0;
  void operator()(void* pages) const;
};
using Pages = std::unique_ptr<void, PageDeleter>;
Pages allocate_pages(size_t bytes);

// One allocation for all tensors of a layout, zeroed, on a page's boundary.
template <class Real>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(const Layout& layout) : pages_(allocate_pages(layout.size() * sizeof(Real))) {
    if constexpr (std::is_floating_point_v<Real>) plant_canaries(data(), layout);
  }
  explicit Buffer(size_t count) : pages_(allocate_pages(count * sizeof(Real))) {}  // count numbers that have no layout
  Real* data() const { return static_cast<Real*>(pages_.get()); }

 private:
  Pages pages_;
};

constexpr const char* what_lowers_it = "lower --batch_size (activations) or --n_embd, --n_layer, --block_size (all)";

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
  void require(const AvailableMemory& available, const char* advice = what_lowers_it) const;

 private:
  struct Row {
    std::string what;
    double bytes;
  };
  std::vector<Row> rows_;
};

double usable_memory();  // bytes: the machine's, or what its container leaves of it
