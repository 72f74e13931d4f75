// Some operations can be done in more than one way, and which is the fastest depends on the card. So each card takes
// what won the race on a card of its kind (make lab, bench_gpu), by choices_table.h; a card without a line there takes
// version 1, which runs on every card and at every size.
// defines: Choices, choices_of, choices, choose
#pragma once
#include <map>
#include <string>

#include "check.cuh"

struct Choices {
  // A checkpoint records these: a training run may have other bits with another version. attention_forward's two had the same
  // bits wherever we tested them, but a compiler may join a product and a sum in one of them and not in the other.
  int attention_forward = 1;   // 1: a block has 128 queries of a head; 2: a block has a whole head
  int attention_backward = 1;  // 1: two kernels, one for dq and one for dk and dv; 2: one kernel for all three
  int attention_float = 1;     // 1: a warp has one row; 2: tensor cores, by tf32 products
  // These don't change a run's bits.
  int attention_masks = 1;   // 1: backward draws the dropout masks again; 2: forward stores them, a bit for each weight
  int kernel_starts = 1;     // 1: when the kernel before has ended; 2: earlier, and the kernel waits (wait_for_inputs)
  int weight_gradients = 1;  // 1: on the step's stream; 2: on a second one beside it
  int sampling = 1;          // 1: computes the whole window for each token; 2: keeps keys and values while it fills

  // Calls f(name, version, whether it changes a run's bits) for each of them.
  template <class Self, class F>
  static void each(Self& self, F f) {
    f("attention_forward", self.attention_forward, true);
    f("attention_backward", self.attention_backward, true);
    f("attention_float", self.attention_float, true);
    f("attention_masks", self.attention_masks, false);
    f("kernel_starts", self.kernel_starts, false);
    f("weight_gradients", self.weight_gradients, false);
    f("sampling", self.sampling, false);
  }
  // What a checkpoint records, because another version gives other bits: "" for version 1 of everything.
  std::string name() const {
    std::string out;
    each(*this, [&](const char* operation, int version, bool changes_bits) {
      if (version != 1 && changes_bits) out += std::string(" ") + operation + " " + std::to_string(version);
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

// What this process takes on the card that it uses. Benchmarks and tests assign another version to it.
inline Choices& choices() {
  static std::map<int, Choices> of_device;
  int device;
  CUDA_CHECK(cudaGetDevice(&device));
  const auto found = of_device.find(device);
  if (found != of_device.end()) return found->second;
  const cudaDeviceProp card = current_card();
  return of_device[device] = choices_of(10 * card.major + card.minor);
}

// Takes this version of an operation from now on. Call it before the model is made, which asks only then for attention_masks,
// weight_gradients and sampling; the others count at every launch.
inline void choose(const std::string& operation, int version) {
  bool found = false;
  Choices::each(choices(), [&](const char* name, int& chosen, bool) {
    if (operation != name) return;
    require(version == 1 || version == 2, operation, " has no version ", version);
    chosen = version;
    found = true;
  });
  require(found, "'", operation, "' is nothing that can be done in more than one way");
}
