#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename Act, typename Gain>
__global__ void RmsNormKernel(Rows<Act> x, const Gain* gain, float eps, Rows<Act> out, int size) {
  __shared__ float warp_sums[kRowThreads / kWarp];
  const Act* row = x[blockIdx.x];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < size; i += kRowThreads) {
    const float value = ToFloat(row[i]);
    sum += value * value;
  }
  sum = WarpSum(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();  // also: all of the row is read before any of it is written
  sum = 0.0f;
  for (const float part : warp_sums) sum += part;

  const float factor = 1.0f / sqrtf(sum / static_cast<float>(size) + eps);
  Act* target = out[blockIdx.x];
  for (int i = threadIdx.x; i < size; i += kRowThreads) {
    StoreFloat(ToFloat(row[i]) * factor * ToFloat(gain[i]), target + i);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  CheckRmsNorm(x, weight, out);
  cuda::VisitAct(x.dtype(), [&](auto act) {
    cuda::VisitAct(weight.dtype(), [&](auto gain) {
      using Act = decltype(act);
      using Gain = decltype(gain);
      cuda::LaunchRows(cuda::RmsNormKernel<Act, Gain>, x.dim(0), stream_, cuda::Rows<Act>(x),
                       static_cast<const Gain*>(weight.raw()), eps, cuda::Rows<Act>(out),
                       static_cast<int>(x.dim(1)));
    });
  });
}

}  // namespace fathom
