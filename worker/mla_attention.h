// Multi-head latent attention of one layer, for the heads of this rank.
//
// Keys and values of all heads are linear in one latent per token, so kv_b_proj is absorbed into
// the query and the output, and attention runs in the latent space on what the KV cache keeps.
//
// Source: DeepSeek-V2 report §2.1.2–2.1.3; deepseek-ai/DeepSeek-V3 inference/model.py, class MLA,
// attn_impl "absorb". Not thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/arena.h"
#include "worker/model_config.h"
#include "worker/shard_layout.h"
#include "worker/weight_loader.h"

namespace fathom {

// Scratch for steps of up to T tokens, shared by all layers.
struct MlaScratch {
  static MlaScratch Plan(const ModelConfig& config, const ShardLayout& layout, DType act,
                         int64_t max_tokens, Arena& arena);

  Tensor q_a;         // [T, q_lora_rank], absent without
  Tensor q;           // [T, A * (nope + P)]
  Tensor kv_a;        // [T, R + P]
  Tensor q_latent;    // [T, A, R]
  Tensor out_latent;  // [T, A, R]
  Tensor out_heads;   // [T, A * v]
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

  // Stores the latents of x's tokens in `cache` and attends.
  //   x [T, H] act, normed   cache [blocks, block_size, R + P]
  //   out [T, H] act: this rank's heads only; the sum over ranks is the layer's output
  void Forward(const Tensor& x, const AttentionStep& step, const Tensor& cache,
               const MlaScratch& scratch, Ops& ops, const Tensor& out) const;

 private:
  // q_nope and q_rope of each head: [T, A, nope + P] act
  Tensor Queries(const Tensor& x, const MlaScratch& scratch, Ops& ops) const;

  const std::string prefix_;
  const ModelConfig config_;
  const Range heads_;

  Weight q_proj_;  // without q_lora_rank; else the next three
  Weight q_a_proj_;
  Tensor q_a_layernorm_;
  Weight q_b_proj_;
  Weight kv_a_proj_with_mqa_;
  Tensor kv_a_layernorm_;
  Tensor w_uk_;  // [A, R, nope], of kv_b_proj
  Tensor w_uv_;  // [A, v, R], of kv_b_proj
  Weight o_proj_;
};

}  // namespace fathom
