#include "worker/shard_layout.h"

#include <numeric>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

// What every rank gets an equal part of, by its name in config.json.
std::vector<std::pair<const char*, int>> SplitCounts(const ShardLayoutOptions& options,
                                                     const ModelConfig& config) {
  std::vector<std::pair<const char*, int>> counts = {
      {"num_attention_heads", config.num_attention_heads}, {"vocab_size", config.vocab_size}};
  if (config.HasDenseLayer()) counts.emplace_back("intermediate_size", config.intermediate_size);
  if (!config.HasMoeLayer()) return counts;
  counts.emplace_back("n_shared_experts * moe_intermediate_size",
                      config.n_shared_experts * config.moe_intermediate_size);
  if (options.enable_expert_parallel) {
    counts.emplace_back("n_routed_experts", config.n_routed_experts);
  } else {
    counts.emplace_back("moe_intermediate_size", config.moe_intermediate_size);
  }
  return counts;
}

// InvalidArgument names the first count that cannot be split and the world sizes that could.
absl::Status CheckSplits(const ShardLayoutOptions& options, const ModelConfig& config) {
  const std::vector<std::pair<const char*, int>> counts = SplitCounts(options, config);
  for (const auto& [name, count] : counts) {
    if (count % options.world_size == 0) continue;
    int common = 0;
    for (const auto& other : counts) common = std::gcd(common, other.second);
    std::vector<int> choices;
    for (int size = 1; size <= common; ++size) {
      if (common % size == 0) choices.push_back(size);
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "world size ", options.world_size, " does not divide ", name, " ", count,
        ": --tensor-parallel-size can be ", absl::StrJoin(choices, ", "), " for this model"));
  }
  return absl::OkStatus();
}

// This rank's equal part of [0, count).
Range PartOf(const ShardLayoutOptions& options, int count) {
  const int64_t size = count / options.world_size;
  return {.begin = options.rank * size, .end = (options.rank + 1) * size};
}

}  // namespace

absl::StatusOr<ShardLayout> ShardLayout::Create(const ShardLayoutOptions& options,
                                                const ModelConfig& config) {
  if (options.world_size < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("world size is ", options.world_size, ", expected at least 1"));
  }
  if (options.rank < 0 || options.rank >= options.world_size) {
    return absl::InvalidArgumentError(absl::StrCat("rank is ", options.rank, ", expected 0 to ",
                                                   options.world_size - 1, " in a world of ",
                                                   options.world_size));
  }
  RETURN_IF_ERROR(CheckSplits(options, config));
  ShardLayout layout;
  layout.options_ = options;
  layout.heads_ = PartOf(options, config.num_attention_heads);
  layout.vocabulary_ = PartOf(options, config.vocab_size);
  if (config.HasDenseLayer()) layout.intermediate_ = PartOf(options, config.intermediate_size);
  if (!config.HasMoeLayer()) return layout;

  layout.shared_intermediate_ =
      PartOf(options, config.n_shared_experts * config.moe_intermediate_size);
  layout.experts_ = {.begin = 0, .end = config.n_routed_experts};
  layout.expert_intermediate_ = {.begin = 0, .end = config.moe_intermediate_size};
  if (options.enable_expert_parallel) {
    layout.experts_ = PartOf(options, config.n_routed_experts);
  } else {
    layout.expert_intermediate_ = PartOf(options, config.moe_intermediate_size);
  }
  return layout;
}

}  // namespace fathom
