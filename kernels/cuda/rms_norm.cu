// The residual sum, the norm and what the next layers read, in one pass over the row.
//
// Few rows: a block takes a row, a thread eight neighbouring elements of it (a few times eight
// where there are some rows, or long ones), which it keeps in registers between the sum and the
// norm. Many rows: a stream; on Hopper and later the copy engine brings the rows of a
// multiprocessor's four teams, each the next one as soon as the last is in registers.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
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

// kBlocks rows are under way on a multiprocessor at once. If they are few, the weight is in
// registers before the kernel before has ended; otherwise registers are spared.
template <typename Act, typename Gain, bool kAligned, int kPieces, int kBlocks>
__global__ __launch_bounds__(
    kPieces == 1 ? kMostThreads : kMostThreads / 2,
    kBlocks) void AddRmsNormKernel(const NormArguments<Act, Gain> arguments) {
  constexpr bool kEarlyGain = kPieces <= 2 && kBlocks <= 2;
  LetDependentsLaunch();
  const int row = blockIdx.x;
  const int stride = blockDim.x * kEight, first = threadIdx.x * kEight, size = arguments.size;
  float gain[kEarlyGain ? kPieces : 1][kEight];
  if constexpr (kEarlyGain) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int column = first + p * stride;
      if (column < size) LoadEight<kAligned>(arguments.gain + column, size - column, gain[p]);
    }
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
      float(&g)[kEight] = gain[kEarlyGain ? p : 0];
      if constexpr (!kEarlyGain) LoadEight<kAligned>(arguments.gain + column, count, g);
#pragma unroll
      for (int i = 0; i < kEight; ++i) normed[i] = RoundedTo<Act>(values[p][i] * factor * g[i]);
      if (arguments.normed.present()) {
        StoreEight<kAligned>(normed, count, arguments.normed[row] + column);
      }
    }
    if (arguments.quantized.values.present()) {
      arguments.quantized.template Store<Act, kAligned>(normed, row, column, count);
    }
  }
}

// --- many rows

constexpr int kTeams = 4;
constexpr int kTeamThreads = 256;
constexpr int kTeamPieces = 4;  // of eight elements, of a thread
constexpr int kLongestStreamed = kTeamThreads * kTeamPieces * kEight;
constexpr int kFewestStreamed = 512;

// In shared memory: the weight, and x and y of a row per team.
constexpr int StreamBytes(int size) {
  return size * static_cast<int>(sizeof(float)) + kTeams * 2 * size * 2;
}

__device__ void CopyRow(uint32_t to, const void* from, int num_bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(num_bytes), "r"(barrier)
      : "memory");
}
__device__ void WaitForRow(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE%=;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void SyncTeam(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kTeamThreads) : "memory");
}

// Rows of bf16, a multiple of eight elements, 16-byte aligned.
template <typename Gain>
__global__ __launch_bounds__(kTeams* kTeamThreads, 1) void StreamRmsNormKernel(
    const NormArguments<__nv_bfloat16, Gain> arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ alignas(8) uint64_t barriers[kTeams];
  __shared__ float warp_sums[kTeams][2][kTeamThreads / kWarp];
  LetDependentsLaunch();
  const int size = arguments.size, row_bytes = size * 2;
  const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads;
  auto* gain = reinterpret_cast<float*>(shared);
  auto* x_row = reinterpret_cast<__nv_bfloat16*>(gain + size) + team * 2 * size;
  const auto* y_row = x_row + size;
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&barriers[team]));
  const bool has_y = arguments.y.present();
  const auto copy = [&](int row) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(has_y ? 2 * row_bytes : row_bytes)
                 : "memory");
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(x_row));
    CopyRow(to, arguments.x[row], row_bytes, barrier);
    if (has_y) CopyRow(to + row_bytes, arguments.y[row], row_bytes, barrier);
  };
  int row = blockIdx.x * kTeams + team;
  const int stride = gridDim.x * kTeams;
  if (thread == 0) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
            barrier)
        : "memory");
    WaitForPredecessors();
    if (row < arguments.num_rows) copy(row);
  }
  for (int i = threadIdx.x; i < size; i += kTeams * kTeamThreads)
    gain[i] = ToFloat(arguments.gain[i]);
  WaitForPredecessors();
  __syncthreads();

  for (int round = 0; row < arguments.num_rows; row += stride, ++round) {
    PackedEight<__nv_bfloat16> values[kTeamPieces];
    float sum = 0.0f;
    WaitForRow(barrier, round & 1);
#pragma unroll
    for (int p = 0; p < kTeamPieces; ++p) {
      const int column = (thread + p * kTeamThreads) * kEight;
      values[p].Clear();
      if (column >= size) continue;
      values[p].template Load<true>(x_row + column, kEight);
      if (has_y) {
        PackedEight<__nv_bfloat16> y;
        y.template Load<true>(y_row + column, kEight);
        float added[kEight];
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          added[i] = values[p][i] + y[i];
          StoreFloat(added[i], &values[p].elements[i]);
        }
        StoreEight<true>(added, kEight, arguments.x[row] + column);
      }
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum += values[p][i] * values[p][i];
    }
    sum = WarpSum(sum);
    float* sums = warp_sums[team][round & 1];
    if (thread % kWarp == 0) sums[thread / kWarp] = sum;
    SyncTeam(team);  // the row is in registers, too
    if (thread == 0 && row + stride < arguments.num_rows) copy(row + stride);
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kTeamThreads / kWarp; ++w) sum += sums[w];
    const float factor = 1.0f / sqrtf(sum / static_cast<float>(size) + arguments.eps);
#pragma unroll
    for (int p = 0; p < kTeamPieces; ++p) {
      const int column = (thread + p * kTeamThreads) * kEight, count = size - column;
      float normed[kEight] = {};
      if (count > 0) {
        LoadEight<true>(gain + column, kEight, normed);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          normed[i] = RoundedTo<__nv_bfloat16>(values[p][i] * factor * normed[i]);
        }
        if (arguments.normed.present()) {
          StoreEight<true>(normed, kEight, arguments.normed[row] + column);
        }
      }
      if (arguments.quantized.values.present()) {
        arguments.quantized.template Store<__nv_bfloat16, true>(normed, row, column, count);
      }
    }
  }
}

struct Multiprocessors {
  int count;
  bool have_copy_engine;
};

// False where rows are not what it takes.
template <typename Act, typename Gain, bool kAligned>
bool LaunchStream(const NormArguments<Act, Gain>& arguments, const Multiprocessors& multiprocessors,
                  cudaStream_t stream) {
  if constexpr (kAligned && std::is_same_v<Act, __nv_bfloat16>) {
    if (!multiprocessors.have_copy_engine || arguments.num_rows < kFewestStreamed ||
        arguments.size > kLongestStreamed) {
      return false;
    }
    const auto kernel = StreamRmsNormKernel<Gain>;
    const int shared_bytes = StreamBytes(arguments.size);
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    const int64_t blocks =
        std::min<int64_t>(multiprocessors.count, DivideUp(arguments.num_rows, kTeams));
    LaunchDependent(kernel, {dim3(blocks), dim3(kTeams * kTeamThreads), shared_bytes}, stream,
                    arguments);
    return true;
  }
  return false;
}

template <typename Act, typename Gain, bool kAligned>
void Launch(const NormArguments<Act, Gain>& arguments, const Multiprocessors& multiprocessors,
            cudaStream_t stream) {
  const auto launch = [&](auto kernel, int pieces) {
    const auto threads =
        static_cast<unsigned>(DivideUp(arguments.size, int64_t{kEight} * kWarp * pieces) * kWarp);
    LaunchDependent(kernel, {dim3(arguments.num_rows), dim3(threads)}, stream, arguments);
  };
  constexpr int kFew = kMostThreads * kEight, kMany = kMostThreads / 2 * kEight;
  if (arguments.size <= kFew && arguments.num_rows <= multiprocessors.count) {
    launch(AddRmsNormKernel<Act, Gain, kAligned, 1, 1>, 1);
  } else if (arguments.size <= 2 * kMany && arguments.num_rows <= 2 * multiprocessors.count) {
    launch(AddRmsNormKernel<Act, Gain, kAligned, 2, 2>, 2);
  } else if (arguments.size <= 2 * kMany) {
    launch(AddRmsNormKernel<Act, Gain, kAligned, 2, 3>, 2);
  } else {
    CHECK_LE(arguments.size, 8 * kMany);
    launch(AddRmsNormKernel<Act, Gain, kAligned, 8, 1>, 8);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                         const Tensor& normed, const LinearInput& quantized) {
  CheckAddRmsNorm(x, y, weight, normed, quantized);
  if (x.dim(0) == 0) return;
  const bool aligned = cuda::AreAlignedForEight(x, y, weight, normed, quantized.values);
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
        constexpr bool kAligned = decltype(is_aligned)::value;
        const cuda::Multiprocessors multiprocessors = {device_.multiProcessorCount,
                                                       device_.major >= 9};
        if (cuda::LaunchStream<Act, Gain, kAligned>(arguments, multiprocessors, stream_)) return;
        cuda::Launch<Act, Gain, kAligned>(arguments, multiprocessors, stream_);
      });
    });
  });
}

}  // namespace fathom
