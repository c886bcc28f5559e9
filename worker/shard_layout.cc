#include "worker/shard_layout.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

// This rank's equal part of [0, count). `name` and `count` are the config's, for the message.
absl::Status Split(const ShardLayoutOptions& options, const char* name, int count, Range& part) {
  if (count % options.world_size != 0) {
    return absl::InvalidArgumentError(absl::StrCat("world size ", options.world_size,
                                                   " does not divide ", name, " ", count,
                                                   "; choose one that does"));
  }
  const int64_t size = count / options.world_size;
  part = {.begin = options.rank * size, .end = (options.rank + 1) * size};
  return absl::OkStatus();
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
  ShardLayout layout;
  layout.options_ = options;
  RETURN_IF_ERROR(Split(options, "num_attention_heads", config.num_attention_heads, layout.heads_));
  RETURN_IF_ERROR(Split(options, "vocab_size", config.vocab_size, layout.vocabulary_));
  if (config.HasDenseLayer()) {
    RETURN_IF_ERROR(
        Split(options, "intermediate_size", config.intermediate_size, layout.intermediate_));
  }
  if (!config.HasMoeLayer()) return layout;

  RETURN_IF_ERROR(Split(options, "n_shared_experts * moe_intermediate_size",
                        config.n_shared_experts * config.moe_intermediate_size,
                        layout.shared_intermediate_));
  layout.experts_ = {.begin = 0, .end = config.n_routed_experts};
  layout.expert_intermediate_ = {.begin = 0, .end = config.moe_intermediate_size};
  if (options.enable_expert_parallel) {
    RETURN_IF_ERROR(Split(options, "n_routed_experts", config.n_routed_experts, layout.experts_));
  } else {
    RETURN_IF_ERROR(Split(options, "moe_intermediate_size", config.moe_intermediate_size,
                          layout.expert_intermediate_));
  }
  return layout;
}

}  // namespace fathom
