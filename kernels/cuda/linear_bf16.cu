#include "kernels/cuda/linear_bf16.h"

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/mma.cuh"

namespace fathom::cuda {
namespace {

constexpr int kBlockOutputs = 128;
constexpr int kWarpOutputs = 32;
constexpr int kStepInputs = 64;  // rows of 128 bytes in shared memory
constexpr int kRowBytes = kStepInputs * sizeof(__nv_bfloat16);
constexpr int kRowPieces = kRowBytes / 16;

// What depends on the number of tokens of a block.
template <int kBlockTokens>
struct Sizes {
  static constexpr int kWarpTokens = std::min(kBlockTokens, 64);
  // Each half of a step's inputs has warps of its own, where fewer could not keep the tensor cores
  // busy; their sums meet at the end.
  static constexpr int kHalves = kBlockTokens == 32 || kBlockTokens == 64 ? 2 : 1;
  static constexpr int kHalfThreads =
      kWarp * (kBlockOutputs / kWarpOutputs) * (kBlockTokens / kWarpTokens);
  static constexpr int kThreads = kHalves * kHalfThreads;
  static constexpr int kStages = kBlockTokens >= 64 ? 4 : 6;
  static constexpr int kStageRows = kBlockOutputs + kBlockTokens;
  static constexpr int kSharedBytes = kStages * kStageRows * kRowBytes;
};

struct Arguments {
  Rows<const __nv_bfloat16> x;
  const __nv_bfloat16* weight;
  int tokens, outputs, inputs;
  int part_inputs;  // of a block, a multiple of kStepInputs
  void* out;
  int64_t out_stride, out_part_stride;
};

// Where 16-byte piece `piece` of a row stands: odd rows have their halves exchanged, so that the
// pieces that eight lanes read at once, four of each of two rows, lie in different banks.
__device__ uint32_t OffsetOf(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + (piece ^ ((row & 1) << 2)) * 16);
}

__device__ void CopyAsync(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ uint4 LoadShared(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from));
  return value;
}

// Rows [first, first + kRows) of a matrix, inputs [input, input + 64); zeros where there is none.
template <int kRows, int kThreads>
__device__ void CopyRows(const __nv_bfloat16* matrix, int64_t stride, int first, int num_rows,
                         int input, int end_input, uint32_t to) {
#pragma unroll
  for (int i = 0; i < DivideUp(kRows * kRowPieces, kThreads); ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = piece / kRowPieces, column = input + piece % kRowPieces * kEight;
    if (kRows * kRowPieces % kThreads != 0 && row >= kRows) break;
    const bool exists = first + row < num_rows && column < end_input;
    const __nv_bfloat16* from = matrix;
    if (exists) from += (first + row) * stride + column;
    CopyAsync(to + OffsetOf(row, piece % kRowPieces), from, exists);
  }
}

// The first half's threads get the sums of both.
template <int kThreads, int kTiles>
__device__ void AddHalves(float (*sums)[4], int thread, int half, float4* shared) {
  __syncthreads();  // the stages have been read
  if (half == 1) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      shared[i * kThreads + thread] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    }
  }
  __syncthreads();
  if (half == 1) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float4 other = shared[i * kThreads + thread];
    sums[i][0] += other.x;
    sums[i][1] += other.y;
    sums[i][2] += other.z;
    sums[i][3] += other.w;
  }
}

template <int kBlockTokens, typename Out>
__global__ __launch_bounds__(Sizes<kBlockTokens>::kThreads) void ProductKernel(
    const Arguments arguments) {
  using S = Sizes<kBlockTokens>;
  constexpr int kOutputTiles = kWarpOutputs / 16, kTokenTiles = S::kWarpTokens / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  LetDependentsLaunch();
  const int first_output = blockIdx.x * kBlockOutputs, first_token = blockIdx.y * kBlockTokens;
  const int begin = blockIdx.z * arguments.part_inputs;
  const int end = min(begin + arguments.part_inputs, arguments.inputs);
  const int steps = (end - begin + kStepInputs - 1) / kStepInputs;
  const auto stage_at = [&](int step) {
    return base + step % S::kStages * (S::kStageRows * kRowBytes);
  };
  const auto copy_weight = [&](int step) {
    if (step < steps) {
      CopyRows<kBlockOutputs, S::kThreads>(arguments.weight, arguments.inputs, first_output,
                                           arguments.outputs, begin + step * kStepInputs, end,
                                           stage_at(step));
    }
  };
  const auto copy_x = [&](int step) {
    if (step < steps) {
      CopyRows<kBlockTokens, S::kThreads>(arguments.x.data, arguments.x.stride, first_token,
                                          arguments.tokens, begin + step * kStepInputs, end,
                                          stage_at(step) + kBlockOutputs * kRowBytes);
    }
    CommitCopies();
  };
  for (int step = 0; step < S::kStages - 1; ++step) copy_weight(step);
  WaitForPredecessors();
  for (int step = 0; step < S::kStages - 1; ++step) copy_x(step);

  const int thread = threadIdx.x % S::kHalfThreads, my_half = threadIdx.x / S::kHalfThreads;
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int warp_output = warp % (kBlockOutputs / kWarpOutputs) * kWarpOutputs;
  const int warp_token = warp / (kBlockOutputs / kWarpOutputs) * S::kWarpTokens;
  float sums[kOutputTiles][kTokenTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    WaitForCopies<S::kStages - 2>();
    __syncthreads();  // also: everybody has read the stage that is filled next
    copy_weight(step + S::kStages - 1);
    copy_x(step + S::kStages - 1);
    const uint32_t w_stage = stage_at(step), x_stage = w_stage + kBlockOutputs * kRowBytes;
#pragma unroll
    for (int i_half = 0; i_half < kRowPieces / 4 / S::kHalves; ++i_half) {
      const int piece = (my_half + i_half) * 4 + in_group;
      uint4 w[kOutputTiles][2];
#pragma unroll
      for (int i = 0; i < kOutputTiles; ++i) {
        const int row = warp_output + i * 16 + group;
        w[i][0] = LoadShared(w_stage + OffsetOf(row, piece));
        w[i][1] = LoadShared(w_stage + OffsetOf(row + 8, piece));
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const uint4 x = LoadShared(x_stage + OffsetOf(warp_token + j * 8 + group, piece));
#pragma unroll
        for (int i = 0; i < kOutputTiles; ++i) ProductOf32(w[i][0], w[i][1], x, sums[i][j]);
      }
    }
  }
  WaitForCopies<0>();
  if constexpr (S::kHalves == 2) {
    AddHalves<S::kHalfThreads, kOutputTiles * kTokenTiles>(
        reinterpret_cast<float(*)[4]>(sums), thread, my_half, reinterpret_cast<float4*>(shared));
    if (my_half == 1) return;
  }

  Out* out = static_cast<Out*>(arguments.out) + blockIdx.z * arguments.out_part_stride;
#pragma unroll
  for (int i = 0; i < kOutputTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int output = first_output + warp_output + i * 16 + group + k / 2 * 8;
        const int token = first_token + warp_token + j * 8 + in_group * 2 + k % 2;
        if (output < arguments.outputs && token < arguments.tokens) {
          StoreFloat(sums[i][j][k], out + token * arguments.out_stride + output);
        }
      }
    }
  }
}

template <int kBlockTokens, typename Out>
void LaunchSized(const Arguments& arguments, int num_parts, cudaStream_t stream) {
  using S = Sizes<kBlockTokens>;
  const auto kernel = ProductKernel<kBlockTokens, Out>;
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  const dim3 blocks(static_cast<unsigned>(DivideUp(arguments.outputs, kBlockOutputs)),
                    static_cast<unsigned>(DivideUp(arguments.tokens, kBlockTokens)),
                    static_cast<unsigned>(num_parts));
  LaunchDependent(kernel, {blocks, dim3(S::kThreads), S::kSharedBytes}, stream, arguments);
}

int BlockTokensFor(int64_t tokens) {
  for (const int size : {8, 16, 32, 64}) {
    if (tokens <= size) return size;
  }
  return 128;
}

template <typename Out>
void Launch(const Arguments& arguments, int num_parts, cudaStream_t stream) {
  switch (BlockTokensFor(arguments.tokens)) {
    case 8:
      return LaunchSized<8, Out>(arguments, num_parts, stream);
    case 16:
      return LaunchSized<16, Out>(arguments, num_parts, stream);
    case 32:
      return LaunchSized<32, Out>(arguments, num_parts, stream);
    case 64:
      return LaunchSized<64, Out>(arguments, num_parts, stream);
    default:
      return LaunchSized<128, Out>(arguments, num_parts, stream);
  }
}

Arguments ArgumentsFor(const Bf16Product& product) {
  Arguments arguments = {};
  arguments.x = Rows<const __nv_bfloat16>(product.x);
  arguments.weight = static_cast<const __nv_bfloat16*>(product.weight.raw());
  arguments.tokens = static_cast<int>(product.x.dim(0));
  arguments.outputs = static_cast<int>(product.weight.dim(0));
  arguments.inputs = static_cast<int>(product.weight.dim(1));
  arguments.part_inputs = static_cast<int>(DivideUp(arguments.inputs, kStepInputs) * kStepInputs);
  arguments.out = product.out.raw();
  arguments.out_stride = product.out.stride(0);
  return arguments;
}

}  // namespace

bool FitsBf16Product(const Bf16Product& product) {
  return product.x.dtype() == DType::kBF16 && product.weight.dtype() == DType::kBF16 &&
         AreAlignedForEight(product.x, product.weight);
}

void MultiplyBf16(const Bf16Product& product, cudaStream_t stream) {
  const Arguments arguments = ArgumentsFor(product);
  VisitAct(product.out.dtype(), [&](auto out) { Launch<decltype(out)>(arguments, 1, stream); });
}

int NumParts(const Bf16Product& product, int num_multiprocessors) {
  constexpr int64_t kFewestInputs = 256;
  const int64_t tokens = product.x.dim(0);
  const int64_t blocks =
      DivideUp(product.weight.dim(0), kBlockOutputs) * DivideUp(tokens, BlockTokensFor(tokens));
  const int64_t most = std::max<int64_t>(1, product.weight.dim(1) / kFewestInputs);
  return static_cast<int>(std::clamp<int64_t>(num_multiprocessors / blocks, 1, most));
}

void MultiplyBf16InParts(const Bf16Product& product, int num_parts, float* parts,
                         cudaStream_t stream) {
  Arguments arguments = ArgumentsFor(product);
  arguments.part_inputs =
      static_cast<int>(DivideUp(arguments.inputs, int64_t{kStepInputs} * num_parts) * kStepInputs);
  arguments.out = parts;
  arguments.out_stride = arguments.outputs;
  arguments.out_part_stride = int64_t{arguments.tokens} * arguments.outputs;
  Launch<float>(arguments, num_parts, stream);
}

}  // namespace fathom::cuda
