// The kernel lab: operations of the GPU trainer in several versions each, from naive to shipped. It checks them against
// the CPU's layer in double and then times them. An operation is a function in a file of this folder. It makes its
// arrays, says what the CPU computes, and lists its versions:
//
//   void relu_backward(Lab& lab, const Sizes& s) {
//     const size_t count = size_t(s.rows()) * 4 * s.C;
//     const Array<bf16> out = lab.input(...), dx = lab.updated<bf16>(count, 2), ...;
//     if (lab.checks()) dx.expect(..., tolerance);
//     lab.needs(bytes, operations);
//     lab.version({1, "a thread has a column", 11000}, [=](int set, cudaStream_t stream) {
//       launch(relu_backward_1, {...}, dx[set], dbias[set], out[set], ...);
//     });
//     ...
//   }
//   const Listed listed({"relu_backward", relu_backward, {{1, 1, 8}, {3, 31, 48}}});
//
// The lab calls this function once to list the versions, once for each of the sizes that it checks, and once to time;
// `version` lists, checks or times accordingly. In each call `noise` gives the same numbers.
// defines: Sizes, lecture, Array, Version, Result, Chosen, Lab, Operation, Listed, operations, list, check, time
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../kernels/device.cuh"
#include "../../kernels/dropout.cuh"
#include "../../kernels/runtime.cuh"
#include "../../test/compare.h"
#include "../../test/numbers.h"

namespace lab {

struct Sizes {
  int B, T, C, NH = 1, V = 65;
  int rows() const { return B * T; }
};
constexpr Sizes lecture = {64, 256, 384, 6, 65};

// An array on the device, in as many copies as the lab needs: timing takes several in turn, so that each has left the
// cache when its turn comes again, unless it is small.
struct Copies {
  bool output;                         // a version may write it
  bool updated = false;                // and may read it before
  bool in_cache = false;               // in a step, the kernel before has just written it
  std::vector<unsigned char> initial;  // what it holds before a run
  std::vector<DeviceMemory> memory;    // a copy, with a guard of 512 bytes before and behind it
  std::function<double(const std::vector<unsigned char>&)> error;  // the largest error; empty without `expect`
  double tolerance = 0;
  static constexpr size_t guard = 512;
};

template <class Real>
class Array {
 public:
  explicit Array(std::shared_ptr<Copies> copies) : copies_(std::move(copies)) {}

  Real* operator[](int set) const {
    return reinterpret_cast<Real*>(copies_->memory[size_t(set)].template as<unsigned char>() + Copies::guard);
  }
  // An input's numbers, as a kernel sees them.
  std::vector<double> values() const {
    std::vector<double> out(copies_->initial.size() / sizeof(Real));
    for (size_t i = 0; i < out.size(); i++) {
      Real x;
      std::memcpy(static_cast<void*>(&x), copies_->initial.data() + i * sizeof x, sizeof x);
      out[i] = double(float(x));
    }
    return out;
  }
  // Says what a version must leave here. tolerance is relative to the element plus the array's root mean square
  // (test/compare.h).
  void expect(std::vector<double> want, double tolerance) const {
    copies_->tolerance = tolerance;
    copies_->error = [want = std::move(want)](const std::vector<unsigned char>& bytes) {
      std::vector<float> got(want.size());
      for (size_t i = 0; i < got.size(); i++) {
        Real x;
        std::memcpy(static_cast<void*>(&x), bytes.data() + i * sizeof x, sizeof x);
        got[i] = float(x);
      }
      return compare(got.data(), want.data(), want.size(), 1).share;
    };
  }

 private:
  std::shared_ptr<Copies> copies_;
};

struct Version {
  int number;
  const char* idea;    // what is new in it
  double expected_us;  // on an H100 or H200, written down before the lab timed it; 0: nobody said
  int choice = 0;      // its number in kernels/choices.cuh, if the trainer can choose it; else 0
};

// Puts one run of a version onto the stream, on the copies number `set` of the arrays.
using Launch = std::function<void(int set, cudaStream_t stream)>;

// What the lab found about a version. Times in microseconds; NaN where it was not timed.
struct Result {
  Version version{};
  std::string wrong;  // what the checks found, or ""
  double error = -1;  // the largest in all outputs, as a share of the tolerance; -1: nothing was compared
  double cold = NAN, cold_min = NAN, cold_max = NAN, hot = NAN, alone = NAN;
  double bytes = 0, flops = 0;
  int registers = 0, local_bytes = 0;  // of the kernel that needs the most registers; local: stack and spills
};

// Dropout as a kernel gets it. A step is a graph whose arguments never change, so a kernel must read the step's number
// from step_on_device (1); the number in the struct is a wrong one.
inline DeviceDropout on_device(Dropout drop, const int* step_on_device) {
  drop.step = 12345;
  return {drop, step_on_device};
}

// Until the end of the scope, the trainer takes this choice: const Chosen one(choices().attention_forward, 2);
class Chosen {
 public:
  Chosen(int& choice, int version) : choice_(choice), before_(std::exchange(choice, version)) {}
  ~Chosen() { choice_ = before_; }
  Chosen(const Chosen&) = delete;

 private:
  int &choice_, before_;
};

class Lab {
 public:
  enum class Task { list, check, time };
  Lab(Task task, std::vector<Result>& results, std::function<void(const Result&)> timed = {})
      : task_(task), results_(results), timed_(std::move(timed)) {}

  // Whether results are checked. If not, an operation need not compute what it expects.
  bool checks() const { return task_ == Task::check; }

  // An input (count) of random numbers, scale * N(0, 1). in_cache: in a step, the kernel before has just written it.
  template <class Real>
  Array<Real> noise(size_t count, uint32_t which, double scale = 1, bool in_cache = false) {
    std::vector<Real> values;
    if (task_ != Task::list)
      for (const float x : ::noise(count, which, scale)) values.push_back(Real(x));
    return input(values, in_cache);
  }
  template <class Real>
  Array<Real> input(const std::vector<Real>& values, bool in_cache = false) {
    std::vector<unsigned char> bytes(values.size() * sizeof(Real));
    if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    return Array<Real>(add(false, in_cache, std::move(bytes)));
  }
  // An output (count). Before a checked run all its bits are one: NaN, or -1. Without `expect` it is scratch memory.
  template <class Real>
  Array<Real> output(size_t count) {
    return Array<Real>(
        add(true, false, std::vector<unsigned char>(task_ == Task::list ? 0 : count * sizeof(Real), 0xff)));
  }
  // An array (count) that versions read and write. Before each checked run it has the same numbers; `expect` applies to
  // what a version leaves there.
  template <class Real>
  Array<Real> updated(size_t count, uint32_t which, double scale = 1, bool in_cache = false) {
    const Array<Real> out = noise<Real>(count, which, scale, in_cache);
    arrays_.back()->output = arrays_.back()->updated = true;
    return out;
  }
  template <class Real>
  Array<Real> updated(const std::vector<Real>& values) {
    const Array<Real> out = input(values);
    arrays_.back()->output = arrays_.back()->updated = true;
    return out;
  }

  // The least that any version moves and computes: each input read once, each output written once.
  void needs(double bytes, double flops) { bytes_ = bytes, flops_ = flops; }

  void version(const Version& version, const Launch& launch);

 private:
  std::shared_ptr<Copies> add(bool output, bool in_cache, std::vector<unsigned char> initial);
  static void fill(const Copies& array);
  void prepare(size_t sets, bool all);
  void check(Result& result, const Launch& launch);
  void time(Result& result, const Launch& launch);

  const Chosen starts_{choices().kernel_starts, 1};  // versions don't wait for their inputs (launch.cuh)
  Task task_;
  std::vector<Result>& results_;
  std::function<void(const Result&)> timed_;
  std::vector<std::shared_ptr<Copies>> arrays_;
  double bytes_ = 0, flops_ = 0;
  Stream stream_;
};

struct Operation {
  std::string name;
  void (*describe)(Lab&, const Sizes&);
  std::vector<Sizes> checked;  // small sizes, many of which do not fill the last block
};
// A file's operation enters the list with a constant of this type.
struct Listed {
  explicit Listed(Operation operation);
};
std::vector<Operation> operations();  // all of them, by name

std::vector<Result> list(const Operation& operation);   // its versions, neither checked nor timed
std::vector<Result> check(const Operation& operation);  // its versions, with what the checks found
// Adds times to what `check` returned, and calls timed(result) after each version.
void time(const Operation& operation, const Sizes& sizes, std::vector<Result>& results,
          const std::function<void(const Result&)>& timed);

}  // namespace lab
