#include "kernels/cuda/router_sm90.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/sm90.cuh"
#include "kernels/cuda/sm90_bf16.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace router {
namespace {

using sm90::BarrierWait;
using sm90::SharedAddress;
using sm90::TileDescriptor;

constexpr int kTokens = 64;  // of a block
constexpr int kExperts = 256;
constexpr int kInputs = 64;  // of a stage
constexpr int kStages = 5;
constexpr int kPair = 2;
constexpr int kConsumers = 128;  // one warpgroup
constexpr int kThreads = kConsumers + 32;
constexpr int kRowBytes = sm90::kSwizzledRowBytes;
constexpr int kGateBytes = kExperts * kRowBytes, kXBytes = kTokens * kRowBytes;
constexpr int kFewestInputs = 256;  // of a part

struct SharedMemory {
  alignas(sm90::kTileAlignment) unsigned char gate[kStages][kGateBytes];
  alignas(sm90::kTileAlignment) unsigned char x[kStages][kXBytes];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = sizeof(SharedMemory) + sm90::kTileAlignment;

struct Arguments {
  int tokens, steps;  // of 64 inputs
  int part_steps;
  float* parts;
};

__device__ void CopyStages(const CUtensorMap& gate_map, const CUtensorMap& x_map, int token,
                           int begin, int end, SharedMemory& shared) {
  const int rank = sm90::ClusterRank();
  const uint64_t gate_policy = sm90::EvictLastPolicy(), x_policy = sm90::EvictNormalPolicy();
  const auto copy_gate = [&](int step, int stage) {
    sm90::CopyBoxToCluster(shared.gate[stage] + rank * (kGateBytes / kPair), &gate_map,
                           step * kInputs, rank * (kExperts / kPair), &shared.full[stage], 3,
                           gate_policy);
  };
  // The gate may be read before the kernels before this one have ended.
  const int ahead = min(kStages, end - begin);
  for (int i = 0; i < ahead; ++i) copy_gate(begin + i, i);
  sm90::WaitForPredecessors();
  for (int i = 0; i < end - begin; ++i) {
    const int stage = i % kStages;
    BarrierWait(&shared.empty[stage], (i / kStages & 1) ^ 1);
    sm90::BarrierExpectBytes(&shared.full[stage], kGateBytes + kXBytes);
    if (i >= ahead) copy_gate(begin + i, stage);
    sm90::CopyBox(shared.x[stage], &x_map, (begin + i) * kInputs, token, &shared.full[stage],
                  x_policy);
  }
}

__device__ void Multiply(const Arguments& arguments, int token, int steps, SharedMemory& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kExperts / 2];
  const auto free = [&](int stage) {
    sm90::BarrierArriveInCluster(&shared.empty[stage], lane % kPair, lane < kPair);
  };
  for (int i = 0; i < steps; ++i) {
    const int stage = i % kStages;
    const uint32_t x = SharedAddress(shared.x[stage]);
    const uint32_t gate = SharedAddress(shared.gate[stage]);
    BarrierWait(&shared.full[stage], i / kStages & 1);
    sm90::ProductsBegin();
#pragma unroll
    for (int k = 0; k < kInputs / 16; ++k) {
      sm90::ProductBf16N256(sums, TileDescriptor(x + k * 32), TileDescriptor(gate + k * 32),
                            (i | k) != 0);
    }
    sm90::ProductsCommit();
    sm90::ProductsWait<1>();
    if (i > 0) free((i - 1) % kStages);
  }
  sm90::ProductsWait<0>();
  free((steps - 1) % kStages);

  const int first = token + warp * 16 + lane / 4;
  float* to =
      arguments.parts + (int64_t{blockIdx.y} * arguments.tokens + first) * kExperts + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + half * 8 >= arguments.tokens) break;
#pragma unroll
    for (int j = 0; j < kExperts / 8; ++j) {
      *reinterpret_cast<float2*>(to + half * 8 * kExperts + j * 8) =
          make_float2(sums[4 * j + half * 2], sums[4 * j + half * 2 + 1]);
    }
  }
}

__global__ __launch_bounds__(kThreads,
                             1) void RouterKernel(const __grid_constant__ CUtensorMap gate_map,
                                                  const __grid_constant__ CUtensorMap x_map,
                                                  const Arguments arguments) {
  extern __shared__ unsigned char dynamic_shared[];
  auto& shared = sm90::AtFirstTile<SharedMemory>(dynamic_shared);
  if (threadIdx.x == kConsumers) {
    sm90::PrefetchMap(&gate_map);
    sm90::PrefetchMap(&x_map);
    for (int i = 0; i < kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], 1);
      sm90::BarrierInit(&shared.empty[i], kConsumers / 32 * kPair);
    }
    sm90::BarrierInitFence();
  }
  sm90::LetDependentsLaunch();
  sm90::ClusterSync();
  const int token = blockIdx.x * kTokens;
  const int begin = blockIdx.y * arguments.part_steps;
  const int end = min(begin + arguments.part_steps, arguments.steps);
  if (threadIdx.x < kConsumers) {
    sm90::WaitForPredecessors();
    Multiply(arguments, token, end - begin, shared);
  } else if (threadIdx.x == kConsumers) {
    CopyStages(gate_map, x_map, token, begin, end, shared);
  }
  __syncwarp();
  sm90::ClusterSync();  // the other block may still copy into this one's memory
}

CUtensorMap Map(const Tensor& rows, int box_rows) {
  return sm90::MapMatrix({.data = rows.raw(),
                          .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          .element_bytes = 2,
                          .rows = rows.dim(0),
                          .columns = rows.dim(1),
                          .row_stride = rows.stride(0),
                          .box_rows = box_rows,
                          .box_columns = kInputs});
}

int NumPairs(int64_t tokens) {
  return static_cast<int>((tokens + kTokens * kPair - 1) / (kTokens * kPair));
}

}  // namespace
}  // namespace router

bool RouterSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0;
}

bool RouterSm90::Supports(const cuda::Bf16Product& product) {
  return cuda::FitsBf16Product(product) && product.weight.dim(0) == router::kExperts &&
         product.weight.dim(1) % router::kInputs == 0;
}

int RouterSm90::NumParts(const cuda::Bf16Product& product, int num_multiprocessors) {
  const int64_t most = std::max<int64_t>(1, product.weight.dim(1) / router::kFewestInputs);
  const int pairs = router::NumPairs(product.x.dim(0));
  const auto wanted =
      static_cast<int>(std::clamp<int64_t>(num_multiprocessors / router::kPair / pairs, 1, most));
  // No part may be empty.
  const auto steps = static_cast<int>(product.weight.dim(1) / router::kInputs);
  const int part_steps = (steps + wanted - 1) / wanted;
  return (steps + part_steps - 1) / part_steps;
}

void RouterSm90::Multiply(const cuda::Bf16Product& product, int num_parts, float* parts,
                          cudaStream_t stream) {
  CHECK(Supports(product));
  const auto steps = static_cast<int>(product.weight.dim(1) / router::kInputs);
  const router::Arguments arguments = {.tokens = static_cast<int>(product.x.dim(0)),
                                       .steps = steps,
                                       .part_steps = (steps + num_parts - 1) / num_parts,
                                       .parts = parts};
  CUDA_CHECK(cudaFuncSetAttribute(router::RouterKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  router::kSharedBytes));
  const auto blocks = static_cast<unsigned>(router::NumPairs(product.x.dim(0)) * router::kPair);
  cuda::LaunchDependent(router::RouterKernel,
                        {dim3(blocks, static_cast<unsigned>(num_parts)), dim3(router::kThreads),
                         router::kSharedBytes, router::kPair},
                        stream, router::Map(product.weight, router::kExperts / router::kPair),
                        router::Map(product.x, router::kTokens), arguments);
}

}  // namespace fathom
