#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename From, typename To>
__global__ void StoreKvKernel(Rows<From> latent, int kv_lora_rank, Rows<From> rope, int rope_dim,
                              const int* places, int64_t places_stride, To* cache) {
  const int64_t token = blockIdx.x;
  const int width = kv_lora_rank + rope_dim;
  To* target = cache + int64_t{places[token * places_stride]} * width;
  for (int i = threadIdx.x; i < width; i += kRowThreads) {
    const From value = i < kv_lora_rank ? latent[token][i] : rope[token][i - kv_lora_rank];
    StoreFloat(ToFloat(value), target + i);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::StoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
                      const Tensor& cache) {
  CheckStoreKv(latent, rope, places, cache);
  cuda::VisitAct(latent.dtype(), [&](auto from) {
    cuda::VisitAct(cache.dtype(), [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      cuda::LaunchRows(cuda::StoreKvKernel<From, To>, latent.dim(0), stream_,
                       cuda::Rows<From>(latent), static_cast<int>(latent.dim(1)),
                       cuda::Rows<From>(rope), static_cast<int>(rope.dim(1)),
                       places.data<int32_t>(), places.stride(0), static_cast<To*>(cache.raw()));
    });
  });
}

}  // namespace fathom
