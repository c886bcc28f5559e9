// CUDA_CHECK: a CUDA call that fails after start is the device's fault. The process says so in one
// line and exits; the group forms again without it. (Running out of memory while starting is the
// operator's fault and a Status instead: see Device::Allocate.)
//
// Thread-safe; of several threads that find the device failed one speaks.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace fathom {

// EX_IOERR: what a process exits with, and nothing else does.
inline constexpr int kExitGpuFailed = 74;

[[noreturn]] void CudaFailed(const char* file, int line, const char* call, cudaError_t error);

// What CudaFailed says: which error, where, and what can be done about it.
std::string DescribeCudaFailure(const char* file, int line, const char* call, cudaError_t error);

}  // namespace fathom

#define CUDA_CHECK(call)                                       \
  do {                                                         \
    if (cudaError_t error_ = (call); error_ != cudaSuccess) {  \
      ::fathom::CudaFailed(__FILE__, __LINE__, #call, error_); \
    }                                                          \
  } while (false)
