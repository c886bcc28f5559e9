#include "worker/mla_attention.h"

#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

// The norms of the two latents keep the modelling code's default whatever rms_norm_eps says, which
// only differs in a checkpoint or two (Moonlight).
// Source: DeepSeek-V3 modeling_deepseek.py, DeepseekV3Attention.__init__.
constexpr float kLatentNormEps = 1e-6f;

}  // namespace

MlaScratch MlaScratch::Plan(const ModelConfig& config, const ShardLayout& layout, DType act,
                            int64_t max_tokens, Arena& arena) {
  const int64_t heads = layout.heads().size();
  MlaScratch scratch;
  if (config.q_lora_rank > 0) scratch.q_a = arena.Take(act, {max_tokens, config.q_lora_rank});
  scratch.q = arena.Take(act, {max_tokens, heads * config.qk_head_dim()});
  scratch.kv_a = arena.Take(act, {max_tokens, config.kv_dim()});
  scratch.q_latent = arena.Take(act, {max_tokens, heads, config.kv_lora_rank});
  scratch.out_latent = arena.Take(act, {max_tokens, heads, config.kv_lora_rank});
  scratch.out_heads = arena.Take(act, {max_tokens, heads * config.v_head_dim});
  return scratch;
}

void MlaAttention::AddWeights(WeightLoader& loader) {
  const int64_t num_heads = config_.num_attention_heads;
  const auto rows_of_heads = [&](int64_t head_dim, int64_t num_columns) {
    return MatrixPart::Rows(num_heads * head_dim, num_columns,
                            {heads_.begin * head_dim, heads_.end * head_dim});
  };
  const auto name = [&](const char* layer) { return absl::StrCat(prefix_, layer, ".weight"); };

  if (config_.q_lora_rank > 0) {
    loader.AddLinear(name("q_a_proj"), MatrixPart::Whole(config_.q_lora_rank, config_.hidden_size),
                     q_a_proj_);
    loader.AddVector(name("q_a_layernorm"), config_.q_lora_rank, q_a_layernorm_);
    loader.AddLinear(name("q_b_proj"), rows_of_heads(config_.qk_head_dim(), config_.q_lora_rank),
                     q_b_proj_);
  } else {
    loader.AddLinear(name("q_proj"), rows_of_heads(config_.qk_head_dim(), config_.hidden_size),
                     q_proj_);
  }
  loader.AddLinear(name("kv_a_proj_with_mqa"),
                   MatrixPart::Whole(config_.kv_dim(), config_.hidden_size), kv_a_proj_with_mqa_);
  loader.AddVector(name("kv_a_layernorm"), config_.kv_lora_rank, kv_a_layernorm_);
  loader.AddKvB(name("kv_b_proj"), config_, heads_, w_uk_, w_uv_);
  loader.AddLinear(
      name("o_proj"),
      MatrixPart::Columns(config_.hidden_size, num_heads * config_.v_head_dim,
                          {heads_.begin * config_.v_head_dim, heads_.end * config_.v_head_dim}),
      o_proj_);
}

Tensor MlaAttention::Queries(const Tensor& x, const MlaScratch& scratch, Ops& ops) const {
  const int64_t tokens = x.dim(0);
  const Tensor q = scratch.q.Slice(0, 0, tokens);
  if (config_.q_lora_rank > 0) {
    const Tensor q_a = scratch.q_a.Slice(0, 0, tokens);
    ops.Linear(x, q_a_proj_, q_a);
    ops.RmsNorm(q_a, q_a_layernorm_, kLatentNormEps, q_a);
    ops.Linear(q_a, q_b_proj_, q);
  } else {
    ops.Linear(x, q_proj_, q);
  }
  return q.SplitLast(heads_.size(), config_.qk_head_dim());
}

void MlaAttention::Forward(const Tensor& x, const AttentionStep& step, const Tensor& cache,
                           const MlaScratch& scratch, Ops& ops, const Tensor& out) const {
  const int64_t tokens = x.dim(0);
  const int64_t nope = config_.qk_nope_head_dim;
  const int64_t rank = config_.kv_lora_rank;

  // What the cache keeps of each token: the normed latent and the rotated key.
  const Tensor kv_a = scratch.kv_a.Slice(0, 0, tokens);
  const Tensor latent = kv_a.Slice(1, 0, rank);
  const Tensor k_rope = kv_a.Slice(1, rank, config_.kv_dim());
  ops.Linear(x, kv_a_proj_with_mqa_, kv_a);
  ops.RmsNorm(latent, kv_a_layernorm_, kLatentNormEps, latent);
  ops.RotaryEmbed(k_rope.SplitLast(1, config_.qk_rope_head_dim), step.positions, step.cos_sin);
  ops.StoreKv(latent, k_rope, step.places, cache);

  // Queries, taken into the latent space by W_UK.
  const Tensor q = Queries(x, scratch, ops);
  const Tensor q_rope = q.Slice(2, nope, config_.qk_head_dim());
  const Tensor q_latent = scratch.q_latent.Slice(0, 0, tokens);
  ops.RotaryEmbed(q_rope, step.positions, step.cos_sin);
  ops.HeadLinear(q.Slice(2, 0, nope), w_uk_, q_latent);

  // Attention, and out of the latent space by W_UV.
  const Tensor out_latent = scratch.out_latent.Slice(0, 0, tokens);
  const Tensor out_heads = scratch.out_heads.Slice(0, 0, tokens);
  ops.MlaAttention(q_latent, q_rope, cache, step.batch, config_.SoftmaxScale(), out_latent);
  ops.HeadLinear(out_latent, w_uv_, out_heads.SplitLast(heads_.size(), config_.v_head_dim));
  ops.Linear(out_heads, o_proj_, out);
}

}  // namespace fathom
