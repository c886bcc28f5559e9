// Rows in act to 1×128, where no operation before could write them so. Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include "kernels/ops.h"

namespace fathom::cuda {

//   x [T, K] act   out [T, K] quantised
void QuantizeRows(const Tensor& x, const LinearInput& out, cudaStream_t stream);

}  // namespace fathom::cuda
