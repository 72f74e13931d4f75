// What the trainer asks of CUDA besides kernels: memory, a stream, a graph, time.
// defines: DeviceMemory, DeviceBuffer, copy_to_device, copy_to_host, free_device_memory, Stream, Event, Graph,
//          device_milliseconds, plant_canaries_on_device, check_canaries_on_device, first_not_finite_on_device
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "../host/error.h"
#include "../host/tensors.h"
#include "launch.cuh"

// Bytes on the device, as cudaMalloc leaves them.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t bytes) { CUDA_CHECK(cudaMalloc(&memory_, bytes)); }
  DeviceMemory(DeviceMemory&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(memory_); }
  template <class Element>
  Element* as() const {
    return reinterpret_cast<Element*>(memory_);
  }

 private:
  unsigned char* memory_ = nullptr;
};

// `count` elements on the device, zeroed: the zeros are there when the constructor is done, and no stream has to wait for
// them. `what` names the elements in the message when there is no memory for them.
template <class Element>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(size_t count, const char* what) {
    if (count == 0) return;
    memory_ = allocate(count * sizeof(Element), what);
    CUDA_CHECK(cudaMemset(data(), 0, count * sizeof(Element)));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  Element* data() const { return memory_.as<Element>(); }

 private:
  static DeviceMemory allocate(size_t bytes, const char* what) {
    try {
      return DeviceMemory(bytes);
    } catch (const CudaError&) {
      cudaGetLastError();  // so that the error is not found again at the next launch
      size_t free = 0, total = 0;
      CUDA_CHECK(cudaMemGetInfo(&free, &total));
      fail("out of GPU memory: ", bytes / 1000000, " MB for ", what, " were asked for, ", free / 1000000, " MB of ",
           total / 1000000, " MB are free; lower --batch_size (activations) or ",
           "--n_embd, --n_layer, --block_size (all)");
    }
  }
  DeviceMemory memory_;
};

// Copies to the device and waits until it has arrived: cudaMemcpy from ordinary memory may return before, and the stream
// of the kernels does not wait for it.
template <class Element>
void copy_to_device(Element* to, const Element* from, size_t count) {
  CUDA_CHECK(cudaMemcpy(to, from, count * sizeof(Element), cudaMemcpyHostToDevice));
  CUDA_CHECK(cudaDeviceSynchronize());
}

// Copies to the host what the stream's work so far leaves on the device.
template <class Element>
void copy_to_host(Element* to, const Element* from, size_t count, cudaStream_t stream) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, count * sizeof(Element), cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

inline double free_device_memory() {  // bytes
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return double(free);
}

// A queue of kernels and copies, which the device works off in order.
class Stream {
 public:
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_;
};

// A point in a stream: others can wait until it has been passed.
class Event {
 public:
  explicit Event(bool timed = false) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }
  void record(cudaStream_t stream) { CUDA_CHECK(cudaEventRecord(event_, stream)); }
  // What is put onto the stream from now on waits for the point where the event was last recorded.
  void hold(cudaStream_t stream) const { CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }

 private:
  cudaEvent_t event_;
};

// The kernels that `body` puts onto a stream, recorded once and then launched again and again as a whole, which saves the
// time between one kernel and the next.
class Graph {
 public:
  ~Graph() {
    if (graph_) cudaGraphExecDestroy(graph_);
  }
  template <class Body>
  void capture(cudaStream_t stream, Body body) {
    cudaGraph_t captured;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
    CUDA_CHECK(cudaGraphInstantiate(&graph_, captured, 0));
    CUDA_CHECK(cudaGraphDestroy(captured));
  }
  bool captured() const { return graph_; }
  void launch(cudaStream_t stream) { CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

// How long the device takes for what `work` puts onto the stream.
template <class Work>
float device_milliseconds(cudaStream_t stream, Work work) {
  Event begin(true), end(true);
  float milliseconds = 0;
  begin.record(stream);
  work();
  end.record(stream);
  CUDA_CHECK(cudaEventSynchronize(end));
  CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
  return milliseconds;
}

// In builds with canaries the gaps between tensors hold NaN (host/tensors.h). Training is slow then. zero: they hold 0
// instead, as in the gradients' buffer, over all of which clipping sums.
template <class Element>
void plant_canaries_on_device([[maybe_unused]] Element* buffer, [[maybe_unused]] const Layout& layout) {
  if constexpr (canary_gap > 0)
    for (const TensorSpec& spec : layout.tensors())
      for (int l = 0; l < spec.layers; l++)
        CUDA_CHECK(cudaMemset(buffer + spec.offset + size_t(l) * spec.stride + spec.padded, 0xff,
                              (spec.stride - spec.padded) * sizeof(Element)));
}
template <class Element>
void check_canaries_on_device([[maybe_unused]] const Element* buffer, [[maybe_unused]] const Layout& layout,
                              [[maybe_unused]] const char* name, [[maybe_unused]] bool zero = false) {
  if constexpr (canary_gap > 0) {
    std::vector<Element> copy(layout.size());
    CUDA_CHECK(cudaMemcpy(copy.data(), buffer, copy.size() * sizeof(Element), cudaMemcpyDeviceToHost));
    std::vector<float> values(copy.begin(), copy.end());
    for (const TensorSpec& spec : layout.tensors())
      for (int l = 0; l < spec.layers && zero; l++)
        for (size_t i = spec.padded; i < spec.stride; i++) {
          float& gap = values[spec.offset + size_t(l) * spec.stride + i];
          gap = gap == 0 ? NAN : 0;
        }
    check_canaries(values.data(), layout, name);
  }
}

// The first tensor of a buffer on the device that has a number which is infinite or NaN (host/tensors.h). A tensor is
// copied at a time: all activations may not fit into the host's memory.
template <class Element>
std::string first_not_finite_on_device(const Element* buffer, const Layout& layout, Order order) {
  std::vector<Element> copy;
  std::vector<float> values;
  const auto slice = [&](size_t offset, size_t count) {
    copy.resize(count);
    CUDA_CHECK(cudaMemcpy(copy.data(), buffer + offset, count * sizeof(Element), cudaMemcpyDeviceToHost));
    values = std::vector<float>(copy.begin(), copy.end());
    return values.data();
  };
  return first_not_finite(slice, layout, order);
}
