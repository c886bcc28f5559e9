// The feed-forward half of a layer: a gated MLP, or shared experts beside routed ones.
//
// Source: DeepSeek-V3 report §2.1.2; deepseek-ai/DeepSeek-V3 inference/model.py, classes MLP and
// MoE. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/arena.h"
#include "worker/model_config.h"
#include "worker/shard_layout.h"
#include "worker/weight_loader.h"

namespace fathom {

// Scratch for steps of up to T tokens and M = T * k routed rows, shared by all layers. I is the
// widest of what this rank has of a dense layer and of the shared experts, J what it has of a
// routed expert, E the experts it holds.
struct FeedForwardScratch {
  static FeedForwardScratch Plan(const ModelConfig& config, const ShardLayout& layout, DType act,
                                 int64_t max_tokens, Arena& arena);

  Tensor gate_up;    // [T, 2 * I] act
  Tensor activated;  // [T, I] act

  // Absent in a dense model.
  Tensor router_logits;     // [T, n_routed_experts] f32
  Tensor experts;           // [T, k] i32
  Tensor weights;           // [T, k] f32
  ExpertGroups groups;      // rows [M], offsets [E + 1]
  Tensor expert_gate_up;    // [M, 2 * J] act
  Tensor expert_activated;  // [M, J] act
  Tensor expert_out;        // [M, H] act
};

// out = down_proj(silu(gate_proj(x)) * up_proj(x)), sliced along the intermediate size.
class GatedMlp {
 public:
  // `prefix`: "model.layers.0.mlp."   `part` of the intermediate size is this rank's
  GatedMlp(const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
           const Range& part)
      : prefix_(prefix),
        hidden_size_(hidden_size),
        intermediate_size_(intermediate_size),
        part_(part) {}

  void AddWeights(WeightLoader& loader);

  // x, out [T, H] act; the sum of `out` over ranks is the whole
  void Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
               const Tensor& out) const;

 private:
  const std::string prefix_;
  const int64_t hidden_size_;
  const int64_t intermediate_size_;
  const Range part_;

  // Apart, not stacked: a rank's slices of F8_E4M3 weights may begin in the middle of a block.
  Weight gate_proj_;
  Weight up_proj_;
  Weight down_proj_;
};

// The router and this rank's part of the routed experts: a slice of each, or some as a whole.
class RoutedExperts {
 public:
  // `prefix`: "model.layers.3.mlp."
  RoutedExperts(const std::string& prefix, const ModelConfig& config, const ShardLayout& layout)
      : prefix_(prefix),
        config_(config),
        experts_(layout.experts()),
        part_(layout.expert_intermediate()) {}

  void AddWeights(WeightLoader& loader);

  // out += this rank's part of Σ weight * expert(x) over the experts of each token.
  //   x, out [T, H] act
  void Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
               const Tensor& out) const;

 private:
  const std::string prefix_;
  const ModelConfig config_;
  const Range experts_;
  const Range part_;

  Tensor gate_;                     // [n_routed_experts, H]
  Tensor e_score_correction_bias_;  // [n_routed_experts] f32, noaux_tc only
  Weight gate_proj_;                // [E, J, H]
  Weight up_proj_;                  // [E, J, H]
  Weight down_proj_;                // [E, H, J]
};

class FeedForward {
 public:
  // `prefix`: "model.layers.3.mlp."
  FeedForward(const std::string& prefix, int layer, const ModelConfig& config,
              const ShardLayout& layout);

  void AddWeights(WeightLoader& loader);

  // x [T, H] act, normed   out [T, H] act: this rank's part; the sum over ranks is the whole
  void Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
               const Tensor& out) const;

 private:
  std::optional<GatedMlp> mlp_;  // the dense layer, or the shared experts if there are any
  std::optional<RoutedExperts> experts_;
};

}  // namespace fathom
