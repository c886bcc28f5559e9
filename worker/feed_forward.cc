#include "worker/feed_forward.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"

namespace fathom {

FeedForwardScratch FeedForwardScratch::Plan(const ModelConfig& config, const ShardLayout& layout,
                                            DType act, int64_t max_tokens, Arena& arena) {
  FeedForwardScratch scratch;
  const int64_t widest =
      std::max(layout.intermediate().size(), layout.shared_intermediate().size());
  scratch.gate_up = arena.Take(act, {max_tokens, 2 * widest});
  scratch.activated = arena.Take(act, {max_tokens, widest});
  if (!config.HasMoeLayer()) return scratch;

  const int64_t choices = config.routing.num_experts_per_tok;
  const int64_t rows = max_tokens * choices;
  const int64_t part = layout.expert_intermediate().size();
  scratch.router_logits = arena.Take(DType::kF32, {max_tokens, config.n_routed_experts});
  scratch.experts = arena.Take(DType::kI32, {max_tokens, choices});
  scratch.weights = arena.Take(DType::kF32, {max_tokens, choices});
  scratch.groups.rows = arena.Take(DType::kI32, {rows});
  scratch.groups.offsets = arena.Take(DType::kI32, {layout.experts().size() + 1});
  scratch.expert_gate_up = arena.Take(act, {rows, 2 * part});
  scratch.expert_activated = arena.Take(act, {rows, part});
  scratch.expert_out = arena.Take(act, {rows, config.hidden_size});
  return scratch;
}

void GatedMlp::AddWeights(WeightLoader& loader) {
  const MatrixPart in = MatrixPart::Rows(intermediate_size_, hidden_size_, part_);
  const MatrixPart out = MatrixPart::Columns(hidden_size_, intermediate_size_, part_);
  loader.AddLinear(absl::StrCat(prefix_, "gate_proj.weight"), in, gate_proj_);
  loader.AddLinear(absl::StrCat(prefix_, "up_proj.weight"), in, up_proj_);
  loader.AddLinear(absl::StrCat(prefix_, "down_proj.weight"), out, down_proj_);
}

void GatedMlp::Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
                       const Tensor& out) const {
  const int64_t width = part_.size();
  const Tensor gate_up = scratch.gate_up.Slice(0, 0, x.dim(0)).Slice(1, 0, 2 * width);
  const Tensor activated = scratch.activated.Slice(0, 0, x.dim(0)).Slice(1, 0, width);
  ops.Linear(x, gate_proj_, gate_up.Slice(1, 0, width));
  ops.Linear(x, up_proj_, gate_up.Slice(1, width, 2 * width));
  ops.SwiGlu(gate_up, activated);
  ops.Linear(activated, down_proj_, out);
}

void RoutedExperts::AddWeights(WeightLoader& loader) {
  loader.AddTable(absl::StrCat(prefix_, "gate.weight"),
                  MatrixPart::Whole(config_.n_routed_experts, config_.hidden_size), gate_);
  if (config_.routing.topk_method == TopkMethod::kNoauxTc) {
    loader.AddVector(absl::StrCat(prefix_, "gate.e_score_correction_bias"),
                     config_.n_routed_experts, e_score_correction_bias_);
  }
  const auto names = [&](const char* layer) {
    std::vector<std::string> per_expert;
    for (int64_t expert = experts_.begin; expert < experts_.end; ++expert) {
      per_expert.push_back(absl::StrCat(prefix_, "experts.", expert, ".", layer, ".weight"));
    }
    return per_expert;
  };
  const MatrixPart in = MatrixPart::Rows(config_.moe_intermediate_size, config_.hidden_size, part_);
  const MatrixPart out =
      MatrixPart::Columns(config_.hidden_size, config_.moe_intermediate_size, part_);
  loader.AddLinearStack(names("gate_proj"), in, gate_proj_);
  loader.AddLinearStack(names("up_proj"), in, up_proj_);
  loader.AddLinearStack(names("down_proj"), out, down_proj_);
}

void RoutedExperts::Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
                            const Tensor& out) const {
  const int64_t tokens = x.dim(0);
  const int choices = config_.routing.num_experts_per_tok;
  const int64_t rows = tokens * choices;

  // The choice is made in F32 and is the same on every rank.
  const Tensor router_logits = scratch.router_logits.Slice(0, 0, tokens);
  const Tensor experts = scratch.experts.Slice(0, 0, tokens);
  const Tensor weights = scratch.weights.Slice(0, 0, tokens);
  ops.Linear(x, {.values = gate_}, router_logits);
  ops.RouteExperts(router_logits, e_score_correction_bias_, config_.routing, experts, weights);

  // Rows sorted by expert go through this rank's experts, and back to their tokens.
  const ExpertGroups groups = {.rows = scratch.groups.rows.Slice(0, 0, rows),
                               .offsets = scratch.groups.offsets};
  const int64_t width = part_.size();
  const Tensor gate_up = scratch.expert_gate_up.Slice(0, 0, rows);
  const Tensor activated = scratch.expert_activated.Slice(0, 0, rows);
  const Tensor expert_out = scratch.expert_out.Slice(0, 0, rows);
  ops.GroupByExpert(experts, static_cast<int>(experts_.begin), groups);
  ops.GroupedLinear(x, groups, gate_proj_, choices, gate_up.Slice(1, 0, width));
  ops.GroupedLinear(x, groups, up_proj_, choices, gate_up.Slice(1, width, 2 * width));
  ops.SwiGlu(gate_up, activated);
  ops.GroupedLinear(activated, groups, down_proj_, /*num_experts_per_tok=*/0, expert_out);
  ops.CombineExperts(expert_out, groups, weights, out);
}

FeedForward::FeedForward(const std::string& prefix, int layer, const ModelConfig& config,
                         const ShardLayout& layout) {
  if (!config.IsMoeLayer(layer)) {
    mlp_.emplace(prefix, config.hidden_size, config.intermediate_size, layout.intermediate());
    return;
  }
  experts_.emplace(prefix, config, layout);
  if (config.n_shared_experts > 0) {
    mlp_.emplace(absl::StrCat(prefix, "shared_experts."), config.hidden_size,
                 config.n_shared_experts * config.moe_intermediate_size,
                 layout.shared_intermediate());
  }
}

void FeedForward::AddWeights(WeightLoader& loader) {
  if (mlp_.has_value()) mlp_->AddWeights(loader);
  if (experts_.has_value()) experts_->AddWeights(loader);
}

void FeedForward::Forward(const Tensor& x, const FeedForwardScratch& scratch, Ops& ops,
                          const Tensor& out) const {
  if (mlp_.has_value()) {
    mlp_->Forward(x, scratch, ops, out);
  } else {
    ops.Clear(out);
  }
  if (experts_.has_value()) experts_->Forward(x, scratch, ops, out);
}

}  // namespace fathom
