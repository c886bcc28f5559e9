// Attention over the latent cache with a running softmax.
//
// A block takes eight heads of one token, a warp each, and walks the token's positions in tiles of
// 32, one position to a lane: scores, the largest so far, then the sums. Decoding in the shape of
// DeepSeek-V3 on Hopper goes to MlaDecodeSm90 instead.

#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/mla_decode_sm90.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = kThreads / kWarp;  // of one block
constexpr int kPositions = kWarp;         // of one tile

struct Arguments {
  const void* q_latent;
  const void* q_rope;
  void* out;
  int64_t q_latent_strides[2], q_rope_strides[2], out_strides[2];  // elements: token, head
  int num_heads, kv_lora_rank, rope_dim;
  float scale;

  const void* cache;
  int block_size;
  const int* block_tables;
  int64_t table_stride;
  const int* query_start;
  const int* context_lens;
  int num_sequences;
};

// Tiles in shared memory, floats. Rows of kv are an odd number of them apart, so that the lanes of
// a warp, each at a row of its own, read different banks.
struct Tiles {
  __host__ __device__ Tiles(float* base, int kv_lora_rank, int rope_dim)
      : width(kv_lora_rank + rope_dim),
        kv_stride(width | 1),
        kv(base),
        queries(kv + kPositions * kv_stride),
        gathered(queries + kHeads * width),
        shares(gathered + kHeads * kv_lora_rank),
        per_head(shares + kHeads * kPositions),
        end(per_head + kHeads) {}

  int width, kv_stride;
  float* kv;        // [positions][kv_stride]
  float* queries;   // [heads][width]
  float* gathered;  // [heads][kv_lora_rank]
  float* shares;    // [heads][positions]
  float* per_head;  // [heads]
  float* end;
};

// The sequence that a token belongs to.
__device__ int SequenceOf(const Arguments& arguments, int token) {
  int low = 0, high = arguments.num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (arguments.query_start[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename Act>
__device__ void LoadQueries(const Arguments& arguments, int token, int first_head, int num_heads,
                            const Tiles& tiles) {
  const Act* latent = static_cast<const Act*>(arguments.q_latent) +
                      token * arguments.q_latent_strides[0] +
                      first_head * arguments.q_latent_strides[1];
  const Act* rope = static_cast<const Act*>(arguments.q_rope) +
                    token * arguments.q_rope_strides[0] + first_head * arguments.q_rope_strides[1];
  for (int i = threadIdx.x; i < num_heads * tiles.width; i += kThreads) {
    const int head = i / tiles.width, column = i % tiles.width;
    tiles.queries[i] =
        ToFloat(column < arguments.kv_lora_rank
                    ? latent[head * arguments.q_latent_strides[1] + column]
                    : rope[head * arguments.q_rope_strides[1] + column - arguments.kv_lora_rank]);
  }
}

// Positions from `context` on become zero: zero times whatever stands there might be NaN.
template <typename Stored>
__device__ void LoadTile(const Arguments& arguments, const int* block_table, int first, int context,
                         const Tiles& tiles) {
  for (int i = threadIdx.x; i < kPositions * tiles.width; i += kThreads) {
    const int position = first + i / tiles.width, column = i % tiles.width;
    float value = 0.0f;
    if (position < context) {
      const int64_t place =
          int64_t{block_table[position / arguments.block_size]} * arguments.block_size +
          position % arguments.block_size;
      value = ToFloat(static_cast<const Stored*>(arguments.cache)[place * tiles.width + column]);
    }
    tiles.kv[i / tiles.width * tiles.kv_stride + column] = value;
  }
}

template <typename Act, typename Stored>
__global__ __launch_bounds__(kThreads) void AttendKernel(const Arguments arguments) {
  extern __shared__ float shared[];
  const Tiles tiles(shared, arguments.kv_lora_rank, arguments.rope_dim);
  const int head_blocks = (arguments.num_heads + kHeads - 1) / kHeads;
  const int token = blockIdx.x / head_blocks;
  const int first_head = blockIdx.x % head_blocks * kHeads;
  const int num_heads = min(kHeads, arguments.num_heads - first_head);
  const int sequence = SequenceOf(arguments, token);
  const int context =
      arguments.context_lens[sequence] - (arguments.query_start[sequence + 1] - token) + 1;
  const int* block_table = arguments.block_tables + sequence * arguments.table_stride;
  const int head = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  LoadQueries<Act>(arguments, token, first_head, num_heads, tiles);
  for (int i = threadIdx.x; i < kHeads * arguments.kv_lora_rank; i += kThreads) {
    tiles.gathered[i] = 0.0f;
  }
  float largest = -INFINITY, total = 0.0f;
  for (int first = 0; first < context; first += kPositions) {
    LoadTile<Stored>(arguments, block_table, first, context, tiles);
    __syncthreads();
    if (head < num_heads) {
      float score = 0.0f;
      for (int i = 0; i < tiles.width; ++i) {
        score += tiles.queries[head * tiles.width + i] * tiles.kv[lane * tiles.kv_stride + i];
      }
      score = first + lane < context ? score * arguments.scale : -INFINITY;
      const float now = fmaxf(largest, WarpMax(score));
      const float share = expf(score - now);
      const float shrink = expf(largest - now);
      largest = now;
      total = total * shrink + WarpSum(share);
      tiles.shares[head * kPositions + lane] = share;
      if (lane == 0) tiles.per_head[head] = shrink;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < arguments.kv_lora_rank; column += kThreads) {
      float sums[kHeads] = {};
      for (int p = 0; p < kPositions; ++p) {
        const float value = tiles.kv[p * tiles.kv_stride + column];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) sums[h] += tiles.shares[h * kPositions + p] * value;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float* gathered = &tiles.gathered[h * arguments.kv_lora_rank + column];
        *gathered = *gathered * tiles.per_head[h] + sums[h];
      }
    }
    __syncthreads();
  }
  if (head < num_heads && lane == 0) tiles.per_head[head] = total;
  __syncthreads();
  for (int i = threadIdx.x; i < num_heads * arguments.kv_lora_rank; i += kThreads) {
    const int h = i / arguments.kv_lora_rank, column = i % arguments.kv_lora_rank;
    Act* out = static_cast<Act*>(arguments.out) + token * arguments.out_strides[0] +
               (first_head + h) * arguments.out_strides[1];
    StoreFloat(tiles.gathered[i] / tiles.per_head[h], out + column);
  }
}

template <typename Act, typename Stored>
void Launch(const Arguments& arguments, int64_t num_tokens, int most_shared_bytes,
            cudaStream_t stream) {
  const Tiles tiles(nullptr, arguments.kv_lora_rank, arguments.rope_dim);
  const auto shared_bytes = static_cast<int>(reinterpret_cast<uintptr_t>(tiles.end));
  CHECK_LE(shared_bytes, most_shared_bytes) << "kv_lora_rank " << arguments.kv_lora_rank;
  CUDA_CHECK(cudaFuncSetAttribute(AttendKernel<Act, Stored>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int64_t blocks = num_tokens * ((arguments.num_heads + kHeads - 1) / kHeads);
  AttendKernel<Act, Stored>
      <<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(arguments);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace cuda

void CudaOps::MlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                           const AttentionBatch& batch, float scale, const Tensor& out) {
  const AttentionSizes sizes = CheckMlaAttention(q_latent, q_rope, cache, batch, out);
  if (sizes.tokens == 0 || sizes.heads == 0) return;
  if (IsHopperDecode(q_latent, q_rope, cache, batch, out)) {
    HopperDecode(q_latent, q_rope, cache, batch, scale, out);
    return;
  }
  cuda::Arguments arguments = {};
  arguments.q_latent = q_latent.raw();
  arguments.q_rope = q_rope.raw();
  arguments.out = out.raw();
  for (int i = 0; i < 2; ++i) {
    arguments.q_latent_strides[i] = q_latent.stride(i);
    arguments.q_rope_strides[i] = q_rope.stride(i);
    arguments.out_strides[i] = out.stride(i);
  }
  arguments.num_heads = static_cast<int>(sizes.heads);
  arguments.kv_lora_rank = static_cast<int>(sizes.kv_lora_rank);
  arguments.rope_dim = static_cast<int>(sizes.rope_dim);
  arguments.scale = scale;
  arguments.cache = cache.raw();
  arguments.block_size = batch.block_size;
  arguments.block_tables = batch.block_tables.data<int32_t>();
  arguments.table_stride = batch.block_tables.stride(0);
  arguments.query_start = batch.query_start.data<int32_t>();
  arguments.context_lens = batch.context_lens.data<int32_t>();
  arguments.num_sequences = static_cast<int>(sizes.sequences);
  const auto most_shared_bytes = static_cast<int>(device_.sharedMemPerBlockOptin);
  cuda::VisitAct(q_latent.dtype(), [&](auto act) {
    cuda::VisitAct(cache.dtype(), [&](auto stored) {
      cuda::Launch<decltype(act), decltype(stored)>(arguments, sizes.tokens, most_shared_bytes,
                                                    stream_);
    });
  });
}

bool CudaOps::IsHopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                             const AttentionBatch& batch, const Tensor& out) const {
  using Decode = MlaDecodeSm90;
  constexpr int64_t kAligned = 8;  // elements: 16 bytes
  const bool is_v3 = q_latent.dim(1) == Decode::kHeads && q_latent.dim(2) == Decode::kKvLoraRank &&
                     q_rope.dim(2) == Decode::kRopeHeadDim &&
                     batch.block_size % Decode::kBlockSizeUnit == 0;
  const bool is_bf16 = q_latent.dtype() == DType::kBF16 && cache.dtype() == DType::kBF16;
  // Every sequence has a token, so as many tokens as sequences are one each.
  const int64_t sequences = batch.context_lens.dim(0);
  const bool is_decode = q_latent.dim(0) == sequences && sequences <= Decode::kMaxRows;
  return is_v3 && is_bf16 && is_decode && Decode::Supports(device_) && q_latent.dense() &&
         out.dense() && q_rope.stride(0) % kAligned == 0 && q_rope.stride(1) % kAligned == 0 &&
         reinterpret_cast<uintptr_t>(q_rope.raw()) % 16 == 0;
}

void CudaOps::HopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                           const AttentionBatch& batch, float scale, const Tensor& out) {
  // An operation knows nothing of the layer it belongs to: it divides the work anew and shares
  // counters with nobody, for what follows on the stream waits until it is complete.
  const int num_multiprocessors = device_.multiProcessorCount;
  const MlaDecodeSm90 decode(
      decode_memory_.Reserve(MlaDecodeSm90::WorkspaceBytes(1, num_multiprocessors)), 1,
      num_multiprocessors);
  const auto* context_lens = batch.context_lens.data<int32_t>();
  const auto num_rows = static_cast<int>(batch.context_lens.dim(0));
  decode.Schedule({.count = num_rows, .context_lens = context_lens}, stream_);
  decode.Run(MlaDecodeSm90::MapCache(cache.raw(), cache.dim(0), batch.block_size),
             {.num_rows = num_rows,
              .q_latent = static_cast<const __nv_bfloat16*>(q_latent.raw()),
              .q_rope = static_cast<const __nv_bfloat16*>(q_rope.raw()),
              .q_rope_token_stride = q_rope.stride(0),
              .q_rope_head_stride = q_rope.stride(1),
              .block_tables = batch.block_tables.data<int32_t>(),
              .max_blocks = static_cast<int>(batch.block_tables.stride(0)),
              .scale = scale,
              .out = static_cast<__nv_bfloat16*>(out.raw())},
             stream_);
}

}  // namespace fathom
