#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/number_formats.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename Stored, typename To>
__global__ void DequantizeKernel(Rows<Stored> values, Rows<const float> factors, int row_offset,
                                 int column_offset, Rows<To> out, int columns) {
  const int64_t n = blockIdx.x;
  for (int k = threadIdx.x; k < columns; k += kRowThreads) {
    float value = ToFloat(values[n][k]);
    if constexpr (sizeof(Stored) == 1) {
      value *= factors[(n + row_offset) / kFp8Block][(k + column_offset) / kFp8Block];
    }
    StoreFloat(value, out[n] + k);
  }
}

// One 128×128 block of the matrix for each block of threads.
template <typename From>
__global__ void QuantizeKernel(Rows<From> x, int64_t num_rows, int64_t num_columns,
                               Rows<__nv_fp8_storage_t> values, Rows<float> factors) {
  __shared__ float warp_values[kRowThreads / kWarp];
  const int64_t row_begin = int64_t{blockIdx.y} * kFp8Block;
  const int64_t column_begin = int64_t{blockIdx.x} * kFp8Block;
  const int rows = static_cast<int>(min(int64_t{kFp8Block}, num_rows - row_begin));
  const int columns = static_cast<int>(min(int64_t{kFp8Block}, num_columns - column_begin));
  float largest = 0.0f;
  for (int i = threadIdx.x; i < rows * columns; i += kRowThreads) {
    const From value = x[row_begin + i / columns][column_begin + i % columns];
    largest = fmaxf(largest, fabsf(ToFloat(value)));  // passes over NaN
  }
  largest = WarpMax(largest);
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (const float part : warp_values) largest = fmaxf(largest, part);

  // A block of zeros, or of numbers so small that their factor would be zero, has factor 1.
  const float quotient = largest / kLargestE4M3;
  const float factor = quotient > 0.0f ? quotient : 1.0f;
  if (threadIdx.x == 0) factors[blockIdx.y][blockIdx.x] = factor;
  for (int i = threadIdx.x; i < rows * columns; i += kRowThreads) {
    const int64_t row = row_begin + i / columns, column = column_begin + i % columns;
    values[row][column] =
        __nv_cvt_float_to_fp8(ToFloat(x[row][column]) / factor, __NV_SATFINITE, __NV_E4M3);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::Dequantize(const Weight& weight, const Tensor& out) {
  CheckDequantize(weight, out);
  const Tensor& factors = weight.scale_inv.present() ? weight.scale_inv : out;  // else not read
  cuda::VisitWeight(weight.values.dtype(), [&](auto stored) {
    cuda::VisitAct(out.dtype(), [&](auto to) {
      using Stored = decltype(stored);
      using To = decltype(to);
      cuda::LaunchRows(cuda::DequantizeKernel<Stored, To>, out.dim(0), stream_,
                       cuda::Rows<Stored>(weight.values), cuda::Rows<const float>(factors),
                       weight.row_offset, weight.column_offset, cuda::Rows<To>(out),
                       static_cast<int>(out.dim(1)));
    });
  });
}

void CudaOps::QuantizeFp8(const Tensor& x, const Weight& out) {
  CheckQuantizeFp8(x, out);
  if (x.num_elements() == 0) return;
  const auto blocks_of = [](int64_t size) {
    return static_cast<unsigned>((size + kFp8Block - 1) / kFp8Block);
  };
  const dim3 blocks(blocks_of(x.dim(1)), blocks_of(x.dim(0)));
  cuda::VisitAct(x.dtype(), [&](auto from) {
    using From = decltype(from);
    cuda::QuantizeKernel<From><<<blocks, cuda::kRowThreads, 0, stream_>>>(
        cuda::Rows<From>(x), x.dim(0), x.dim(1), cuda::Rows<__nv_fp8_storage_t>(out.values),
        cuda::Rows<float>(out.scale_inv));
    CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace fathom
