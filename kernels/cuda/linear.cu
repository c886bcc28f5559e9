// Which kernel takes a linear layer. Shapes and types decide, never what tensors hold: a recorded
// step must choose the same.

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/linear_bf16.h"
#include "kernels/cuda/linear_generic.h"
#include "kernels/shape_checks.h"

namespace fathom {

bool CudaOps::LinearBf16(const LinearInput& x, const Weight& weight, const Tensor& out) {
  constexpr int64_t kFewRows = 8, kManyOutputs = 4096;  // below: a warp per output is as good
  const cuda::Bf16Product product = {.x = x.values, .weight = weight.values, .out = out};
  if (!cuda::FitsBf16Product(product)) return false;
  if (x.values.dim(0) <= kFewRows && weight.values.dim(0) < kManyOutputs) return false;
  cuda::MultiplyBf16(product, stream_);
  return true;
}

void CudaOps::Linear(const LinearInput& x, const Weight& weight, const Tensor& out) {
  const LinearSizes sizes = CheckLinear(x, weight, out);
  if (sizes.rows == 0 || sizes.outputs == 0) return;
  if (LinearSm90(x, weight, out) || LinearBf16(x, weight, out)) return;
  cuda::MultiplyGeneric(x, weight, sizes, out, stream_);
}

void CudaOps::GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                            int num_choices, const Tensor& out) {
  const LinearSizes sizes = CheckGroupedLinear(x, groups, weight, num_choices, out);
  if (sizes.rows == 0 || sizes.outputs == 0) return;
  if (GroupedLinearSm90(x, groups, weight, num_choices, out)) return;
  cuda::MultiplyGroupedGeneric(x, groups, weight, num_choices, sizes, out, stream_);
}

}  // namespace fathom
