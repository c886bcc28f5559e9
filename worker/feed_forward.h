// The feed-forward half of a layer: a gated MLP, or shared experts beside routed ones.
//
// Source: DeepSeek-V3 report §2.1.2; deepseek-ai/DeepSeek-V3 inference/model.py, classes MLP and
// MoE. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/arena.h"
#include "worker/model_config.h"
#include "worker/shard_layout.h"
#include "worker/stacked_linear.h"
#include "worker/weight_loader.h"

namespace fathom {

// Scratch for steps of up to T tokens and M = T * k routed rows, shared by all layers. I is the
// widest of what this rank has of a dense layer and of the shared experts, J what it has of a
// routed expert, E the experts it holds; shared experts count in k and E where they may stand in
// the stack of the routed ones.
struct FeedForwardScratch {
  static FeedForwardScratch Plan(const ModelConfig& config, const ShardLayout& layout, DType act,
                                 bool quantize_activations, int64_t max_tokens, Arena& arena);

  Tensor gate_up;          // [T, 2 * I] act
  LinearInputs activated;  // [T, I]

  // Absent in a dense model.
  Tensor logits;                  // [T, n_routed_experts] f32
  Tensor experts;                 // [M] i32
  Tensor weights;                 // [M] f32
  ExpertGroups groups;            // rows [M], offsets [E + 1], notes
  Tensor expert_gate_up;          // [M, 2 * J] act
  LinearInputs expert_activated;  // [M, J]
  Tensor expert_out;              // [M, H] act
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
  InputForms FormsOf(const LinearInputs& x) const { return gate_up_proj_.FormsOf(x); }

  // x [T, H]   out [T, H] act; the sum of `out` over ranks is the whole
  void Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops,
               const Tensor& out) const;

 private:
  const std::string prefix_;
  const int64_t hidden_size_;
  const int64_t intermediate_size_;
  const Range part_;

  StackedLinear gate_up_proj_;
  Weight down_proj_;
};

// The router and this rank's part of the routed experts: a slice of each, or some as a whole.
// Shared experts are sliced like routed ones where that gives slices of the same shape; then they
// stand in the same stack, and every token chooses them.
class RoutedExperts {
 public:
  // `prefix`: "model.layers.3.mlp."
  RoutedExperts(const std::string& prefix, const ModelConfig& config, const ShardLayout& layout);

  // Most shared experts that can stand in the stack: all or none.
  static int SharedInStack(const ModelConfig& config, const ShardLayout& layout);

  void AddWeights(WeightLoader& loader);
  // Known once AddWeights has seen what the source has.
  bool has_shared_experts() const { return routing_.num_shared_experts > 0; }

  InputForms FormsOf(const LinearInputs& x) const;

  // out = this rank's part of Σ weight * expert(x) over the experts of each token, plus what is in
  // `out` if `accumulate`.
  //   x [T, H]   out [T, H] act
  void Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops, bool accumulate,
               const Tensor& out) const;

 private:
  // Per expert of the stack, the parts of gate_proj and up_proj, or of down_proj.
  std::vector<std::vector<LinearPart>> GateUpParts(int num_shared) const;
  std::vector<LinearPart> DownParts(int num_shared) const;
  // Where shared expert `index` of the stack lies in the intermediate size of all of them.
  Range SharedPart(int index) const;

  const std::string prefix_;
  const ModelConfig config_;
  const ShardLayout layout_;
  RoutingConfig routing_;  // of config, with the shared experts of the stack

  Tensor gate_;                     // [n_routed_experts, H]
  Tensor e_score_correction_bias_;  // [n_routed_experts] f32, noaux_tc only
  StackedLinear gate_up_proj_;      // [E, 2 * J, H]
  Weight down_proj_;                // [E, H, J]
};

class FeedForward {
 public:
  // `prefix`: "model.layers.3.mlp."
  FeedForward(const std::string& prefix, int layer, const ModelConfig& config,
              const ShardLayout& layout);

  void AddWeights(WeightLoader& loader);
  // What Forward reads of such an x. REQUIRES: the weights are loaded.
  InputForms FormsOf(const LinearInputs& x) const;

  // x [T, H], normed   out [T, H] act: this rank's part; the sum over ranks is the whole
  void Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops,
               const Tensor& out) const;

 private:
  std::optional<GatedMlp> mlp_;  // the dense layer, or shared experts outside of the stack
  std::optional<RoutedExperts> experts_;
};

}  // namespace fathom
