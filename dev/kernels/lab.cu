// How the lab checks and times the versions of an operation. lab.cuh says what an operation is.
#include "lab.cuh"

#include <algorithm>
#include <cmath>

#include "../bench/measure.cuh"

namespace lab {

namespace {

std::vector<Operation>& listed() {
  static std::vector<Operation> all;
  return all;
}

constexpr int timed_sets = 6;  // as many as the lecture's model has layers

#ifdef CUDA_ON_CPU
constexpr bool timed_on_cpu = true;
#else
constexpr bool timed_on_cpu = false;
#endif

// In-place: every number is read and written back, so that the second-level cache has what it would have if the kernel
// before had just written it.
__global__ void __launch_bounds__(256) touch_kernel(uint4* x, size_t count) {
  for (size_t i = size_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += size_t(gridDim.x) * 256) {
    uint4 v = x[i];
    asm volatile("" : "+r"(v.x));  // or the compiler sees that nothing changes, and does nothing
    x[i] = v;
  }
}

// Registers and local memory of the kernels that `work` launches: of the one with the most registers.
template <class Work>
void read_registers([[maybe_unused]] Result& result, [[maybe_unused]] cudaStream_t stream, [[maybe_unused]] Work work) {
#ifndef CUDA_ON_CPU
  each_node(stream, work, [&](cudaGraphNode_t node) {
    cudaKernelNodeParams kernel{};
    cudaFuncAttributes attributes{};
    // A node that is no kernel, or a kernel of a library, has none that we could ask for.
    if (cudaGraphKernelNodeGetParams(node, &kernel) == cudaSuccess &&
        cudaFuncGetAttributes(&attributes, kernel.func) == cudaSuccess && attributes.numRegs > result.registers) {
      result.registers = attributes.numRegs;
      result.local_bytes = int(attributes.localSizeBytes);
    }
    cudaGetLastError();
  });
#endif
}

bool only_ones(const unsigned char* bytes, size_t count) {
  return std::all_of(bytes, bytes + count, [](unsigned char byte) { return byte == 0xff; });
}

}  // namespace

Listed::Listed(Operation operation) { listed().push_back(std::move(operation)); }

std::vector<Operation> operations() {
  std::vector<Operation> all = listed();
  std::sort(all.begin(), all.end(), [](const Operation& a, const Operation& b) { return a.name < b.name; });
  return all;
}

// ---------------------------------------------------------------------------------------------------------------------

std::shared_ptr<Copies> Lab::add(bool output, bool in_cache, std::vector<unsigned char> initial) {
  arrays_.push_back(std::make_shared<Copies>());
  arrays_.back()->output = output;
  arrays_.back()->in_cache = in_cache;
  arrays_.back()->initial = std::move(initial);
  return arrays_.back();
}

// Gives every copy of an array what it holds before a run, and its guards their ones.
void Lab::fill(const Copies& array) {
  std::vector<unsigned char> bytes(array.initial.size() + 2 * Copies::guard, 0xff);
  std::copy(array.initial.begin(), array.initial.end(), bytes.begin() + Copies::guard);
  for (const DeviceMemory& memory : array.memory)
    copy_to_device(memory.as<unsigned char>(), bytes.data(), bytes.size());
}

// Sees to it that each array has so many copies. The arrays are large, and most are what they were: without `all`, only
// those are filled again that are new, or that a version has updated.
void Lab::prepare(size_t sets, bool all) {
  for (const auto& array : arrays_) {
    const bool fresh = array->memory.size() < sets;
    while (array->memory.size() < sets) array->memory.emplace_back(array->initial.size() + 2 * Copies::guard);
    if (all || fresh || array->updated) fill(*array);
  }
}

void Lab::version(const Version& version, const Launch& launch) {
  const auto same = [&](const Result& r) { return r.version.number == version.number; };
  auto found = std::find_if(results_.begin(), results_.end(), same);
  if (found == results_.end()) {
    results_.emplace_back().version = version;
    found = results_.end() - 1;
  }
  if (task_ != Task::check) found->bytes = bytes_, found->flops = flops_;
  if (task_ == Task::check) check(*found, launch);
  if (task_ == Task::time) {
    time(*found, launch);
    timed_(*found);  // at once: a time limit must lose nothing that was measured
  }
}

// Runs a version twice on fresh arrays. It must leave what is expected, the same bits both times, and nothing outside
// of the arrays.
void Lab::check(Result& result, const Launch& launch) {
  std::vector<std::vector<unsigned char>> first;
  const auto wrong = [&](const std::string& what) {
    if (result.wrong.empty()) result.wrong = what;
  };
  for (int run = 0; run < 2; run++) {
    prepare(1, true);
    launch(0, stream_);
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (size_t i = 0; i < arrays_.size(); i++) {
      const Copies& array = *arrays_[i];
      const std::string name = text("array ", i + 1);
      std::vector<unsigned char> bytes(array.initial.size() + 2 * Copies::guard);
      copy_to_host(bytes.data(), array.memory[0].as<unsigned char>(), bytes.size(), stream_);
      if (!only_ones(bytes.data(), Copies::guard) || !only_ones(&*bytes.end() - Copies::guard, Copies::guard))
        wrong(text("it wrote outside of ", name));
      bytes.erase(bytes.begin(), bytes.begin() + Copies::guard);
      bytes.resize(array.initial.size());
      if (!array.output && bytes != array.initial) wrong(text("it changed its input, ", name));
      if (run == 1 && array.output && array.error && bytes != first[i]) wrong(text("two runs differ in ", name));
      if (run == 0 && array.error) {
        const double error = array.error(bytes) / array.tolerance;
        if (!(error <= result.error)) result.error = error;
        if (!(error <= 1)) wrong(text(name, " is wrong: ", error, " times the error allowed"));
      }
      if (run == 0) first.push_back(std::move(bytes));
    }
  }
}

// Times a version in three ways, each as a graph of some launches, the median of nine runs. Cold: on six sets of arrays
// in turn, so that a set has left the cache before its turn comes again, unless all six fit into it. Hot: the same, but
// just before each launch we put into the cache what a step's kernel finds there; we time that by itself and subtract
// it. Alone: on one set, again and again. A version that takes more than two milliseconds is timed cold only, in three
// runs: no cache helps it.
void Lab::time(Result& result, const Launch& launch) {
  prepare(timed_sets, false);
  launch(0, stream_);  // a library chooses its algorithm here, which it could not do while a graph is captured
  read_registers(result, stream_, [&] { launch(0, stream_); });
  const double once = device_seconds(stream_, [&] { launch(0, stream_); });
  const bool slow = once > 2e-3 && !timed_on_cpu;
  const int count = slow ? timed_sets : 4 * timed_sets, runs = slow ? 3 : 9;
  const auto microseconds = [&](auto body) { return in_graph(stream_, count, runs, body); };
  const auto touch = [&](int i) {
    for (const auto& array : arrays_)
      if (array->in_cache) {
        unsigned char* const memory = array->memory[size_t(i % timed_sets)].as<unsigned char>() + Copies::guard;
        ::launch(touch_kernel, {1024, 256, 0, stream_}, reinterpret_cast<uint4*>(memory), array->initial.size() / 16);
      }
  };
  const Times cold = microseconds([&](int i) { launch(i % timed_sets, stream_); });
  result.cold = cold.median * 1e6, result.cold_min = cold.min * 1e6, result.cold_max = cold.max * 1e6;
  if (slow) return;
  const Times touching = microseconds(touch);
  const Times hot = microseconds([&](int i) {
    touch(i);
    launch(i % timed_sets, stream_);
  });
  const Times alone = microseconds([&](int) { launch(0, stream_); });
  result.hot = (hot.median - touching.median) * 1e6;
  result.alone = alone.median * 1e6;
}

// ---------------------------------------------------------------------------------------------------------------------

std::vector<Result> list(const Operation& operation) {
  std::vector<Result> results;
  Lab lab(Lab::Task::list, results);
  operation.describe(lab, operation.checked.front());  // small sizes, for which it soon has its numbers
  return results;
}

std::vector<Result> check(const Operation& operation) {
  std::vector<Result> results = list(operation);
  for (const Sizes& sizes : operation.checked) {
    Lab lab(Lab::Task::check, results);
    operation.describe(lab, sizes);
  }
  return results;
}

void time(const Operation& operation, const Sizes& sizes, std::vector<Result>& results,
          const std::function<void(const Result&)>& timed) {
  Lab lab(Lab::Task::time, results, timed);
  operation.describe(lab, sizes);
}

}  // namespace lab
