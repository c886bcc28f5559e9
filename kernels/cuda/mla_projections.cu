#include "kernels/cuda/mla_projections.h"

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/mma.cuh"

namespace fathom::cuda {
namespace {

constexpr int kTileTokens = 16;  // of a matrix product
constexpr int kBlockTokens = 64;

__device__ uint4 LoadPiece(const __nv_bfloat16* from) {
  return *reinterpret_cast<const uint4*>(from);
}

// --- into the latent space: a block has 64 rows of a head's w_uk, a warp 16 of them

constexpr int kAbsorbThreads = 128;
constexpr int kAbsorbRows = 64;
constexpr int kAbsorbBlocks = kLatentSize / kAbsorbRows;  // to a head
constexpr int kHeadChunks = kHeadSize / 32;

__device__ int TokenOf(const int* tokens, int row) { return tokens == nullptr ? row : tokens[row]; }

// Rotates the head's queries of every eighth token, the first being `first`.
__device__ void RotateQueries(const Absorption& a, int head, int first, int end) {
  const int lanes = a.rope_dim / kEight;
  const int at_once = kAbsorbThreads / lanes;
  const int column = static_cast<int>(threadIdx.x) % lanes * kEight;
  const int slot = static_cast<int>(threadIdx.x) / lanes;
  if (slot >= at_once) return;
  for (int row = first + slot * kAbsorbBlocks; row < end; row += at_once * kAbsorbBlocks) {
    const int64_t token = TokenOf(a.tokens, row);
    float q[kEight], turns[kEight];
    LoadEight<true>(a.q + token * a.q_token_stride + head * a.q_head_stride + kHeadSize + column,
                    kEight, q);
    const int64_t position = a.positions[token * a.positions_stride];
    LoadEight<true>(a.cos_sin + position * a.rope_dim + column, kEight, turns);
    RotateEight(turns, q);
    StoreEight<true>(q, kEight,
                     a.q_rope + (int64_t{row} * a.num_heads + head) * a.rope_dim + column);
  }
}

__global__ __launch_bounds__(kAbsorbThreads) void AbsorbKernel(const Absorption a,
                                                               const PrefetchList prefetch) {
  const int prefetcher = static_cast<int>(blockIdx.x) - a.num_heads * kAbsorbBlocks;
  if (prefetcher >= 0) {
    if (blockIdx.y == 0) Prefetch(prefetch, prefetcher);
    WaitForPredecessors();
    LetDependentsLaunch();
    return;
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int head = blockIdx.x / kAbsorbBlocks, part = blockIdx.x % kAbsorbBlocks;
  const int first_row = part * kAbsorbRows + warp * 16;
  uint4 w[2][kHeadChunks];
  // The two products of a warp take rows so that a thread's four outputs lie beside each other.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row_of_group = first_row + group / 2 * 4 + i * 2 + group % 2;
    const __nv_bfloat16* row = a.w_uk + (int64_t{head} * kLatentSize + row_of_group) * kHeadSize;
#pragma unroll
    for (int c = 0; c < kHeadChunks; ++c) w[i][c] = LoadPiece(row + c * 32 + in_group * 8);
  }
  const int begin = blockIdx.y * kBlockTokens;
  const int end = min(begin + kBlockTokens, a.num_tokens);
  WaitForPredecessors();
  // Not before: the next kernel may begin with what was complete before the one before this.
  LetDependentsLaunch();

  for (int first = begin; first < end; first += kTileTokens) {
    const int low = first + group, high = low + 8;
    const __nv_bfloat16* q = a.q + head * a.q_head_stride + in_group * 8;
    const __nv_bfloat16* q_low = q + TokenOf(a.tokens, min(low, end - 1)) * a.q_token_stride;
    const __nv_bfloat16* q_high = q + TokenOf(a.tokens, min(high, end - 1)) * a.q_token_stride;
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < kHeadChunks; ++c) {
      const uint4 x_low = LoadPiece(q_low + c * 32), x_high = LoadPiece(q_high + c * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) ProductOf32(x_low, x_high, w[i][c], d[i]);
    }
    const auto store = [&](int row, int at) {
      uint2 four;
      auto* pairs = reinterpret_cast<__nv_bfloat162*>(&four);
      pairs[0] = __floats2bfloat162_rn(d[0][at], d[0][at + 1]);
      pairs[1] = __floats2bfloat162_rn(d[1][at], d[1][at + 1]);
      const int64_t place = (int64_t{row} * a.num_heads + head) * kLatentSize + first_row;
      if (row < end) *reinterpret_cast<uint2*>(a.q_latent + place + in_group * 4) = four;
    };
    store(low, 0);
    store(high, 2);
  }
  RotateQueries(a, head, begin + part, end);
}

// --- out of it: a cluster has a head, a block 16 of its values, a warp an eighth of the inputs

constexpr int kProjectThreads = 256;
constexpr int kProjectWarps = kProjectThreads / kWarp;
constexpr int kProjectCluster = 8;
constexpr int kProjectValues = kHeadSize / kProjectCluster;  // 16
constexpr int kProjectChunks = kLatentSize / kProjectWarps / 32;
constexpr int kSumStride = 24;  // floats between tokens: a warp's stores meet no bank twice
static_assert(kProjectThreads == kTileTokens * kProjectValues);

__device__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Stores at the same address of shared memory, but in another block of the cluster.
__device__ void StoreInBlock(float* to, int block, float value) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// sums[warp][token][value] of `count` tokens from `first`.
__device__ void MultiplyTokens(const ValueProjection& p, const uint4 (&w)[2][kProjectChunks],
                               int head, int first, int count, float* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int input = warp * (kLatentSize / kProjectWarps) + in_group * 8;
#pragma unroll 2
  for (int tile = 0; tile < count; tile += kTileTokens) {
    const int64_t stride = int64_t{p.num_heads} * kLatentSize;
    const __nv_bfloat16* x = p.latent + int64_t{head} * kLatentSize + input;
    const __nv_bfloat16* x_low = x + (first + min(tile + group, count - 1)) * stride;
    const __nv_bfloat16* x_high = x + (first + min(tile + group + 8, count - 1)) * stride;
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < kProjectChunks; ++c) {
      const uint4 low = LoadPiece(x_low + c * 32), high = LoadPiece(x_high + c * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) ProductOf32(low, high, w[i][c], d[i]);
    }
    float* to = sums + (warp * kBlockTokens + tile + group) * kSumStride + in_group * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float2*>(to + i * 8) = make_float2(d[i][0], d[i][1]);
      *reinterpret_cast<float2*>(to + 8 * kSumStride + i * 8) = make_float2(d[i][2], d[i][3]);
    }
  }
}

__global__ __launch_bounds__(kProjectThreads, 4) void ProjectKernel(const ValueProjection p) {
  extern __shared__ float sums[];
  __shared__ float largest[kProjectCluster][kBlockTokens];  // of each block of the cluster
  LetDependentsLaunch();
  ClusterArrive();  // this block is there
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head = blockIdx.x / kProjectCluster, part = blockIdx.x % kProjectCluster;
  uint4 w[2][kProjectChunks];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = int64_t{head} * kHeadSize + part * kProjectValues + i * 8 + lane / 4;
    const __nv_bfloat16* from =
        p.w_uv + row * kLatentSize + warp * (kLatentSize / kProjectWarps) + lane % 4 * 8;
#pragma unroll
    for (int c = 0; c < kProjectChunks; ++c) w[i][c] = LoadPiece(from + c * 32);
  }
  const int first = blockIdx.y * kBlockTokens;
  const int count = min(kBlockTokens, p.num_tokens - first);
  WaitForPredecessors();
  MultiplyTokens(p, w, head, first, count, sums);
  __syncthreads();
  ClusterWait();

  // A thread has one value of every sixteenth token.
  constexpr int kTiles = kBlockTokens / kTileTokens;
  const int value = threadIdx.x % kProjectValues;
  float values[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = i * kTileTokens + static_cast<int>(threadIdx.x) / kProjectValues;
    if (i * kTileTokens >= count) break;
    float sum = 0.0f;
#pragma unroll
    for (int wi = 0; wi < kProjectWarps; ++wi) {
      sum += sums[(wi * kBlockTokens + token) * kSumStride + value];
    }
    values[i] = RoundedTo<__nv_bfloat16>(sum);
    const float of_token = WarpMax<kProjectValues>(fabsf(values[i]));
    if (value < kProjectCluster) StoreInBlock(&largest[part][token], value, of_token);
  }
  const int column = head * kHeadSize + part * kProjectValues + value;
  ClusterArrive();
  ClusterWait();
  if (p.scales == nullptr) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = i * kTileTokens + static_cast<int>(threadIdx.x) / kProjectValues;
      if (token >= count) break;
      static_cast<__nv_bfloat16*>(p.out)[TokenOf(p.tokens, first + token) * p.out_stride + column] =
          __float2bfloat16(values[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = i * kTileTokens + static_cast<int>(threadIdx.x) / kProjectValues;
    if (i * kTileTokens >= count) break;
    const float factor =
        FactorOf(WarpMax<kProjectCluster>(largest[value % kProjectCluster][token]));
    if (token >= count) continue;
    const int64_t place = TokenOf(p.tokens, first + token);
    static_cast<uint8_t*>(p.out)[place * p.out_stride + column] =
        __nv_cvt_float_to_fp8(values[i] / factor, __NV_SATFINITE, __NV_E4M3);
    if (part == 0 && value == 0) p.scales[place * p.scales_stride + head] = factor;
  }
}

}  // namespace

void Absorb(const Absorption& absorption, const PrefetchList& prefetch, cudaStream_t stream) {
  if (absorption.num_tokens == 0) return;
  CHECK(absorption.rope_dim % kEight == 0 && absorption.rope_dim <= kAbsorbThreads * kEight);
  const dim3 blocks(static_cast<unsigned>(absorption.num_heads * kAbsorbBlocks + prefetch.blocks()),
                    static_cast<unsigned>(DivideUp(absorption.num_tokens, kBlockTokens)));
  LaunchDependent(AbsorbKernel, {blocks, dim3(kAbsorbThreads)}, stream, absorption, prefetch);
}

void Project(const ValueProjection& projection, cudaStream_t stream) {
  if (projection.num_tokens == 0) return;
  const dim3 blocks(static_cast<unsigned>(projection.num_heads * kProjectCluster),
                    static_cast<unsigned>(DivideUp(projection.num_tokens, kBlockTokens)));
  constexpr int kSharedBytes = kProjectWarps * kBlockTokens * kSumStride * sizeof(float);
  CUDA_CHECK(cudaFuncSetAttribute(ProjectKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes));
  LaunchDependent(ProjectKernel, {blocks, dim3(kProjectThreads), kSharedBytes, kProjectCluster},
                  stream, projection);
}

}  // namespace fathom::cuda
