// NCCL on the CPU: nccl.h says what it does.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include "nccl.h"

#include <mpi.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct ncclComm {
  MPI_Comm mpi;
  int rank, ranks;
  unsigned long long calls = 0, groups = 0;  // groups that have run, and that were to run
  bool aborted = false;                      // it is not freed then, because the stream may hold some of its work
};

namespace {

struct Message {
  bool sent;
  int rank;
  void* data;
  size_t bytes;
};
struct Header {
  unsigned long long call, bytes;
};

std::string last_error;
int depth = 0;
std::vector<Message> group;
ncclComm_t group_communicator = nullptr;
cudaStream_t group_stream = nullptr;

ncclResult_t refuse(const std::string& words) {
  last_error = words;
  return ncclInvalidUsage;
}

[[noreturn]] void fail(const std::string& words) { throw std::runtime_error("NCCL on the CPU: " + words); }

// A group that is under way. Each message goes behind its header, and the receiver compares that with what it expects.
// MPI gets copies: device memory is closed while the host does something else, and MPI may read it from another process.
// NCCL reads what is sent at any time until the group has ended. Here that is when the group begins or, if
// CUDA_ON_CPU_SEED is odd, when the receiver answers, so that each shows a dependency that is missing.
class Exchange {
 public:
  Exchange(ncclComm& communicator, const std::vector<Message>& messages)
      : c_(communicator), messages_(messages), headers_(messages.size()), call_(communicator.calls++) {
    for (const Message& m : messages_) copies_.emplace_back(m.bytes);
    if (!late()) copy_what_is_sent();
    for (size_t i = 0; i < messages_.size(); i++) {
      if (messages_[i].sent) headers_[i] = {call_, messages_[i].bytes};
      post(i, &headers_[i], sizeof(Header), 1);
    }
  }

  // Whether all has been sent and received by now.
  bool done() {
    if (!arrived()) return false;
    if (!compared_) {
      compare();
      if (late()) copy_what_is_sent();
      for (size_t i = 0; i < messages_.size(); i++) post(i, copies_[i].data(), messages_[i].bytes, 2);
    }
    if (!arrived()) return false;
    for (size_t i = 0; i < messages_.size(); i++)
      if (!messages_[i].sent) std::memcpy(messages_[i].data, copies_[i].data(), messages_[i].bytes);
    return true;
  }

 private:
  static bool late() {
    const char* const seed = std::getenv("CUDA_ON_CPU_SEED");
    return seed && std::atol(seed) % 2 != 0;
  }
  void copy_what_is_sent() {
    for (size_t i = 0; i < messages_.size(); i++)
      if (messages_[i].sent) std::memcpy(copies_[i].data(), messages_[i].data, messages_[i].bytes);
  }

  void post(size_t i, void* data, size_t bytes, int tag) {
    MPI_Request request = MPI_REQUEST_NULL;
    const int rank = messages_[i].rank;
    if (messages_[i].sent)
      MPI_Isend(data, int(bytes), MPI_BYTE, rank, tag, c_.mpi, &request);
    else
      MPI_Irecv(data, int(bytes), MPI_BYTE, rank, tag, c_.mpi, &request);
    requests_.push_back(request);
  }

  bool arrived() {
    int all = 0;
    MPI_Testall(int(requests_.size()), requests_.data(), &all, MPI_STATUSES_IGNORE);
    if (all) {
      requests_.clear();
      deadline_ = soon();
      return true;
    }
    if (std::chrono::steady_clock::now() < deadline_) return false;
    std::string words;
    for (size_t i = 0; i < requests_.size(); i++) {
      if (requests_[i] == MPI_REQUEST_NULL) continue;
      MPI_Cancel(&requests_[i]);
      const Message& m = messages_[i];
      words = "in call " + std::to_string(call_) + " rank " + std::to_string(c_.rank) + " waits for rank " +
              std::to_string(m.rank) + (m.sent ? " to take " : " to send ") + std::to_string(m.bytes) +
              " bytes; NCCL would hang";
    }
    fail(words);
  }

  void compare() {
    compared_ = true;
    for (size_t i = 0; i < messages_.size(); i++) {
      const Message& m = messages_[i];
      if (headers_[i].call != call_ || headers_[i].bytes != m.bytes)
        fail("rank " + std::to_string(m.rank) + " sends " + std::to_string(headers_[i].bytes) + " bytes in its call " +
             std::to_string(headers_[i].call) + ", where rank " + std::to_string(c_.rank) + " receives " +
             std::to_string(m.bytes) + " in call " + std::to_string(call_) + "; NCCL would hang");
    }
  }

  static std::chrono::steady_clock::time_point soon() {
    const char* const seconds = std::getenv("CUDA_ON_CPU_NCCL_SECONDS");
    return std::chrono::steady_clock::now() + std::chrono::milliseconds(seconds ? 1000 * std::atol(seconds) : 10'000);
  }

  ncclComm& c_;
  std::vector<Message> messages_;
  std::vector<Header> headers_;
  std::vector<std::vector<char>> copies_;  // by message
  std::vector<MPI_Request> requests_;      // of headers, then of messages, in their order
  unsigned long long call_;
  bool compared_ = false;
  std::chrono::steady_clock::time_point deadline_ = soon();
};

// Whether CUDA_ON_CPU_NCCL_SKIP says that this rank leaves out this group.
bool skipped(ncclComm& c) {
  int rank = 0;
  unsigned long long number = 0;
  const char* const skip = std::getenv("CUDA_ON_CPU_NCCL_SKIP");
  const bool given = skip && std::sscanf(skip, "%d %llu", &rank, &number) == 2;
  return c.groups++ == number && given && rank == c.rank;
}

ncclResult_t note(const Message& message, ncclComm_t communicator, cudaStream_t stream) {
  if (depth == 0) return refuse("a send or a receive outside of a group");
  if (message.rank == communicator->rank) return refuse("a message to oneself");
  if (!group.empty() && (communicator != group_communicator || stream != group_stream))
    return refuse("a group on two streams or communicators");
  group_communicator = communicator;
  group_stream = stream;
  group.push_back(message);
  return ncclSuccess;
}

}  // namespace

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id->internal, 0, sizeof id->internal);
  std::snprintf(id->internal, sizeof id->internal, "NCCL on the CPU, process %d", int(getpid()));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* communicator, int ranks, ncclUniqueId id, int rank) {
  int size = 0, mpi_rank = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
  if (size != ranks || mpi_rank != rank) return refuse("this communicator is not the world of MPI");
  ncclUniqueId first = id;
  MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
  if (std::memcmp(&first, &id, sizeof id) != 0) return refuse("the ranks have not the same id");
  *communicator = new ncclComm{MPI_COMM_NULL, rank, ranks};
  MPI_Comm_dup(MPI_COMM_WORLD, &(*communicator)->mpi);
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  delete communicator;  // MPI's part ends with MPI
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t communicator) { return communicator->aborted = true, ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* result) { return *result = ncclSuccess; }

ncclResult_t ncclGroupStart() { return depth++, ncclSuccess; }
ncclResult_t ncclGroupEnd() {
  if (depth == 0) return refuse("the end of a group that was not begun");
  if (--depth > 0 || group.empty()) return ncclSuccess;
  // A captured graph runs its works again and again, one after the other; each time there is a new exchange.
  const auto under_way = std::make_shared<std::unique_ptr<Exchange>>();
  const cudaError_t error =
      cuda_on_cpu::enqueue(group_stream, [messages = group, communicator = group_communicator, under_way] {
        if (communicator->aborted) fail("the communicator was aborted");
        if (!*under_way) {
          if (skipped(*communicator)) return;
          *under_way = std::make_unique<Exchange>(*communicator, messages);
        }
        if (!(*under_way)->done()) throw cuda_on_cpu::NotYet();
        under_way->reset();
      });
  group.clear();
  return error ? ncclSystemError : ncclSuccess;
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int rank, ncclComm_t communicator,
                      cudaStream_t stream) {
  return note({true, rank, const_cast<void*>(data), count}, communicator, stream);
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int rank, ncclComm_t communicator,
                      cudaStream_t stream) {
  return note({false, rank, data, count}, communicator, stream);
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclInProgress:
      return "in progress";
  }
  return "unknown result";
}
const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }
