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
constexpr int kAbsorbTokens = 64;                         // of a block
constexpr int kAbsorbTiles = 2;                           // that are under way at once
constexpr int kAbsorbBlocks = kLatentSize / kAbsorbRows;  // to a head
constexpr int kHeadChunks = kHeadSize / 32;

__device__ int TokenOf(const int* tokens, int row) { return tokens == nullptr ? row : tokens[row]; }

// What a thread rotates of the head's queries of every eighth token, the first being `first`: eight
// elements, which are asked for early and stored late.
class Rotation {
 public:
  __device__ Rotation(const Absorption& a, int head, int first, int end)
      : a_(a), head_(head), end_(end) {
    const int lanes = a.rope_dim / kEight;
    column_ = static_cast<int>(threadIdx.x) % lanes * kEight;
    const int slot = static_cast<int>(threadIdx.x) / lanes;
    step_ = kAbsorbThreads / lanes * kAbsorbBlocks;
    row_ = slot < kAbsorbThreads / lanes ? first + slot * kAbsorbBlocks : end;
  }
  __device__ void LoadTurns() {
    if (row_ >= end_) return;
    const int64_t position = a_.positions[TokenOf(a_.tokens, row_) * a_.positions_stride];
    LoadEight<true>(a_.cos_sin + position * a_.rope_dim + column_, kEight, turns_);
  }
  __device__ void LoadQuery() {
    if (row_ >= end_) return;
    const int64_t token = TokenOf(a_.tokens, row_);
    LoadEight<true>(
        a_.q + token * a_.q_token_stride + head_ * a_.q_head_stride + kHeadSize + column_, kEight,
        q_);
  }
  // This token's, and then those that one thread has besides.
  __device__ void Store() {
    while (row_ < end_) {
      RotateEight(turns_, q_);
      StoreEight<true>(q_, kEight,
                       a_.q_rope + (int64_t{row_} * a_.num_heads + head_) * a_.rope_dim + column_);
      row_ += step_;
      LoadTurns();
      LoadQuery();
    }
  }

 private:
  const Absorption& a_;
  const int head_, end_;
  int column_, step_, row_;
  float turns_[kEight], q_[kEight];
};

__global__ __launch_bounds__(kAbsorbThreads, 4) void AbsorbKernel(const Absorption a) {
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
  const int begin = blockIdx.y * kAbsorbTokens;
  const int end = min(begin + kAbsorbTokens, a.num_tokens);
  Rotation rotation(a, head, begin + part, end);
  // Where tokens stand was known before the step began, but not which of them are rows.
  if (a.tokens == nullptr) rotation.LoadTurns();
  WaitForPredecessors();
  // Not before: the next kernel may begin with what was complete before the one before this.
  LetDependentsLaunch();

  if (a.tokens != nullptr) rotation.LoadTurns();
  rotation.LoadQuery();
  for (int first = begin; first < end; first += kAbsorbTiles * kTileTokens) {
    uint4 x[kAbsorbTiles][2][kHeadChunks];
#pragma unroll
    for (int tile = 0; tile < kAbsorbTiles; ++tile) {
      if (first + tile * kTileTokens >= end) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + tile * kTileTokens + half * 8 + group;
        const __nv_bfloat16* q = a.q + TokenOf(a.tokens, min(row, end - 1)) * a.q_token_stride +
                                 head * a.q_head_stride + in_group * 8;
#pragma unroll
        for (int c = 0; c < kHeadChunks; ++c) x[tile][half][c] = LoadPiece(q + c * 32);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kAbsorbTiles; ++tile) {
      if (first + tile * kTileTokens >= end) break;
      float d[2][4] = {};
#pragma unroll
      for (int c = 0; c < kHeadChunks; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) ProductOf32(x[tile][0][c], x[tile][1][c], w[i][c], d[i]);
      }
      const auto store = [&](int row, int at) {
        uint2 four;
        auto* pairs = reinterpret_cast<__nv_bfloat162*>(&four);
        pairs[0] = __floats2bfloat162_rn(d[0][at], d[0][at + 1]);
        pairs[1] = __floats2bfloat162_rn(d[1][at], d[1][at + 1]);
        const int64_t place = (int64_t{row} * a.num_heads + head) * kLatentSize + first_row;
        if (row < end) *reinterpret_cast<uint2*>(a.q_latent + place + in_group * 4) = four;
      };
      store(first + tile * kTileTokens + group, 0);
      store(first + tile * kTileTokens + group + 8, 2);
    }
  }
  rotation.Store();
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

// --- the same of many tokens: a block has a head and some tokens, a warp 16 of the values, whose
// weights it keeps

constexpr int kMostFewTokens = 32;
constexpr int kManyChunks = kLatentSize / 32;
// Bytes between tokens in shared memory: two rows of 64 bytes, which eight lanes read, meet no bank
// twice.
constexpr int kManyStride = kLatentSize * 2 + 64;

template <int kTokens>
__global__ __launch_bounds__(kProjectThreads, 1) void ProjectManyKernel(const ValueProjection p) {
  constexpr int kTiles = kTokens / kTileTokens;
  __shared__ alignas(16) unsigned char x_rows[kTokens * kManyStride];
  __shared__ alignas(16) unsigned char codes[kTokens][kHeadSize];
  __shared__ float largest[kProjectWarps][kTokens];
  LetDependentsLaunch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4, head = blockIdx.x;
  uint4 w[2][kManyChunks];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = head * kHeadSize + warp * 16 + i * 8 + group;
    const __nv_bfloat16* from = p.w_uv + int64_t{row} * kLatentSize + in_group * 8;
#pragma unroll
    for (int c = 0; c < kManyChunks; ++c) w[i][c] = LoadPiece(from + c * 32);
  }
  const int first = blockIdx.y * kTokens, count = min(kTokens, p.num_tokens - first);
  WaitForPredecessors();
  constexpr int kPieces = kLatentSize * 2 / 16;  // of a token
#pragma unroll
  for (int i = 0; i < kTokens * kPieces / kProjectThreads; ++i) {
    const int at = threadIdx.x + i * kProjectThreads, token = at / kPieces, piece = at % kPieces;
    const int64_t row = int64_t{first + min(token, count - 1)} * p.num_heads + head;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(
                     __cvta_generic_to_shared(x_rows + token * kManyStride + piece * 16))),
                 "l"(p.latent + row * kLatentSize + piece * kEight)
                 : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  float d[kTiles][2][4] = {};
#pragma unroll
  for (int c = 0; c < kManyChunks; ++c) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const unsigned char* at =
          x_rows + (tile * kTileTokens + group) * kManyStride + c * 64 + in_group * 16;
      const uint4 low = *reinterpret_cast<const uint4*>(at);
      const uint4 high = *reinterpret_cast<const uint4*>(at + 8 * kManyStride);
#pragma unroll
      for (int i = 0; i < 2; ++i) ProductOf32(low, high, w[i][c], d[tile][i]);
    }
  }
  // Of d[tile][i], [0] and [1] belong to one token, [2] and [3] to the eighth behind it.
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float of_token = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = d[tile][i / 2][half * 2 + i % 2];
        value = RoundedTo<__nv_bfloat16>(value);
        of_token = fmaxf(of_token, fabsf(value));
      }
      of_token = WarpMax<4>(of_token);
      if (in_group == 0) largest[warp][tile * kTileTokens + half * 8 + group] = of_token;
    }
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = tile * kTileTokens + half * 8 + group;
      float of_token = 0.0f;
#pragma unroll
      for (int wi = 0; wi < kProjectWarps; ++wi) of_token = fmaxf(of_token, largest[wi][token]);
      const float factor = FactorOf(of_token);
      const bool exists = token < count;
      const int64_t place = exists ? TokenOf(p.tokens, first + token) : 0;
      if (p.scales != nullptr && exists && warp == 0 && in_group == 0) {
        p.scales[place * p.scales_stride + head] = factor;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int value = warp * 16 + i * 8 + in_group * 2;
        const float2 pair = make_float2(d[tile][i][half * 2], d[tile][i][half * 2 + 1]);
        if (p.scales == nullptr) {
          auto* to = static_cast<__nv_bfloat16*>(p.out) + place * p.out_stride + head * kHeadSize;
          if (exists) {
            *reinterpret_cast<__nv_bfloat162*>(to + value) = __floats2bfloat162_rn(pair.x, pair.y);
          }
        } else {
          *reinterpret_cast<__nv_fp8x2_storage_t*>(&codes[token][value]) = __nv_cvt_float2_to_fp8x2(
              make_float2(pair.x / factor, pair.y / factor), __NV_SATFINITE, __NV_E4M3);
        }
      }
    }
  }
  if (p.scales == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < count * (kHeadSize / 16); i += kProjectThreads) {
    const int token = i / (kHeadSize / 16), piece = i % (kHeadSize / 16);
    const int64_t place = TokenOf(p.tokens, first + token);
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + place * p.out_stride +
                              head * kHeadSize + piece * 16) =
        *reinterpret_cast<const uint4*>(&codes[token][piece * 16]);
  }
}

template <int kTokens>
void ProjectMany(const ValueProjection& projection, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(projection.num_heads),
                    static_cast<unsigned>(DivideUp(projection.num_tokens, kTokens)));
  LaunchDependent(ProjectManyKernel<kTokens>, {blocks, dim3(kProjectThreads)}, stream, projection);
}

// Whether its rows can be written 16 bytes at a time.
bool HasAlignedOutput(const ValueProjection& projection) {
  const int64_t bytes = projection.scales == nullptr ? 2 : 1;
  return reinterpret_cast<uintptr_t>(projection.out) % 16 == 0 &&
         projection.out_stride * bytes % 16 == 0;
}

}  // namespace

void Absorb(const Absorption& absorption, cudaStream_t stream) {
  if (absorption.num_tokens == 0) return;
  CHECK(absorption.rope_dim % kEight == 0 && absorption.rope_dim <= kAbsorbThreads * kEight);
  const dim3 blocks(static_cast<unsigned>(absorption.num_heads * kAbsorbBlocks),
                    static_cast<unsigned>(DivideUp(absorption.num_tokens, kAbsorbTokens)));
  LaunchDependent(AbsorbKernel, {blocks, dim3(kAbsorbThreads)}, stream, absorption);
}

void Project(const ValueProjection& projection, cudaStream_t stream) {
  if (projection.num_tokens == 0) return;
  if (projection.num_tokens > kMostFewTokens && HasAlignedOutput(projection)) {
    return projection.num_tokens <= 128 ? ProjectMany<16>(projection, stream)
                                        : ProjectMany<32>(projection, stream);
  }
  const dim3 blocks(static_cast<unsigned>(projection.num_heads * kProjectCluster),
                    static_cast<unsigned>(DivideUp(projection.num_tokens, kBlockTokens)));
  constexpr int kSharedBytes = kProjectWarps * kBlockTokens * kSumStride * sizeof(float);
  CUDA_CHECK(cudaFuncSetAttribute(ProjectKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes));
  LaunchDependent(ProjectKernel, {blocks, dim3(kProjectThreads), kSharedBytes, kProjectCluster},
                  stream, projection);
}

}  // namespace fathom::cuda
