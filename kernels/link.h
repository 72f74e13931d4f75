// The connection between the cards of a run's ranks: NCCL's. link.cpp, which has no kernels, is compiled by itself: so the
// trainer is the same with MPI=1 and without.
// defines: DeviceMessage, DeviceLink
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

struct DeviceMessage {
  int rank;    // to which, or from which
  void* data;  // on the device
  size_t bytes;
};

class DeviceLink {
 public:
  DeviceLink();  // all ranks call this together, each with a card of its own as the current one
  ~DeviceLink();
  DeviceLink(const DeviceLink&) = delete;
  // Puts an exchange onto the stream, which goes on when all of it has been sent and received.
  void exchange(const std::vector<DeviceMessage>& out, const std::vector<DeviceMessage>& in, cudaStream_t stream);
  // Notes a point in the stream for wait: the work of a step ends here.
  void mark(cudaStream_t stream);
  // Waits until the stream has done its work. When it takes longer than --comm_timeout from one mark to the next, this
  // cuts the connection, so that the card can go on, and raises an Error that names the rank which does not answer.
  void wait(cudaStream_t stream);

 private:
  std::vector<cudaEvent_t> marks_;
  size_t marked_ = 0;
  void* communicator_ = nullptr;
};
