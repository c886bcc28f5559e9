#include "kernels/cuda/cuda_check.h"

#include <cstdio>
#include <cstdlib>

namespace fathom {

void CudaFailed(const char* file, int line, const char* call, cudaError_t error) {
  std::fprintf(stderr, "%s:%d: the GPU failed: %s: %s\n", file, line, call,
               cudaGetErrorString(error));
  std::_Exit(1);  // no destructors: they would wait for a device that does not answer
}

}  // namespace fathom
