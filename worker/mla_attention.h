// Multi-head latent attention of one layer, for the heads of this rank.
//
// Keys and values of all heads are linear in one latent per token, which is all that the KV cache
// keeps beside a key for the position that the heads share.
//
// Source: DeepSeek-V2 report §2.1.2–2.1.3; deepseek-ai/DeepSeek-V3 inference/model.py, class MLA.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/arena.h"
#include "worker/model_config.h"
#include "worker/shard_layout.h"
#include "worker/stacked_linear.h"
#include "worker/weight_loader.h"

namespace fathom {

// Scratch for steps of up to T tokens, shared by all layers.
struct MlaScratch {
  static MlaScratch Plan(const ModelConfig& config, const ShardLayout& layout, DType act,
                         bool quantize_activations, int64_t max_tokens, Arena& arena);

  Tensor qkv_a;            // [T, Q + R + P]
  LinearInputs q_a;        // [T, Q], absent without q_lora_rank
  Tensor q;                // [T, A * (nope + P)]
  LinearInputs out_heads;  // [T, A * v]
};

// Where the tokens of a step stand, the same for all layers.
struct AttentionStep {
  Tensor positions;  // [T] i32
  Tensor places;     // [T] i32
  Tensor cos_sin;    // [max_model_len, P / 2, 2] f32
  AttentionBatch batch;
};

class MlaAttention {
 public:
  // `prefix`: "model.layers.0.self_attn."
  MlaAttention(const std::string& prefix, const ModelConfig& config, const ShardLayout& layout)
      : prefix_(prefix), config_(config), heads_(layout.heads()) {}

  void AddWeights(WeightLoader& loader);

  // What Forward reads of such an x. REQUIRES: the weights are loaded.
  InputForms FormsOf(const LinearInputs& x) const;

  // Stores the latents of x's tokens in `cache` and attends.
  //   x [T, H], normed   cache: of KvCache
  //   out [T, H] act: this rank's heads only; the sum over ranks is the layer's output
  void Forward(const LinearInputs& x, const AttentionStep& step, const Tensor& cache,
               const MlaScratch& scratch, Ops& ops, const Tensor& out) const;

 private:
  const std::string prefix_;
  const ModelConfig config_;
  const Range heads_;

  StackedLinear qkv_a_proj_;  // q_a_proj, with q_lora_rank, above kv_a_proj_with_mqa
  Tensor q_a_layernorm_;
  Tensor kv_a_layernorm_;
  Weight q_proj_;  // q_b_proj, or without q_lora_rank q_proj, which reads what qkv_a_proj reads
  Tensor w_uk_;    // [A, R, nope], of kv_b_proj
  Tensor w_uv_;    // [A, v, R], of kv_b_proj
  Weight o_proj_;
};

}  // namespace fathom
