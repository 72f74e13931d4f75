// Some operations have more than one kernel. All of them compute the same, rounded differently, and which one is the
// fastest depends on the card. So each card takes what won the race on a card of its kind (make lab), by
// choices_table.h; a card without a line there takes version 1, which runs on every card and at every size.
// defines: Choices, choices_of, choices, choose
#pragma once
#include <string>

#include "launch.cuh"

struct Choices {
  int attention_forward = 1;   // 1: a block has 128 queries of a head; 2: a block has a whole head
  int attention_backward = 1;  // 1: two kernels, one for dq and one for dk and dv; 2: one kernel for all three
  int attention_float = 1;     // 1: a warp has one row; 2: tensor cores, by tf32 products

  // Calls f(operation, version) for each of them.
  template <class Self, class F>
  static void each(Self& self, F f) {
    f("attention_forward", self.attention_forward);
    f("attention_backward", self.attention_backward);
    f("attention_float", self.attention_float);
  }
  // What a checkpoint records, because another version gives other bits: "" for version 1 of everything.
  std::string name() const {
    std::string out;
    each(*this, [&](const char* operation, int version) {
      if (version != 1) out += std::string(" ") + operation + " " + std::to_string(version);
    });
    return out;
  }
};

// What cards of this compute capability take (10 * major + minor, 90 for an H100). The table's first line is for all
// that it does not name.
inline Choices choices_of(int capability) {
  constexpr struct {
    int capability;
    Choices choices;
  } table[] = {
#include "choices_table.h"
  };
  for (const auto& line : table)
    if (line.capability == capability) return line.choices;
  return table[0].choices;
}

// What this process takes. Benchmarks and tests assign another version to it.
inline Choices& choices() {
  static Choices chosen = [] {
    const cudaDeviceProp card = current_card();
    return choices_of(10 * card.major + card.minor);
  }();
  return chosen;
}

// Takes this version of an operation from now on.
inline void choose(const std::string& operation, int version) {
  bool found = false;
  Choices::each(choices(), [&](const char* name, int& chosen) {
    if (operation != name) return;
    require(version == 1 || version == 2, operation, " has no version ", version);
    chosen = version;
    found = true;
  });
  require(found, "'", operation, "' is no operation with more than one kernel");
}
