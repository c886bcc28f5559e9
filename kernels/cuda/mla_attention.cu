// Attention over the latent cache: queries are rotated and taken into the latent space, they gather
// there, and what they gather is taken out of it. Each of these steps rounds to act.
//
// The kernel of this file takes any shape and type, with a running softmax. A block takes eight
// heads of one token, a warp each, and walks the token's positions in tiles of 32, one position to
// a lane: scores, the largest so far, then the sums. What Hopper and the shape of DeepSeek-V3 have
// kernels for goes to those.

#include <algorithm>
#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/linear_generic.h"
#include "kernels/cuda/mla_projections.h"
#include "kernels/cuda/mla_step.h"
#include "kernels/cuda/quantize.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = kThreads / kWarp;  // of one block
constexpr int kPositions = kWarp;         // of one tile

// --- queries are rotated

template <typename Act>
__global__ void RotateKernel(Rows<const Act> q, int64_t head_stride, int num_heads, int rope_dim,
                             Rows<const int> positions, const float2* turns, Act* out) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const int64_t token = blockIdx.x;
  const int num_pairs = rope_dim / 2;
  const float2* turn = turns + int64_t{*positions[token]} * num_pairs;
  for (int i = threadIdx.x; i < num_heads * num_pairs; i += kThreads) {
    const Act* pair = q[token] + i / num_pairs * head_stride + i % num_pairs * 2;
    const float2 cos_sin = turn[i % num_pairs];
    const float even = ToFloat(pair[0]);
    const float odd = ToFloat(pair[1]);
    Act* to = out + (token * num_heads * num_pairs + i) * 2;
    StoreFloat(even * cos_sin.x - odd * cos_sin.y, to);
    StoreFloat(even * cos_sin.y + odd * cos_sin.x, to + 1);
  }
}

// --- and gather

struct Arguments {
  const void* q_latent;
  const void* q_rope;
  void* out;
  int first_token;  // that the first rows of q_latent, q_rope and out belong to
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
__device__ void LoadQueries(const Arguments& arguments, int64_t row, int first_head, int num_heads,
                            const Tiles& tiles) {
  const int64_t first = row * arguments.num_heads + first_head;
  const Act* latent = static_cast<const Act*>(arguments.q_latent) + first * arguments.kv_lora_rank;
  const Act* rope = static_cast<const Act*>(arguments.q_rope) + first * arguments.rope_dim;
  for (int i = threadIdx.x; i < num_heads * tiles.width; i += kThreads) {
    const int head = i / tiles.width, column = i % tiles.width;
    tiles.queries[i] =
        ToFloat(column < arguments.kv_lora_rank
                    ? latent[head * arguments.kv_lora_rank + column]
                    : rope[head * arguments.rope_dim + column - arguments.kv_lora_rank]);
  }
}

// Element `column` of a cached token, as floats.
template <typename Stored>
__device__ float CachedElement(const Arguments& arguments, int64_t place, int column) {
  const int rank = arguments.kv_lora_rank, width = rank + arguments.rope_dim;
  if constexpr (sizeof(Stored) > 1) {
    return ToFloat(static_cast<const Stored*>(arguments.cache)[place * width + column]);
  } else {  // codes, factors, key, as StoreLatents wrote them
    const int factors_bytes = (rank + kFp8Block - 1) / kFp8Block * 4;
    const auto* token = static_cast<const char*>(arguments.cache) +
                        place * (rank + factors_bytes + 2 * arguments.rope_dim);
    if (column < rank) {
      float factor;
      memcpy(&factor, token + rank + column / kFp8Block * 4, sizeof factor);
      return ToFloat(reinterpret_cast<const Stored*>(token)[column]) * factor;
    }
    __nv_bfloat16 key;
    memcpy(&key, token + rank + factors_bytes + (column - rank) * 2, sizeof key);
    return ToFloat(key);
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
      value = CachedElement<Stored>(arguments, place, column);
    }
    tiles.kv[i / tiles.width * tiles.kv_stride + column] = value;
  }
}

template <typename Act, typename Stored>
__global__ __launch_bounds__(kThreads) void AttendKernel(const Arguments arguments) {
  extern __shared__ float shared[];
  const Tiles tiles(shared, arguments.kv_lora_rank, arguments.rope_dim);
  const int head_blocks = (arguments.num_heads + kHeads - 1) / kHeads;
  const int row = blockIdx.x / head_blocks;
  const int token = arguments.first_token + row;
  LetDependentsLaunch();
  WaitForPredecessors();
  const int first_head = blockIdx.x % head_blocks * kHeads;
  const int num_heads = min(kHeads, arguments.num_heads - first_head);
  const int sequence = SequenceOf(arguments, token);
  const int context =
      arguments.context_lens[sequence] - (arguments.query_start[sequence + 1] - token) + 1;
  const int* block_table = arguments.block_tables + sequence * arguments.table_stride;
  const int head = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  LoadQueries<Act>(arguments, row, first_head, num_heads, tiles);
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
    Act* out = static_cast<Act*>(arguments.out) +
               (int64_t{row} * arguments.num_heads + first_head + h) * arguments.kv_lora_rank;
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
  LaunchDependent(AttendKernel<Act, Stored>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes}, stream,
                  arguments);
}

}  // namespace
}  // namespace cuda

void CudaOps::MlaAttention(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                           const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                           float scale, const LinearInput& out) {
  constexpr int64_t kMostTokens = 1024;  // at once, for what they are in the latent space
  const AttentionSizes sizes = CheckMlaAttention(q, weights, positions, cos_sin, cache, batch, out);
  if (sizes.tokens == 0 || sizes.heads == 0) return;
  if (AttendSm90(q, weights, positions, cos_sin, cache, batch, scale, out)) return;
  for (int64_t first = 0; first < sizes.tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, sizes.tokens - first);
    const Latents latents = ReserveLatents(sizes, count, q.dtype());
    const auto part = [&](const Tensor& tensor) {
      return tensor.present() ? tensor.Slice(0, first, first + count) : Tensor();
    };
    IntoLatentSpace(part(q), weights, part(positions), cos_sin, latents);
    AttendGeneric(latents, cache, batch, scale, first);
    OutOfLatentSpace(latents, weights, {part(out.values), part(out.scales)});
  }
}

CudaOps::Latents CudaOps::ReserveLatents(const AttentionSizes& sizes, int64_t tokens, DType act) {
  const int64_t rows = tokens * sizes.heads;
  const int64_t latent_bytes = cuda::AlignUp(rows * sizes.kv_lora_rank * SizeOf(act));
  const int64_t rope_bytes = cuda::AlignUp(rows * sizes.rope_dim * SizeOf(act));
  const int64_t value_bytes = cuda::AlignUp(rows * sizes.v_dim * SizeOf(act));
  auto* memory = static_cast<char*>(scratch_.Reserve(2 * latent_bytes + rope_bytes + value_bytes));
  return {.q_latent = Tensor(memory, act, {tokens, sizes.heads, sizes.kv_lora_rank}),
          .latent = Tensor(memory + latent_bytes, act, {tokens, sizes.heads, sizes.kv_lora_rank}),
          .q_rope = Tensor(memory + 2 * latent_bytes, act, {tokens, sizes.heads, sizes.rope_dim}),
          .values = Tensor(memory + 2 * latent_bytes + rope_bytes, act,
                           {tokens, sizes.heads * sizes.v_dim})};
}

void CudaOps::IntoLatentSpace(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                              const Tensor& cos_sin, const Latents& latents) {
  const int64_t nope_dim = weights.w_uk.dim(2), rope_dim = latents.q_rope.dim(2);
  if (cuda::HasProjections(q, weights, cos_sin, rope_dim)) {
    cuda::Absorb(
        cuda::AbsorptionOf(q, weights, positions, cos_sin, latents.q_latent, latents.q_rope),
        stream_);
    return;
  }
  cuda::MultiplyHeads(q.Slice(2, 0, nope_dim), weights.w_uk, latents.q_latent, stream_);
  if (rope_dim == 0) return;
  const Tensor q_rope = q.Slice(2, nope_dim, nope_dim + rope_dim);
  cuda::VisitAct(q.dtype(), [&](auto element) {
    using Act = decltype(element);
    cuda::LaunchDependent(
        cuda::RotateKernel<Act>, {dim3(static_cast<unsigned>(q.dim(0))), dim3(cuda::kThreads)},
        stream_, cuda::Rows<const Act>(q_rope), q_rope.stride(1), static_cast<int>(q.dim(1)),
        static_cast<int>(rope_dim), cuda::Rows<const int>(positions),
        reinterpret_cast<const float2*>(cos_sin.data<float>()),
        static_cast<Act*>(latents.q_rope.raw()));
  });
}

void CudaOps::OutOfLatentSpace(const Latents& latents, const MlaWeights& weights,
                               const LinearInput& out) {
  const Tensor& latent = latents.latent;
  if (latent.dtype() == DType::kBF16 && cuda::HasProjections(weights)) {
    cuda::Project(cuda::ProjectionOf(latent, weights, out), stream_);
    return;
  }
  const Tensor& values = out.quantized() ? latents.values : out.values;
  cuda::MultiplyHeads(latent, weights.w_uv, values.SplitLast(latent.dim(1), weights.w_uv.dim(1)),
                      stream_);
  if (out.quantized()) cuda::QuantizeRows(values, out, stream_);
}

void CudaOps::AttendGeneric(const Latents& latents, const Tensor& cache,
                            const AttentionBatch& batch, float scale, int64_t first) {
  cuda::Arguments arguments = {};
  arguments.q_latent = latents.q_latent.raw();
  arguments.q_rope = latents.q_rope.raw();
  arguments.out = latents.latent.raw();
  arguments.first_token = static_cast<int>(first);
  arguments.num_heads = static_cast<int>(latents.q_latent.dim(1));
  arguments.kv_lora_rank = static_cast<int>(latents.q_latent.dim(2));
  arguments.rope_dim = static_cast<int>(latents.q_rope.dim(2));
  arguments.scale = scale;
  arguments.cache = cache.raw();
  arguments.block_size = batch.block_size;
  arguments.block_tables = batch.block_tables.data<int32_t>();
  arguments.table_stride = batch.block_tables.stride(0);
  arguments.query_start = batch.query_start.data<int32_t>();
  arguments.context_lens = batch.context_lens.data<int32_t>();
  arguments.num_sequences = static_cast<int>(batch.context_lens.dim(0));
  const auto most_shared_bytes = static_cast<int>(device_.sharedMemPerBlockOptin);
  cuda::VisitAct(latents.q_latent.dtype(), [&](auto act) {
    cuda::VisitWeight(cache.dtype(), [&](auto stored) {
      cuda::Launch<decltype(act), decltype(stored)>(arguments, latents.q_latent.dim(0),
                                                    most_shared_bytes, stream_);
    });
  });
}

}  // namespace fathom
