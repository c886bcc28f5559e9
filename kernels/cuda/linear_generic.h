// Linear layers of any shape and type, F32 throughout: what the kernels for tensor cores leave.
// Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include "kernels/ops.h"
#include "kernels/shape_checks.h"

namespace fathom::cuda {

// Arguments as Ops::Linear and Ops::GroupedLinear have checked them.
void MultiplyGeneric(const LinearInput& x, const Weight& weight, const LinearSizes& sizes,
                     const Tensor& out, cudaStream_t stream);
void MultiplyGroupedGeneric(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                            int num_choices, const LinearSizes& sizes, const Tensor& out,
                            cudaStream_t stream);

// out[t, a] = x[t, a] · weight[a]ᵀ for each head a.
//   x [T, A, K] act, strides free   weight [A, N, K] act   out [T, A, N] act, strides free
void MultiplyHeads(const Tensor& x, const Tensor& weight, const Tensor& out, cudaStream_t stream);

}  // namespace fathom::cuda
