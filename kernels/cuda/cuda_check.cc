#include "kernels/cuda/cuda_check.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace fathom {
namespace {

const char* AdviceOn(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "the GPU's memory is full: try decreasing --gpu-memory-utilization, or end what else "
             "uses the GPU";
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorNoKernelImageForDevice:
      return "the driver or the GPU does not go with this program: nvidia-smi names both";
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorDevicesUnavailable:
    case cudaErrorDeviceUninitialized:
    case cudaErrorContained:
      return "the GPU is broken or taken: see nvidia-smi -q and the Xid lines of dmesg";
    case cudaErrorMpsConnectionFailed:
    case cudaErrorMpsRpcFailure:
    case cudaErrorMpsServerNotReady:
    case cudaErrorMpsClientTerminated:
      return "the MPS server ended, or another of its clients failed: see its logs";
    default:
      return "a fault of this program unless dmesg has an Xid line of the GPU: please report it";
  }
}

}  // namespace

std::string DescribeCudaFailure(const char* file, int line, const char* call, cudaError_t error) {
  std::string text = "the GPU failed: ";
  text.append(cudaGetErrorString(error)).append(" (").append(cudaGetErrorName(error));
  text.append(") in ").append(call).append(" at ").append(file).append(":");
  return text.append(std::to_string(line)).append("; ").append(AdviceOn(error));
}

void CudaFailed(const char* file, int line, const char* call, cudaError_t error) {
  static std::atomic<bool> is_said = false;
  while (is_said.exchange(true)) pause();  // until the other one exits
  std::fprintf(stderr, "%s\n", DescribeCudaFailure(file, line, call, error).c_str());
  std::_Exit(kExitGpuFailed);  // no destructors: they would wait for a device that does not answer
}

}  // namespace fathom
