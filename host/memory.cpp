#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "machine.h"

static std::string megabytes(double bytes) {
  char line[64];
  std::snprintf(line, sizeof line, bytes < 9.95e6 ? "%.1f MB" : "%.0f MB", bytes / 1e6);
  return line;
}

void PageDeleter::operator()(void* pages) const { munmap(pages, bytes); }

Pages allocate_pages(size_t bytes) {
  if (bytes == 0) return {};
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) fail("the system has no ", megabytes(double(bytes)), " of memory left; ", what_lowers_it);
#ifdef MADV_HUGEPAGE
  madvise(pages, bytes, MADV_HUGEPAGE);  // a wish: without large pages all works the same
#endif
  return Pages(pages, {bytes});
}

std::string MemoryPlan::print() const {
  std::string out = "memory:";
  for (const Row& row : rows_)
    out += text(row.what == rows_.front().what ? " " : ", ", row.what, " ", megabytes(row.bytes));
  return out + text("; together ", megabytes(total()));
}

void MemoryPlan::require(const AvailableMemory& available, const char* advice) const {
  if (total() > available.bytes)
    fail("this run needs ", megabytes(total()), " of memory, ", available.where, " ", megabytes(available.bytes), "; ",
         advice, ". ", print());
}

double usable_memory() {
  return std::min(double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)), memory_limit());
}
