#include "kernels/cuda/mla_step.h"

#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"

namespace fathom {
namespace cuda {
namespace {

constexpr int kMaxRows = MlaDecodeSm90::kMaxRows;
constexpr int64_t kRowBytes = int64_t{3} * kMaxRows * sizeof(int);
constexpr int64_t kPrefillAlignment = 1024;

// numbers[0], [1], [2]: context lengths, sequences and tokens of the sequences of one token, in
// order. One warp.
__global__ void FindRowsKernel(const int* query_start, const int* context_lens, int num_sequences,
                               int* numbers) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const int lane = threadIdx.x;
  int count = 0;
  for (int first = 0; first < num_sequences; first += kWarp) {
    const int s = first + lane;
    const bool is_row = s < num_sequences && query_start[s + 1] - query_start[s] == 1;
    const unsigned lanes = __ballot_sync(kAllLanes, is_row);
    const int row = count + __popc(lanes & ((1u << lane) - 1));
    if (is_row && row < kMaxRows) {
      numbers[row] = context_lens[s];
      numbers[kMaxRows + row] = s;
      numbers[2 * kMaxRows + row] = query_start[s];
    }
    count += __popc(lanes);
  }
}

MlaPrefillSm90::Layer PrefillLayerOf(const Tensor& q, const MlaWeights& weights,
                                     const Tensor& positions, const Tensor& cos_sin,
                                     const AttentionBatch& batch, float scale,
                                     const LinearInput& out) {
  MlaPrefillSm90::Layer layer = {.q = static_cast<const __nv_bfloat16*>(q.raw()),
                                 .w_uk = static_cast<const __nv_bfloat16*>(weights.w_uk.raw()),
                                 .w_uv = static_cast<const __nv_bfloat16*>(weights.w_uv.raw()),
                                 .positions = positions.data<int32_t>(),
                                 .cos_sin = cos_sin.data<float>(),
                                 .block_tables = batch.block_tables.data<int32_t>(),
                                 .max_blocks = static_cast<int>(batch.block_tables.stride(0)),
                                 .scale = scale};
  if (out.quantized()) {
    layer.out_fp8 = out.values.raw();
    layer.out_scales = out.scales.data<float>();
  } else {
    layer.out = static_cast<__nv_bfloat16*>(out.values.raw());
  }
  return layer;
}

int64_t TotalContext(const AttentionBatch& batch) {
  int64_t total = 0;
  for (int64_t s = 0; s < batch.context_lens.dim(0); ++s) {
    total += DivideUp(batch.host_context_lens[s], 128) * 128;
  }
  return total;
}

bool Supports(const cudaDeviceProp& device) {
  return MlaDecodeSm90::Supports(device) && MlaPrefillSm90::Supports(device);
}

}  // namespace

bool HasProjections(const MlaWeights& weights) {
  return weights.w_uk.dtype() == DType::kBF16 && weights.w_uv.dtype() == DType::kBF16 &&
         weights.w_uk.dim(1) == kLatentSize && weights.w_uk.dim(2) == kHeadSize &&
         weights.w_uv.dim(1) == kHeadSize && AreAlignedForEight(weights.w_uk, weights.w_uv);
}

bool HasProjections(const Tensor& q, const MlaWeights& weights, const Tensor& cos_sin,
                    int64_t rope_dim) {
  constexpr int64_t kMostRope = 1024;
  return HasProjections(weights) && q.dtype() == DType::kBF16 && IsAlignedForEight(q) &&
         rope_dim % kEight == 0 && rope_dim > 0 && rope_dim <= kMostRope &&
         reinterpret_cast<uintptr_t>(cos_sin.raw()) % 16 == 0;
}

Absorption AbsorptionOf(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                        const Tensor& cos_sin, const Tensor& q_latent, const Tensor& q_rope) {
  return {.q = static_cast<const __nv_bfloat16*>(q.raw()),
          .q_token_stride = q.stride(0),
          .q_head_stride = q.stride(1),
          .w_uk = static_cast<const __nv_bfloat16*>(weights.w_uk.raw()),
          .positions = positions.data<int32_t>(),
          .positions_stride = positions.stride(0),
          .cos_sin = cos_sin.data<float>(),
          .num_tokens = static_cast<int>(q_latent.dim(0)),
          .num_heads = static_cast<int>(q.dim(1)),
          .rope_dim = static_cast<int>(q_rope.dim(2)),
          .q_latent = static_cast<__nv_bfloat16*>(q_latent.raw()),
          .q_rope = static_cast<__nv_bfloat16*>(q_rope.raw())};
}

ValueProjection ProjectionOf(const Tensor& latent, const MlaWeights& weights,
                             const LinearInput& out) {
  return {.latent = static_cast<const __nv_bfloat16*>(latent.raw()),
          .w_uv = static_cast<const __nv_bfloat16*>(weights.w_uv.raw()),
          .num_tokens = static_cast<int>(latent.dim(0)),
          .num_heads = static_cast<int>(latent.dim(1)),
          .out = out.values.raw(),
          .out_stride = out.values.stride(0),
          .scales = out.quantized() ? out.scales.data<float>() : nullptr,
          .scales_stride = out.quantized() ? out.scales.stride(0) : 0};
}

MlaPrefillSm90::Limits MlaStep::PrefillLimits(int64_t max_tokens,
                                              int64_t max_context_tokens) const {
  MlaPrefillSm90::Limits limits;
  limits.max_tokens = static_cast<int>(max_tokens);
  limits.max_context_tokens = max_context_tokens;
  limits.piece_tokens = static_cast<int>(
      std::min<int64_t>(limits.piece_tokens, DivideUp(max_context_tokens, 128) * 128));
  return limits;
}

int64_t MlaStep::ScratchBytes(const StepLimits& limits) const {
  if (!Supports(device_) || limits.max_sequences == 0) return 0;
  const int64_t contexts = limits.max_sequences * DivideUp(limits.max_model_len, 128) * 128;
  return AlignUp(kRowBytes) +
         AlignUp(MlaDecodeSm90::WorkspaceBytes(static_cast<int>(limits.num_layers),
                                               device_.multiProcessorCount)) +
         AlignUp(MlaPrefillSm90::WorkspaceBytes(PrefillLimits(limits.max_tokens, contexts))) +
         kPrefillAlignment;
}

void MlaStep::UseScratch(const StepLimits& limits, void* memory) {
  if (!Supports(device_) || limits.max_sequences == 0) return;
  const int64_t contexts = limits.max_sequences * DivideUp(limits.max_model_len, 128) * 128;
  auto* next = static_cast<char*>(memory);
  row_numbers_ = reinterpret_cast<int*>(next);
  next += AlignUp(kRowBytes);
  MakeDecode(next, static_cast<int>(limits.num_layers));
  next += AlignUp(MlaDecodeSm90::WorkspaceBytes(num_layers_, device_.multiProcessorCount));
  next += (kPrefillAlignment - reinterpret_cast<uintptr_t>(next) % kPrefillAlignment) %
          kPrefillAlignment;
  prefill_limits_ = PrefillLimits(limits.max_tokens, contexts);
  prefill_.emplace(next, prefill_limits_, device_.multiProcessorCount);
}

void MlaStep::MakeDecode(void* workspace, int num_layers) {
  num_layers_ = num_layers;
  decode_.emplace(workspace, num_layers, device_.multiProcessorCount);
}

void MlaStep::Begin(const AttentionBatch& batch, cudaStream_t stream) {
  layer_ = num_rows_ = 0;
  has_prefill_ = false;
  const int64_t sequences = batch.context_lens.dim(0);
  if (!Supports(device_) || sequences == 0 || batch.host_query_start == nullptr) return;
  for (int64_t s = 0; s < sequences; ++s) {
    const bool is_row = batch.host_query_start[s + 1] - batch.host_query_start[s] == 1;
    num_rows_ += is_row ? 1 : 0;
    has_prefill_ |= !is_row;
  }
  if (num_rows_ > 0 && num_rows_ <= kMaxRows) ScheduleRows(batch, stream);
  if (has_prefill_ && sequences <= MlaPrefillSm90::kMaxSequences) SchedulePrefill(batch, stream);
}

void MlaStep::ScheduleRows(const AttentionBatch& batch, cudaStream_t stream) {
  if (!decode_.has_value()) {
    constexpr int kLayers = 128;
    MakeDecode(
        decode_memory_.Reserve(MlaDecodeSm90::WorkspaceBytes(kLayers, device_.multiProcessorCount)),
        kLayers);
    row_numbers_ = static_cast<int*>(row_memory_.Reserve(kRowBytes));
  }
  if (!has_prefill_) {
    decode_->Schedule({.count = num_rows_, .context_lens = batch.context_lens.data<int32_t>()},
                      stream);
    return;
  }
  LaunchDependent(FindRowsKernel, {dim3(1), dim3(kWarp)}, stream, batch.query_start.data<int32_t>(),
                  batch.context_lens.data<int32_t>(), static_cast<int>(batch.context_lens.dim(0)),
                  row_numbers_);
  tokens_ = row_numbers_ + 2 * kMaxRows;
  // Queries and outputs of the rows lie side by side: row r is line r there.
  decode_->Schedule(
      {.count = num_rows_, .context_lens = row_numbers_, .sequences = row_numbers_ + kMaxRows},
      stream);
}

void MlaStep::SchedulePrefill(const AttentionBatch& batch, cudaStream_t stream) {
  const auto sequences = static_cast<int>(batch.context_lens.dim(0));
  const int64_t tokens = batch.host_query_start[sequences], contexts = TotalContext(batch);
  if (!prefill_.has_value() || tokens > prefill_limits_.max_tokens ||
      contexts > prefill_limits_.max_context_tokens) {
    prefill_limits_ = PrefillLimits(tokens, contexts);
    prefill_.emplace(prefill_memory_.Reserve(MlaPrefillSm90::WorkspaceBytes(prefill_limits_)),
                     prefill_limits_, device_.multiProcessorCount);
  }
  prefill_step_ = prefill_->Schedule({.num_sequences = sequences,
                                      .min_chunk = 2,
                                      .query_start = batch.query_start.data<int32_t>(),
                                      .context_lens = batch.context_lens.data<int32_t>(),
                                      .host_query_start = batch.host_query_start,
                                      .host_context_lens = batch.host_context_lens},
                                     stream);
}

int MlaStep::TakeLayer(const AttentionBatch& batch, cudaStream_t stream) {
  if (layer_ == num_layers_ && num_rows_ > 0) {  // more than announced: the counters are used up
    ScheduleRows(batch, stream);
    layer_ = 0;
  }
  return layer_++;
}

}  // namespace cuda

bool CudaOps::AttendSm90(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                         const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                         float scale, const LinearInput& out) {
  using Decode = MlaDecodeSm90;
  using Prefill = MlaPrefillSm90;
  const int64_t rope_dim = q.dim(2) - weights.w_uk.dim(2);
  const bool is_fp8 = cache.dtype() == DType::kF8E4M3;
  const bool is_v3 = q.dim(1) == Decode::kHeads && rope_dim == Decode::kRopeHeadDim &&
                     batch.block_size % Decode::kBlockSizeUnit == 0 &&
                     cuda::HasProjections(q, weights, cos_sin, rope_dim);
  const int64_t sequences = batch.context_lens.dim(0);
  if (!is_v3 || (cache.dtype() != DType::kBF16 && !is_fp8) || !cuda::Supports(device_) ||
      batch.host_query_start == nullptr ||
      sequences > std::min(Decode::kMaxRows, Prefill::kMaxSequences)) {
    return false;
  }
  // Every sequence has a token, so as many tokens as sequences are one each.
  const bool is_decode = q.dim(0) == sequences;
  const bool is_dense = q.dense() && positions.stride(0) == 1 && out.values.dense() &&
                        (!out.quantized() || out.scales.dense());
  if (!is_decode && !is_dense) return false;

  const MlaCache layer_cache = {.data = cache.raw(),
                                .type = is_fp8 ? MlaCacheType::kFp8 : MlaCacheType::kBf16,
                                .num_blocks = cache.dim(0),
                                .block_size = batch.block_size};
  const int layer = step_.TakeLayer(batch, stream_);
  if (!is_decode) {
    step_.prefill().Run(step_.prefill_step(), layer_cache,
                        cuda::PrefillLayerOf(q, weights, positions, cos_sin, batch, scale, out),
                        stream_);
  }
  const int64_t rows = is_decode ? sequences : step_.num_rows();
  if (rows == 0) return true;
  const AttentionSizes sizes = {.tokens = rows,
                                .heads = q.dim(1),
                                .kv_lora_rank = weights.w_uk.dim(1),
                                .nope_dim = weights.w_uk.dim(2),
                                .rope_dim = rope_dim,
                                .v_dim = weights.w_uv.dim(1),
                                .sequences = sequences};
  const Latents latents = ReserveLatents(sizes, rows, q.dtype());
  const int* tokens = is_decode ? nullptr : step_.tokens();
  cuda::Absorption absorption =
      cuda::AbsorptionOf(q, weights, positions, cos_sin, latents.q_latent, latents.q_rope);
  absorption.tokens = tokens;
  cuda::Absorb(absorption, stream_);
  step_.decode().Run(Decode::MapCache(layer_cache),
                     {.index = layer,
                      .num_rows = static_cast<int>(rows),
                      .q_latent = static_cast<const __nv_bfloat16*>(latents.q_latent.raw()),
                      .q_rope = static_cast<const __nv_bfloat16*>(latents.q_rope.raw()),
                      .block_tables = batch.block_tables.data<int32_t>(),
                      .max_blocks = static_cast<int>(batch.block_tables.stride(0)),
                      .scale = scale,
                      .out = static_cast<__nv_bfloat16*>(latents.latent.raw()),
                      // Absorb lets it begin only after it waited itself.
                      .start = Decode::Start::kEarly},
                     stream_);
  cuda::ValueProjection projection = cuda::ProjectionOf(latents.latent, weights, out);
  projection.tokens = tokens;
  cuda::Project(projection, stream_);
  return true;
}

}  // namespace fathom
