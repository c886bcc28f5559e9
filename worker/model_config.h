// A checkpoint's config.json as numbers that have been checked.
//
// Fields keep their names from config.json. What this engine cannot compute, and what contradicts
// itself, is refused here with the field's name, its value and what was expected, so that the rest
// of the worker may trust every number: all sizes are positive and small enough that their products
// fit into 64 bits, all divisions are exact.
//
// Source: deepseek-ai/DeepSeek-V3 configuration_deepseek.py, modeling_deepseek.py; the same of
// DeepSeek-V2. Values, free to copy; thread-compatible.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace fathom {

// `rope_scaling` of type "yarn".
struct YarnScaling {
  double factor = 1.0;
  int original_max_position_embeddings = 0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 1.0;
  double mscale_all_dim = 0.0;
};

struct ModelConfig {
  std::string architecture;  // DeepseekV3ForCausalLM or DeepseekV2ForCausalLM

  int vocab_size = 0;
  int hidden_size = 0;
  int num_hidden_layers = 0;
  int num_nextn_predict_layers = 0;  // for multi-token prediction; they follow and stay unread
  int max_position_embeddings = 0;
  bool tie_word_embeddings = false;  // the head is the embedding table
  std::vector<int> eos_token_ids;    // ascending, of config.json and generation_config.json

  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000.0;
  std::optional<YarnScaling> yarn;  // absent: plain rotary embedding

  // Multi-head latent attention.
  int num_attention_heads = 0;
  int q_lora_rank = 0;  // 0: queries come straight from the hidden state, through q_proj
  int kv_lora_rank = 0;
  int qk_nope_head_dim = 0;
  int qk_rope_head_dim = 0;
  int v_head_dim = 0;

  // Feed-forward. Without routed experts every layer is dense and the fields below `intermediate`
  // mean nothing.
  int intermediate_size = 0;
  int n_routed_experts = 0;
  int n_shared_experts = 0;
  int moe_intermediate_size = 0;
  int first_k_dense_replace = 0;
  int moe_layer_freq = 1;
  RoutingConfig routing;

  // Linear weights may be F8_E4M3 with `weight_scale_inv` (quantization_config).
  bool fp8_weights = false;

  int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int kv_dim() const { return kv_lora_rank + qk_rope_head_dim; }  // what a token keeps in a layer
  bool IsMoeLayer(int layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  bool HasDenseLayer() const;
  bool HasMoeLayer() const;
  // 1 / sqrt(qk_head_dim), times mscale(factor, mscale_all_dim)² under YaRN.
  float SoftmaxScale() const;
};

// YaRN's correction of attention for a context stretched by `factor`.
// Source: DeepSeek-V3 modeling_deepseek.py, yarn_get_mscale.
double YarnMscale(double factor, double mscale);

// InvalidArgument names field, value and expectation. Either text may come from anywhere.
// `generation_config_json` may be empty; only its eos_token_id counts here.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json,
                                             std::string_view generation_config_json);

// Reads config.json and, where there is one, generation_config.json of a model folder.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_directory);

}  // namespace fathom
