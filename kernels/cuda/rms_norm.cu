// The residual sum, the norm and what the next layers read, in one pass over the row.
//
// A block takes a row, a thread eight neighbouring elements of it (or a few times eight, where rows
// are long), which it keeps in registers between the sum and the norm.

#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/prefetch.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostPieces = 4;  // of eight elements, to a thread

template <typename Act, typename Gain>
struct NormArguments {
  Rows<Act> x;
  Rows<const Act> y;
  const Gain* gain;
  float eps;
  Rows<Act> normed;
  OutputRows quantized;
  int num_rows, size;
};

// A number per thread, summed over the block, for all of its threads.
__device__ float BlockSum(float value) {
  __shared__ float warp_sums[kWarp];
  value = WarpSum(value);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  return WarpSum(lane < warps ? warp_sums[lane] : 0.0f);
}

template <typename Act, typename Gain, bool kAligned, int kPieces>
__global__ __launch_bounds__(kMostThreads) void AddRmsNormKernel(
    const NormArguments<Act, Gain> arguments, const PrefetchList prefetch) {
  LetDependentsLaunch();
  const int row = blockIdx.x;
  if (row >= arguments.num_rows) {
    Prefetch(prefetch, row - arguments.num_rows);
    WaitForPredecessors();
    return;
  }
  const int stride = blockDim.x * kEight, first = threadIdx.x * kEight, size = arguments.size;
  float gain[kPieces][kEight], values[kPieces][kEight];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int column = first + p * stride;
    if (column < size) LoadEight<kAligned>(arguments.gain + column, size - column, gain[p]);
  }
  WaitForPredecessors();

  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int column = first + p * stride, count = size - column;
    if (count <= 0) continue;
    Act* x = arguments.x[row] + column;
    LoadEight<kAligned>(x, count, values[p]);
    if (arguments.y.present()) {
      float y[kEight];
      LoadEight<kAligned>(arguments.y[row] + column, count, y);
#pragma unroll
      for (int i = 0; i < kEight; ++i) values[p][i] = RoundedTo<Act>(values[p][i] + y[i]);
      StoreEight<kAligned>(values[p], count, x);
    }
#pragma unroll
    for (const float value : values[p]) sum += value * value;
  }
  const float factor = 1.0f / sqrtf(BlockSum(sum) / static_cast<float>(size) + arguments.eps);

#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int column = first + p * stride, count = size - column;
    float normed[kEight] = {};
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        normed[i] = RoundedTo<Act>(values[p][i] * factor * gain[p][i]);
      }
      if (arguments.normed.present()) {
        StoreEight<kAligned>(normed, count, arguments.normed[row] + column);
      }
    }
    if (arguments.quantized.values.present()) {
      arguments.quantized.template Store<Act, kAligned>(normed, row, column, count);
    }
  }
}

template <typename Act, typename Gain, bool kAligned>
void Launch(const NormArguments<Act, Gain>& arguments, const PrefetchList& prefetch,
            cudaStream_t stream) {
  const int64_t most_columns = int64_t{kMostThreads} * kEight;
  const auto threads = static_cast<unsigned>(
      DivideUp(std::min<int64_t>(arguments.size, most_columns), kEight * kWarp) * kWarp);
  const LaunchShape shape = {dim3(arguments.num_rows + prefetch.blocks()), dim3(threads)};
  if (arguments.size <= most_columns) {
    LaunchDependent(AddRmsNormKernel<Act, Gain, kAligned, 1>, shape, stream, arguments, prefetch);
  } else {
    CHECK_LE(arguments.size, most_columns * kMostPieces);
    LaunchDependent(AddRmsNormKernel<Act, Gain, kAligned, kMostPieces>, shape, stream, arguments,
                    prefetch);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                         const Tensor& normed, const LinearInput& quantized) {
  CheckAddRmsNorm(x, y, weight, normed, quantized);
  if (x.dim(0) == 0) return;
  const bool aligned = cuda::AreAlignedForEight(x, y, weight, normed, quantized.values);
  const cuda::PrefetchList prefetch = TakePrefetches(x.dim(0));
  cuda::VisitAct(x.dtype(), [&](auto act) {
    cuda::VisitAct(weight.dtype(), [&](auto gain) {
      cuda::VisitBool(aligned, [&](auto is_aligned) {
        using Act = decltype(act);
        using Gain = decltype(gain);
        const cuda::NormArguments<Act, Gain> arguments = {cuda::Rows<Act>(x),
                                                          cuda::Rows<const Act>(y),
                                                          static_cast<const Gain*>(weight.raw()),
                                                          eps,
                                                          cuda::Rows<Act>(normed),
                                                          cuda::OutputRows(quantized),
                                                          static_cast<int>(x.dim(0)),
                                                          static_cast<int>(x.dim(1))};
        cuda::Launch<Act, Gain, decltype(is_aligned)::value>(arguments, prefetch, stream_);
      });
    });
  });
}

}  // namespace fathom
