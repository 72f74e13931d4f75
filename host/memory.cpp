#include "memory.h"

#include <unistd.h>

#include <cstdio>

static std::string megabytes(double bytes) {
  char line[64];
  std::snprintf(line, sizeof line, bytes < 9.95e6 ? "%.1f MB" : "%.0f MB", bytes / 1e6);
  return line;
}

std::string MemoryPlan::print() const {
  std::string out = "memory:";
  for (const Row& row : rows_)
    out += text(row.what == rows_.front().what ? " " : ", ", row.what, " ", megabytes(row.bytes));
  return out + text("; together ", megabytes(total()));
}

void MemoryPlan::require(const AvailableMemory& available) const {
  if (total() > available.bytes)
    fail("this run needs ", megabytes(total()), " of memory, ", available.where, " ", megabytes(available.bytes),
         "; lower --batch_size (activations) or --n_embd, --n_layer, --block_size (all). ", print());
}

double physical_memory() { return double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)); }
