// The residual sum, the norm and what the next layers read, in one pass over the row.
//
// A block takes a row, a thread eight neighbouring elements of it (a few times eight where there
// are many rows, or long ones), which it keeps in registers between the sum and the norm.

#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/prefetch.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kMostThreads = 1024;

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

// kEarlyGain: the weight is in registers before the kernel before has ended. Otherwise registers
// are spared, so that more rows are under way at once.
template <typename Act, typename Gain, bool kAligned, int kPieces, bool kEarlyGain>
__global__ __launch_bounds__(
    kEarlyGain ? kMostThreads : kMostThreads / 2,
    kPieces == 2 ? 3 : 1) void AddRmsNormKernel(const NormArguments<Act, Gain> arguments,
                                                const PrefetchList prefetch) {
  LetDependentsLaunch();
  const int row = blockIdx.x;
  if (row >= arguments.num_rows) {
    Prefetch(prefetch, row - arguments.num_rows);
    WaitForPredecessors();
    return;
  }
  const int stride = blockDim.x * kEight, first = threadIdx.x * kEight, size = arguments.size;
  float gain[kEight];
  if constexpr (kEarlyGain) {
    static_assert(kPieces == 1);
    if (first < size) LoadEight<kAligned>(arguments.gain + first, size - first, gain);
  }
  WaitForPredecessors();

  PackedEight<Act> values[kPieces];
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int column = first + p * stride;
    values[p].Clear();
    if (column < size) values[p].template Load<kAligned>(arguments.x[row] + column, size - column);
  }
  if (arguments.y.present()) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int column = first + p * stride, count = size - column;
      if (count <= 0) continue;
      PackedEight<Act> y;
      y.template Load<kAligned>(arguments.y[row] + column, count);
      float added[kEight];
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        added[i] = values[p][i] + y[i];
        StoreFloat(added[i], &values[p].elements[i]);
      }
      StoreEight<kAligned>(added, count, arguments.x[row] + column);
    }
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) sum += values[p][i] * values[p][i];
  }
  const float factor = 1.0f / sqrtf(BlockSum(sum) / static_cast<float>(size) + arguments.eps);

#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int column = first + p * stride, count = size - column;
    float normed[kEight] = {};
    if (count > 0) {
      if constexpr (!kEarlyGain) LoadEight<kAligned>(arguments.gain + column, count, gain);
#pragma unroll
      for (int i = 0; i < kEight; ++i) normed[i] = RoundedTo<Act>(values[p][i] * factor * gain[i]);
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
  constexpr int kFewRows = 128;  // a multiprocessor each
  const auto launch = [&](auto kernel, int pieces) {
    const auto threads =
        static_cast<unsigned>(DivideUp(arguments.size, int64_t{kEight} * kWarp * pieces) * kWarp);
    LaunchDependent(kernel, {dim3(arguments.num_rows + prefetch.blocks()), dim3(threads)}, stream,
                    arguments, prefetch);
  };
  constexpr int kFew = kMostThreads * kEight, kMany = kMostThreads / 2 * kEight;
  if (arguments.size <= kFew && arguments.num_rows <= kFewRows) {
    launch(AddRmsNormKernel<Act, Gain, kAligned, 1, true>, 1);
  } else if (arguments.size <= 2 * kMany) {
    launch(AddRmsNormKernel<Act, Gain, kAligned, 2, false>, 2);
  } else {
    CHECK_LE(arguments.size, 8 * kMany);
    launch(AddRmsNormKernel<Act, Gain, kAligned, 8, false>, 8);
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
