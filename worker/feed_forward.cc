#include "worker/feed_forward.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"

namespace fathom {

FeedForwardScratch FeedForwardScratch::Plan(const ModelConfig& config, const ShardLayout& layout,
                                            DType act, bool quantize_activations,
                                            int64_t max_tokens, Arena& arena) {
  FeedForwardScratch scratch;
  const int64_t widest =
      std::max(layout.intermediate().size(), layout.shared_intermediate().size());
  scratch.gate_up = arena.Take(act, {max_tokens, 2 * widest});
  scratch.activated = LinearInputs::Plan(act, quantize_activations, max_tokens, widest, arena);
  if (!config.HasMoeLayer()) return scratch;

  const int64_t num_shared = RoutedExperts::SharedInStack(config, layout);
  const int64_t rows = max_tokens * (config.routing.num_experts_per_tok + num_shared);
  const int64_t experts = layout.experts().size() + num_shared;
  const int64_t part = layout.expert_intermediate().size();
  scratch.logits = arena.Take(DType::kF32, {max_tokens, config.n_routed_experts});
  scratch.experts = arena.Take(DType::kI32, {rows});
  scratch.weights = arena.Take(DType::kF32, {rows});
  scratch.groups.rows = arena.Take(DType::kI32, {rows});
  scratch.groups.offsets = arena.Take(DType::kI32, {experts + 1});
  scratch.groups.notes = arena.Take(DType::kI32, {NumGroupNotes(experts, rows)});
  scratch.expert_gate_up = arena.Take(act, {rows, 2 * part});
  scratch.expert_activated = LinearInputs::Plan(act, quantize_activations, rows, part, arena);
  scratch.expert_out = arena.Take(act, {rows, config.hidden_size});
  return scratch;
}

void GatedMlp::AddWeights(WeightLoader& loader) {
  const MatrixPart in = MatrixPart::Rows(intermediate_size_, hidden_size_, part_);
  const MatrixPart out = MatrixPart::Columns(hidden_size_, intermediate_size_, part_);
  loader.AddStackedLinear({{absl::StrCat(prefix_, "gate_proj.weight"), in},
                           {absl::StrCat(prefix_, "up_proj.weight"), in}},
                          gate_up_proj_);
  loader.AddLinear({absl::StrCat(prefix_, "down_proj.weight"), out}, down_proj_);
}

void GatedMlp::Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops,
                       const Tensor& out) const {
  const int64_t tokens = out.dim(0), width = part_.size();
  const Tensor gate_up = scratch.gate_up.Slice(0, 0, tokens).Slice(1, 0, 2 * width);
  const LinearInput activated = scratch.activated.Part(tokens, width).For(down_proj_);
  gate_up_proj_.Multiply(x, ops, gate_up);
  ops.SwiGlu(gate_up, /*groups=*/nullptr, activated);
  ops.Linear(activated, down_proj_, out);
}

RoutedExperts::RoutedExperts(const std::string& prefix, const ModelConfig& config,
                             const ShardLayout& layout)
    : prefix_(prefix), config_(config), layout_(layout), routing_(config.routing) {}

int RoutedExperts::SharedInStack(const ModelConfig& config, const ShardLayout& layout) {
  const int64_t part = layout.expert_intermediate().size();
  const bool fits = layout.experts().size() == config.n_routed_experts &&
                    layout.shared_intermediate().size() == config.n_shared_experts * part;
  // Several are cut between blocks of FP8 only, so that quantising while loading makes the same
  // blocks as quantising before.
  const bool lines_up = config.n_shared_experts == 1 || part % kFp8Block == 0;
  return fits && lines_up ? config.n_shared_experts : 0;
}

Range RoutedExperts::SharedPart(int index) const {
  // Any division of this rank's slice will do: the sum over the parts is the same.
  const int64_t part = layout_.expert_intermediate().size();
  const int64_t begin = layout_.shared_intermediate().begin + index * part;
  return {begin, begin + part};
}

std::vector<std::vector<LinearPart>> RoutedExperts::GateUpParts(int num_shared) const {
  std::vector<std::vector<LinearPart>> experts;
  const auto add = [&](const std::string& prefix, const MatrixPart& part) {
    experts.push_back({{absl::StrCat(prefix, "gate_proj.weight"), part},
                       {absl::StrCat(prefix, "up_proj.weight"), part}});
  };
  const int64_t size = config_.moe_intermediate_size, hidden_size = config_.hidden_size;
  for (int64_t expert = layout_.experts().begin; expert < layout_.experts().end; ++expert) {
    add(absl::StrCat(prefix_, "experts.", expert, "."),
        MatrixPart::Rows(size, hidden_size, layout_.expert_intermediate()));
  }
  for (int i = 0; i < num_shared; ++i) {
    add(absl::StrCat(prefix_, "shared_experts."),
        MatrixPart::Rows(config_.n_shared_experts * size, hidden_size, SharedPart(i)));
  }
  return experts;
}

std::vector<LinearPart> RoutedExperts::DownParts(int num_shared) const {
  std::vector<LinearPart> experts;
  const int64_t size = config_.moe_intermediate_size, hidden_size = config_.hidden_size;
  for (int64_t expert = layout_.experts().begin; expert < layout_.experts().end; ++expert) {
    experts.push_back({absl::StrCat(prefix_, "experts.", expert, ".down_proj.weight"),
                       MatrixPart::Columns(hidden_size, size, layout_.expert_intermediate())});
  }
  for (int i = 0; i < num_shared; ++i) {
    experts.push_back(
        {absl::StrCat(prefix_, "shared_experts.down_proj.weight"),
         MatrixPart::Columns(hidden_size, config_.n_shared_experts * size, SharedPart(i))});
  }
  return experts;
}

void RoutedExperts::AddWeights(WeightLoader& loader) {
  loader.AddTable(absl::StrCat(prefix_, "gate.weight"),
                  MatrixPart::Whole(config_.n_routed_experts, config_.hidden_size), gate_);
  if (config_.routing.topk_method == TopkMethod::kNoauxTc) {
    loader.AddVector(absl::StrCat(prefix_, "gate.e_score_correction_bias"),
                     config_.n_routed_experts, e_score_correction_bias_);
  }
  const int num_shared = SharedInStack(config_, layout_);
  const bool joins = num_shared > 0 && loader.CanStack(GateUpParts(num_shared)) &&
                     loader.CanStack(DownParts(num_shared));
  routing_.num_shared_experts = joins ? num_shared : 0;
  loader.AddStackedExperts(GateUpParts(routing_.num_shared_experts), gate_up_proj_);
  loader.AddExperts(DownParts(routing_.num_shared_experts), down_proj_);
}

InputForms RoutedExperts::FormsOf(const LinearInputs& x) const {
  const InputForms router = {.plain = true};
  return router | gate_up_proj_.FormsOf(x);
}

void RoutedExperts::Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops,
                            bool accumulate, const Tensor& out) const {
  const int64_t tokens = out.dim(0), width = layout_.expert_intermediate().size();
  const int choices = routing_.num_choices();
  const int64_t rows = tokens * choices;
  const int64_t experts = layout_.experts().size() + routing_.num_shared_experts;
  const Routes routes = {
      .logits = scratch.logits.Slice(0, 0, tokens),
      .experts = scratch.experts.Slice(0, 0, rows).Reshape({tokens, choices}),
      .weights = scratch.weights.Slice(0, 0, rows).Reshape({tokens, choices}),
      .groups = {.rows = scratch.groups.rows.Slice(0, 0, rows),
                 .offsets = scratch.groups.offsets.Slice(0, 0, experts + 1),
                 .notes = scratch.groups.notes.Slice(0, 0, NumGroupNotes(experts, rows))}};
  const Tensor gate_up = scratch.expert_gate_up.Slice(0, 0, rows);
  const LinearInput activated = scratch.expert_activated.Part(rows, width).For(down_proj_);
  const Tensor expert_out = scratch.expert_out.Slice(0, 0, rows);

  // The choice is made in F32 and is the same on every rank.
  ops.Route(x.plain.values, gate_, e_score_correction_bias_, routing_,
            static_cast<int>(layout_.experts().begin), routes);
  // Rows sorted by expert go through this rank's experts, and back to their tokens.
  gate_up_proj_.Multiply(x, routes.groups, choices, ops, gate_up);
  ops.DownAndCombine(gate_up, routes, down_proj_, accumulate, {activated, expert_out}, out);
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
  if (experts_.has_value()) {
    experts_->AddWeights(loader);
    if (experts_->has_shared_experts()) mlp_.reset();
  }
  if (mlp_.has_value()) mlp_->AddWeights(loader);
}

InputForms FeedForward::FormsOf(const LinearInputs& x) const {
  InputForms forms;
  if (mlp_.has_value()) forms = forms | mlp_->FormsOf(x);
  if (experts_.has_value()) forms = forms | experts_->FormsOf(x);
  return forms;
}

void FeedForward::Forward(const LinearInputs& x, const FeedForwardScratch& scratch, Ops& ops,
                          const Tensor& out) const {
  if (mlp_.has_value()) mlp_->Forward(x, scratch, ops, out);
  if (experts_.has_value()) {
    experts_->Forward(x, scratch, ops, /*accumulate=*/mlp_.has_value(), out);
  }
}

}  // namespace fathom
