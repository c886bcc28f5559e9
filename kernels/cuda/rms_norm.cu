// The residual sum, the norm and what the next layers read, in one pass over the row.
//
// A thread takes eight neighbouring elements of a row (a few times eight where there are many rows,
// or long ones), which it keeps in registers between the sum and the norm.

#include <algorithm>
#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/prefetch.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kManyThreads = 512;  // of a block of several rows

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

// A number per thread, summed over the block, for all of its threads. Two calls in a row need two
// rooms.
__device__ float BlockSum(float value, float (&warp_sums)[kWarp]) {
  value = WarpSum(value);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  return WarpSum(lane < warps ? warp_sums[lane] : 0.0f);
}

// Eight neighbouring elements of a row on their way.
template <typename Act, bool kAligned>
struct Piece {
  PackedEight<Act> x, y;

  template <typename Gain>
  __device__ void Load(const NormArguments<Act, Gain>& arguments, int row, int column) {
    const int count = arguments.size - column;
    x.Clear();
    if (count <= 0) return;
    x.template Load<kAligned>(arguments.x[row] + column, count);
    if (arguments.y.present()) y.template Load<kAligned>(arguments.y[row] + column, count);
  }

  // x += y, where it comes from too; returns the sum of squares.
  template <typename Gain>
  __device__ float Add(const NormArguments<Act, Gain>& arguments, int row, int column) {
    const int count = arguments.size - column;
    if (arguments.y.present() && count > 0) {
      float sums[kEight];
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        sums[i] = x[i] + y[i];
        StoreFloat(sums[i], &x.elements[i]);
      }
      StoreEight<kAligned>(sums, count, arguments.x[row] + column);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEight; ++i) squares += x[i] * x[i];
    return squares;
  }

  // All lanes of a warp.
  template <typename Gain>
  __device__ void Finish(const NormArguments<Act, Gain>& arguments, int row, int column,
                         float factor, const float (&gain)[kEight]) const {
    const int count = arguments.size - column;
    float normed[kEight] = {};
    if (count > 0) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) normed[i] = RoundedTo<Act>(x[i] * factor * gain[i]);
      if (arguments.normed.present()) {
        StoreEight<kAligned>(normed, count, arguments.normed[row] + column);
      }
    }
    if (arguments.quantized.values.present()) {
      arguments.quantized.template Store<Act, kAligned>(normed, row, column, count);
    }
  }
};

template <typename Act, typename Gain>
__device__ float FactorOfRow(const NormArguments<Act, Gain>& arguments, float sum) {
  return 1.0f / sqrtf(sum / static_cast<float>(arguments.size) + arguments.eps);
}

// A block to a row, eight elements to a thread. The weight is there before the kernel before has
// ended.
template <typename Act, typename Gain, bool kAligned>
__global__ __launch_bounds__(kMostThreads) void FewRowsKernel(
    const NormArguments<Act, Gain> arguments, const PrefetchList prefetch) {
  __shared__ float warp_sums[kWarp];
  LetDependentsLaunch();
  const int row = blockIdx.x;
  if (row >= arguments.num_rows) {
    Prefetch(prefetch, row - arguments.num_rows);
    WaitForPredecessors();
    return;
  }
  const int column = threadIdx.x * kEight;
  float gain[kEight];
  if (column < arguments.size) {
    LoadEight<kAligned>(arguments.gain + column, arguments.size - column, gain);
  }
  WaitForPredecessors();
  Piece<Act, kAligned> piece;
  piece.Load(arguments, row, column);
  const float sum = BlockSum(piece.Add(arguments, row, column), warp_sums);
  piece.Finish(arguments, row, column, FactorOfRow(arguments, sum), gain);
}

// A block takes every gridDim-th row, and has the next one on its way while it works on one.
template <typename Act, typename Gain, bool kAligned, int kPieces>
__global__ __launch_bounds__(kManyThreads, kPieces == 2 ? 2 : 1) void ManyRowsKernel(
    const NormArguments<Act, Gain> arguments) {
  __shared__ float warp_sums[2][kWarp];
  LetDependentsLaunch();
  const int stride = blockDim.x * kEight, first = threadIdx.x * kEight;
  WaitForPredecessors();
  Piece<Act, kAligned> next[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) next[p].Load(arguments, blockIdx.x, first + p * stride);
  int turn = 0;
  for (int row = blockIdx.x; row < arguments.num_rows; row += gridDim.x, turn ^= 1) {
    Piece<Act, kAligned> pieces[kPieces];
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      pieces[p] = next[p];
      sum += pieces[p].Add(arguments, row, first + p * stride);
    }
    const int next_row = row + static_cast<int>(gridDim.x);
    if (next_row < arguments.num_rows) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) next[p].Load(arguments, next_row, first + p * stride);
    }
    const float factor = FactorOfRow(arguments, BlockSum(sum, warp_sums[turn]));
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int column = first + p * stride;
      float gain[kEight];
      if (column < arguments.size) {
        LoadEight<kAligned>(arguments.gain + column, arguments.size - column, gain);
      }
      pieces[p].Finish(arguments, row, column, factor, gain);
    }
  }
}

template <typename Act, typename Gain, bool kAligned>
void Launch(const NormArguments<Act, Gain>& arguments, const PrefetchList& prefetch,
            int num_multiprocessors, cudaStream_t stream) {
  const auto threads_for = [&](int pieces) {
    const int64_t warps = DivideUp(arguments.size, int64_t{kEight} * kWarp * pieces);
    return dim3(static_cast<unsigned>(warps * kWarp));
  };
  if (arguments.size <= kMostThreads * kEight && arguments.num_rows <= num_multiprocessors) {
    LaunchDependent(FewRowsKernel<Act, Gain, kAligned>,
                    {dim3(arguments.num_rows + prefetch.blocks()), threads_for(1)}, stream,
                    arguments, prefetch);
    return;
  }
  const dim3 blocks(std::min(arguments.num_rows, 2 * num_multiprocessors));
  if (arguments.size <= 2 * kManyThreads * kEight) {
    LaunchDependent(ManyRowsKernel<Act, Gain, kAligned, 2>, {blocks, threads_for(2)}, stream,
                    arguments);
  } else {
    CHECK_LE(arguments.size, 8 * kManyThreads * kEight);
    LaunchDependent(ManyRowsKernel<Act, Gain, kAligned, 8>, {blocks, threads_for(8)}, stream,
                    arguments);
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
        cuda::Launch<Act, Gain, decltype(is_aligned)::value>(arguments, prefetch,
                                                             device_.multiProcessorCount, stream_);
      });
    });
  });
}

}  // namespace fathom
