#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename Act>
__global__ void RotaryKernel(Rows<Act> x, int64_t head_stride, int num_heads, int num_pairs,
                             const int* positions, int64_t positions_stride, const float2* turns) {
  const int64_t token = blockIdx.x;
  const float2* turn = turns + int64_t{positions[token * positions_stride]} * num_pairs;
  for (int i = threadIdx.x; i < num_heads * num_pairs; i += kRowThreads) {
    Act* pair = x[token] + i / num_pairs * head_stride + i % num_pairs * 2;
    const float2 cos_sin = turn[i % num_pairs];
    const float even = ToFloat(pair[0]);
    const float odd = ToFloat(pair[1]);
    StoreFloat(even * cos_sin.x - odd * cos_sin.y, pair);
    StoreFloat(even * cos_sin.y + odd * cos_sin.x, pair + 1);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::RotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin) {
  CheckRotaryEmbed(x, positions, cos_sin);
  cuda::VisitAct(x.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchRows(cuda::RotaryKernel<Act>, x.dim(0), stream_, cuda::Rows<Act>(x), x.stride(1),
                     static_cast<int>(x.dim(1)), static_cast<int>(x.dim(2) / 2),
                     positions.data<int32_t>(), positions.stride(0),
                     reinterpret_cast<const float2*>(cos_sin.data<float>()));
  });
}

}  // namespace fathom
