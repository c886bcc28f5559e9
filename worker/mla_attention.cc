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
                            bool quantize_activations, int64_t max_tokens, Arena& arena) {
  const int64_t heads = layout.heads().size();
  MlaScratch scratch;
  scratch.qkv_a = arena.Take(act, {max_tokens, config.q_lora_rank + config.kv_dim()});
  if (config.q_lora_rank > 0) {
    scratch.q_a =
        LinearInputs::Plan(act, quantize_activations, max_tokens, config.q_lora_rank, arena);
  }
  scratch.q = arena.Take(act, {max_tokens, heads * config.qk_head_dim()});
  scratch.out_heads =
      LinearInputs::Plan(act, quantize_activations, max_tokens, heads * config.v_head_dim, arena);
  return scratch;
}

void MlaAttention::AddWeights(WeightLoader& loader) {
  const int64_t num_heads = config_.num_attention_heads;
  const auto rows_of_heads = [&](int64_t head_dim, int64_t num_columns) {
    return MatrixPart::Rows(num_heads * head_dim, num_columns,
                            {heads_.begin * head_dim, heads_.end * head_dim});
  };
  const auto name = [&](const char* layer) { return absl::StrCat(prefix_, layer, ".weight"); };

  const LinearPart kv_a_proj = {name("kv_a_proj_with_mqa"),
                                MatrixPart::Whole(config_.kv_dim(), config_.hidden_size)};
  if (config_.q_lora_rank > 0) {
    const LinearPart q_a_proj = {name("q_a_proj"),
                                 MatrixPart::Whole(config_.q_lora_rank, config_.hidden_size)};
    loader.AddStackedLinear({q_a_proj, kv_a_proj}, qkv_a_proj_);
    loader.AddVector(name("q_a_layernorm"), config_.q_lora_rank, q_a_layernorm_);
    loader.AddLinear({name("q_b_proj"), rows_of_heads(config_.qk_head_dim(), config_.q_lora_rank)},
                     q_proj_);
  } else {
    loader.AddStackedLinear({kv_a_proj}, qkv_a_proj_);
    loader.AddLinear({name("q_proj"), rows_of_heads(config_.qk_head_dim(), config_.hidden_size)},
                     q_proj_);
  }
  loader.AddVector(name("kv_a_layernorm"), config_.kv_lora_rank, kv_a_layernorm_);
  loader.AddKvB(name("kv_b_proj"), config_, heads_, w_uk_, w_uv_);
  const Range columns_of_heads = {heads_.begin * config_.v_head_dim,
                                  heads_.end * config_.v_head_dim};
  loader.AddLinear(
      {name("o_proj"),
       MatrixPart::Columns(config_.hidden_size, num_heads * config_.v_head_dim, columns_of_heads)},
      o_proj_);
}

InputForms MlaAttention::FormsOf(const LinearInputs& x) const {
  const InputForms forms = qkv_a_proj_.FormsOf(x);
  return config_.q_lora_rank > 0 ? forms : forms | x.FormOf(q_proj_);
}

void MlaAttention::Forward(const LinearInputs& x, const AttentionStep& step, const Tensor& cache,
                           const MlaScratch& scratch, Ops& ops, const Tensor& out) const {
  const int64_t tokens = out.dim(0);
  const Tensor qkv_a = scratch.qkv_a.Slice(0, 0, tokens);
  const Tensor q = scratch.q.Slice(0, 0, tokens);
  const LinearInputs out_heads = scratch.out_heads.Rows(tokens);

  // Both latents of a token: what the cache keeps, and what its queries come from.
  qkv_a_proj_.Multiply(x, ops, qkv_a);
  if (config_.q_lora_rank > 0) {
    const LinearInput q_a = scratch.q_a.Rows(tokens).For(q_proj_);
    ops.StoreLatents(qkv_a, q_a_layernorm_, kv_a_layernorm_, kLatentNormEps, step.positions,
                     step.cos_sin, step.places, q_a, cache);
    ops.Linear(q_a, q_proj_, q);
  } else {
    ops.StoreLatents(qkv_a, {}, kv_a_layernorm_, kLatentNormEps, step.positions, step.cos_sin,
                     step.places, {}, cache);
    ops.Linear(x.For(q_proj_), q_proj_, q);
  }

  ops.MlaAttention(q.SplitLast(heads_.size(), config_.qk_head_dim()), {w_uk_, w_uv_},
                   step.positions, step.cos_sin, cache, step.batch, config_.SoftmaxScale(),
                   out_heads.For(o_proj_));
  ops.Linear(out_heads.For(o_proj_), o_proj_, out);
}

}  // namespace fathom
