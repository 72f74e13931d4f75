// NCCL on the CPU (nccl.cpp): the functions that kernels/link.cpp calls. The ranks are processes under MPI, and each has
// a card of its own that engine.cpp plays.
//
// A group of sends and receives is one piece of work on its stream. When its turn comes, each message goes out with its
// number and length, and the receiver compares them with what it expects: so calls in another order, and messages of
// another length, are errors with a description, where NCCL would hang or overwrite memory. A message that does not come
// within CUDA_ON_CPU_NCCL_SECONDS (10) is one, too. CUDA_ON_CPU_NCCL_SKIP="1 7" lets rank 1 leave out its call 7, so that
// tests can see it.
#pragma once
#include <cuda_runtime.h>

struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};
enum ncclResult_t { ncclSuccess = 0, ncclSystemError = 2, ncclInvalidUsage = 5, ncclInProgress = 7 };
enum ncclDataType_t { ncclChar = 0 };

ncclResult_t ncclGetUniqueId(ncclUniqueId*);
ncclResult_t ncclCommInitRank(ncclComm_t*, int ranks, ncclUniqueId, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t);
ncclResult_t ncclCommAbort(ncclComm_t);
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t*);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int rank, ncclComm_t, cudaStream_t);
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int rank, ncclComm_t, cudaStream_t);
const char* ncclGetErrorString(ncclResult_t);
const char* ncclGetLastError(ncclComm_t);
