// NCCL between the ranks' cards. Without MPI=1 there is never a connection.
#include "link.h"

#include "../host/ranks.h"
#include "check.cuh"

#ifndef MICROGPT_MPI

DeviceLink::DeviceLink() { fail("this program was built without MPI"); }
DeviceLink::~DeviceLink() = default;
void DeviceLink::exchange(const std::vector<DeviceMessage>&, const std::vector<DeviceMessage>&, cudaStream_t) {}
void DeviceLink::mark(cudaStream_t) {}
void DeviceLink::wait(cudaStream_t) {}

#else

#include <nccl.h>
#include <unistd.h>

#include <chrono>

namespace {

using Clock = std::chrono::steady_clock;

void check(ncclResult_t result) {
  if (result != ncclSuccess && result != ncclInProgress)
    fail("NCCL: ", ncclGetErrorString(result), ": ", ncclGetLastError(nullptr));
}

ncclComm_t of(void* communicator) { return static_cast<ncclComm_t>(communicator); }

}  // namespace

DeviceLink::DeviceLink() {
  // Two ranks on one card would wait for each other for ever.
  int device = 0;
  char bus[32] = "";
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
  const std::vector<std::string> cards = ranks().all_texts(ranks().host() + ", card " + bus);
  for (size_t r = 0; r < cards.size(); r++)
    for (size_t q = 0; q < r; q++)
      if (cards[q] == cards[r])
        ranks().fail_alike(text("rank ", q, " and rank ", r, " have the same card (", cards[r],
                                "): start no more processes on a host than it has GPUs"));
  ncclUniqueId id{};
  if (ranks().first()) check(ncclGetUniqueId(&id));
  id = ranks().all(id)[0];
  ncclComm_t communicator = nullptr;
  check(ncclCommInitRank(&communicator, ranks().count(), id, ranks().rank()));
  communicator_ = communicator;
}

DeviceLink::~DeviceLink() {
  for (const cudaEvent_t mark : marks_) cudaEventDestroy(mark);
  if (communicator_) ncclCommDestroy(of(communicator_));
}

void DeviceLink::exchange(const std::vector<DeviceMessage>& out, const std::vector<DeviceMessage>& in,
                          cudaStream_t stream) {
  check(ncclGroupStart());
  for (const DeviceMessage& m : out) check(ncclSend(m.data, m.bytes, ncclChar, m.rank, of(communicator_), stream));
  for (const DeviceMessage& m : in) check(ncclRecv(m.data, m.bytes, ncclChar, m.rank, of(communicator_), stream));
  check(ncclGroupEnd());
}

void DeviceLink::mark(cudaStream_t stream) {
  if (marked_ == marks_.size()) {
    marks_.emplace_back();
    CUDA_CHECK(cudaEventCreateWithFlags(&marks_.back(), cudaEventDisableTiming));
  }
  CUDA_CHECK(cudaEventRecord(marks_[marked_++], stream));
}

void DeviceLink::wait(cudaStream_t stream) {
  mark(stream);
  const auto patience = std::chrono::duration<double>(ranks().timeout());
  auto deadline = Clock::now() + patience;
  for (size_t i = 0; i < marked_;) {
    ncclResult_t result = ncclSuccess;
    ncclCommGetAsyncError(of(communicator_), &result);
    const cudaError_t state = cudaEventQuery(marks_[i]);
    if (state == cudaSuccess) {
      i++;
      deadline = Clock::now() + patience;
    } else if (state != cudaErrorNotReady) {
      CUDA_CHECK(state);
    } else if (result != ncclSuccess || Clock::now() > deadline) {
      ncclCommAbort(of(communicator_));
      communicator_ = nullptr;
      ranks().lost();
    } else {
      usleep(50);
    }
  }
  marked_ = 0;
}

#endif
