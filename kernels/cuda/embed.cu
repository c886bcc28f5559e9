#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename From, typename To>
__global__ void EmbedKernel(const int* token_ids, int64_t ids_stride, Rows<From> table,
                            int64_t num_rows, int first_row, Rows<To> out, int hidden_size) {
  const int64_t token = blockIdx.x;
  const int64_t row = int64_t{token_ids[token * ids_stride]} - first_row;
  To* target = out[token];
  const bool is_here = row >= 0 && row < num_rows;
  for (int i = threadIdx.x; i < hidden_size; i += kRowThreads) {
    StoreFloat(is_here ? ToFloat(table[row][i]) : 0.0f, target + i);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::Embed(const Tensor& token_ids, const Tensor& table, int first_row,
                    const Tensor& out) {
  CheckEmbed(token_ids, table, out);
  cuda::VisitAct(table.dtype(), [&](auto from) {
    cuda::VisitAct(out.dtype(), [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      cuda::LaunchRows(cuda::EmbedKernel<From, To>, out.dim(0), stream_, token_ids.data<int32_t>(),
                       token_ids.stride(0), cuda::Rows<From>(table), table.dim(0), first_row,
                       cuda::Rows<To>(out), static_cast<int>(out.dim(1)));
    });
  });
}

}  // namespace fathom
