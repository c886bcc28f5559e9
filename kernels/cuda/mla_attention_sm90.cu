// Which tokens of a step Hopper's two kernels for attention take, and how they are called.
//
// Sequences that have few tokens in the step, if they stand in front of all others, are attended to
// in the latent space, a row per token; the rest on keys and values computed from the latents.

#include <algorithm>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/dependent_launch.cuh"

namespace fathom {
namespace {

using Decode = MlaDecodeSm90;
using Prefill = MlaPrefillSm90;

// From so many tokens on keys and values are worth computing.
constexpr int kFewTokens = 16;

// Row r is token r; it sees what is before it in its sequence.
__global__ void DescribeRowsKernel(const int* query_start, const int* context_lens,
                                   int num_sequences, int* row_context_lens, int* row_sequences) {
  cuda::LetDependentsLaunch();
  cuda::WaitForPredecessors();
  const int sequence = blockIdx.x * blockDim.x + threadIdx.x;
  if (sequence >= num_sequences) return;
  const int end = query_start[sequence + 1];
  for (int row = query_start[sequence]; row < end; ++row) {
    row_context_lens[row] = context_lens[sequence] - (end - 1 - row);
    row_sequences[row] = sequence;
  }
}

Prefill::Limits PrefillLimits(const StepLimits& limits) {
  const int64_t sequences = std::min<int64_t>(limits.max_sequences, Prefill::kMaxSequences);
  return {.max_tokens = static_cast<int>(limits.max_tokens),
          .max_context_tokens = sequences * limits.max_model_len};
}

int64_t RowsBytes() { return cuda::AlignUp(2 * Decode::kMaxRows * int64_t{sizeof(int)}); }

}  // namespace

bool CudaOps::HasAttentionSm90(const StepLimits& limits) const {
  return Decode::Supports(device_) && Prefill::Supports(device_) && limits.act == DType::kBF16 &&
         limits.kv_cache_dtype == DType::kBF16 && limits.heads == Decode::kHeads &&
         limits.kv_lora_rank == Decode::kKvLoraRank &&
         limits.qk_rope_head_dim == Decode::kRopeHeadDim &&
         limits.qk_nope_head_dim == Prefill::kHeadDim && limits.v_head_dim == Prefill::kHeadDim &&
         limits.block_size % Decode::kBlockSizeUnit == 0 &&
         limits.max_sequences <= Prefill::kMaxSequences;
}

int64_t CudaOps::AttentionSm90Bytes(const StepLimits& limits) const {
  if (!HasAttentionSm90(limits)) return 0;
  return cuda::AlignUp(Decode::WorkspaceBytes(static_cast<int>(limits.num_layers),
                                              device_.multiProcessorCount)) +
         RowsBytes() + Prefill::WorkspaceBytes(PrefillLimits(limits)) + kPrefillAlignment;
}

void CudaOps::UseAttentionSm90(const StepLimits& limits, void* memory) {
  decode_.reset();
  prefill_.reset();
  if (!HasAttentionSm90(limits)) return;
  const int multiprocessors = device_.multiProcessorCount;
  const auto layers = static_cast<int>(limits.num_layers);
  char* next = static_cast<char*>(memory);
  decode_.emplace(next, layers, multiprocessors);
  decode_layers_ = layers;
  next += cuda::AlignUp(Decode::WorkspaceBytes(layers, multiprocessors));
  row_context_lens_ = reinterpret_cast<int*>(next);
  row_sequences_ = row_context_lens_ + Decode::kMaxRows;
  next += RowsBytes();
  const auto address = reinterpret_cast<uintptr_t>(next);
  next += (kPrefillAlignment - address % kPrefillAlignment) % kPrefillAlignment;
  prefill_.emplace(next, PrefillLimits(limits), multiprocessors);
}

void CudaOps::PlanAttentionSm90(const AttentionBatch& batch) {
  attention_plan_ = {};
  const auto sequences = static_cast<int>(batch.context_lens.dim(0));
  if (!decode_.has_value() || sequences == 0) return;
  CHECK(batch.host_query_start != nullptr && batch.host_context_lens != nullptr);
  const int32_t* starts = batch.host_query_start;
  AttentionPlan& plan = attention_plan_;
  while (plan.num_decodes < sequences &&
         starts[plan.num_decodes + 1] - starts[plan.num_decodes] < kFewTokens &&
         starts[plan.num_decodes + 1] <= Decode::kMaxRows) {
    ++plan.num_decodes;
  }
  plan.first_prefill_token = starts[plan.num_decodes];
  const auto* query_start = batch.query_start.data<int32_t>();
  const auto* context_lens = batch.context_lens.data<int32_t>();
  if (plan.num_decodes > 0) {
    Decode::Rows rows = {.count = plan.first_prefill_token, .context_lens = context_lens};
    if (rows.count > plan.num_decodes) {
      constexpr int kThreads = 128;
      cuda::LaunchDependent(
          DescribeRowsKernel,
          {dim3(static_cast<unsigned>((plan.num_decodes + kThreads - 1) / kThreads)),
           dim3(kThreads)},
          stream_, query_start, context_lens, plan.num_decodes, row_context_lens_, row_sequences_);
      rows.context_lens = row_context_lens_;
      rows.sequences = row_sequences_;
    }
    decode_->Schedule(rows, stream_);
  }
  if (plan.num_decodes < sequences) {
    plan.prefill =
        prefill_->Schedule({.num_sequences = sequences - plan.num_decodes,
                            .query_start = query_start + plan.num_decodes,
                            .context_lens = context_lens + plan.num_decodes,
                            .host_query_start = starts + plan.num_decodes,
                            .host_context_lens = batch.host_context_lens + plan.num_decodes},
                           stream_);
  }
}

bool CudaOps::PrefillSm90(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                          const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                          float scale, const LinearInput& out) {
  const AttentionPlan& plan = attention_plan_;
  if (plan.prefill.num_pieces == 0) return false;
  CHECK(q.dense() && weights.w_uk.dense() && weights.w_uv.dense() && cache.dense());
  CHECK(out.values.dense() && positions.stride(0) == 1);
  Prefill::Layer layer = {.q = static_cast<const __nv_bfloat16*>(q.raw()),
                          .w_uk = static_cast<const __nv_bfloat16*>(weights.w_uk.raw()),
                          .w_uv = static_cast<const __nv_bfloat16*>(weights.w_uv.raw()),
                          .positions = positions.data<int32_t>(),
                          .cos_sin = cos_sin.data<float>(),
                          .block_tables = batch.block_tables.data<int32_t>() +
                                          plan.num_decodes * batch.block_tables.stride(0),
                          .max_blocks = static_cast<int>(batch.block_tables.stride(0)),
                          .scale = scale};
  if (out.quantized()) {
    CHECK(out.scales.dense());
    layer.out_fp8 = out.values.raw();
    layer.out_scales = out.scales.data<float>();
  } else {
    layer.out = static_cast<__nv_bfloat16*>(out.values.raw());
  }
  prefill_->Run(plan.prefill,
                {.data = cache.raw(),
                 .type = Prefill::CacheType::kBf16,
                 .num_blocks = cache.dim(0),
                 .block_size = batch.block_size},
                layer, stream_);
  return true;
}

bool CudaOps::DecodeSm90(const Latents& latents, const Tensor& cache, const AttentionBatch& batch,
                         float scale) {
  const Tensor& q = latents.q_latent;
  if (attention_plan_.num_decodes == 0 || layer_ >= decode_layers_) return false;
  CHECK_EQ(q.dim(0), int64_t{attention_plan_.first_prefill_token});
  decode_->Run(Decode::MapCache(cache.raw(), cache.dim(0), batch.block_size),
               {.index = layer_,
                .num_rows = attention_plan_.first_prefill_token,
                .q_latent = static_cast<const __nv_bfloat16*>(q.raw()),
                .q_rope = static_cast<const __nv_bfloat16*>(latents.q_rope.raw()),
                .block_tables = batch.block_tables.data<int32_t>(),
                .max_blocks = static_cast<int>(batch.block_tables.stride(0)),
                .scale = scale,
                .out = static_cast<__nv_bfloat16*>(latents.latent.raw())},
               stream_);
  return true;
}

}  // namespace fathom
