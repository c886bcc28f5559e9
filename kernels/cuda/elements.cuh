// Elements of tensors in device code: as floats, and back, rounded to nearest, ties to even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/tensor.h"

namespace fathom::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(__nv_fp8_e4m3 value) { return static_cast<float>(value); }

__device__ inline void StoreFloat(float value, float* to) { *to = value; }
__device__ inline void StoreFloat(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }

// Sum and largest of a warp's values, in every lane.
__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}
__device__ inline float WarpMax(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// --- the host's side

// Calls fn with a value of the element's type in device code: float, __nv_bfloat16.
template <typename Fn>
void VisitAct(DType dtype, Fn&& fn) {
  if (dtype == DType::kF32) {
    fn(float{});
  } else {
    CHECK(dtype == DType::kBF16) << NameOf(dtype);
    fn(__nv_bfloat16{});
  }
}
// The same for weights, which may be __nv_fp8_e4m3 too.
template <typename Fn>
void VisitWeight(DType dtype, Fn&& fn) {
  if (dtype == DType::kF8E4M3) {
    fn(__nv_fp8_e4m3{});
  } else {
    VisitAct(dtype, fn);
  }
}

// The rows of a tensor of rank 2 in device code, or whatever else has a pointer and a stride.
template <typename Element>
struct Rows {
  explicit Rows(const Tensor& tensor)
      : data(static_cast<Element*>(tensor.raw())), stride(tensor.stride(0)) {}
  __device__ Element* operator[](int64_t row) const { return data + row * stride; }

  Element* data;
  int64_t stride;  // elements
};

// Most kernels give each row a block of this many threads.
inline constexpr int kRowThreads = 256;

// Launches kernel(arguments...) with one block per row, unless there is none.
template <typename... Parameters, typename... Arguments>
void LaunchRows(void (*kernel)(Parameters...), int64_t num_rows, cudaStream_t stream,
                const Arguments&... arguments) {
  if (num_rows == 0) return;
  kernel<<<static_cast<unsigned>(num_rows), kRowThreads, 0, stream>>>(arguments...);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace fathom::cuda
