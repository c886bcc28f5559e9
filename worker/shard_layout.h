// Who owns which heads, experts, vocabulary rows and intermediate columns. Nobody else decides
// that.
//
// Every rank holds a contiguous, equal part of what is split. What is not named here (norms,
// router, the latent projections q_a_proj and kv_a_proj_with_mqa) is the same on every rank.
//
// A value; thread-compatible.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/model_config.h"

namespace fathom {

struct ShardLayoutOptions {
  int rank = 0;
  int world_size = 1;
  // Ranks own whole experts instead of a slice of each. Shared experts and dense layers stay
  // sliced.
  bool enable_expert_parallel = false;
};

// [begin, end)
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

class ShardLayout {
 public:
  // InvalidArgument when the world size does not divide what must be split; names it, with numbers.
  static absl::StatusOr<ShardLayout> Create(const ShardLayoutOptions& options,
                                            const ModelConfig& config);

  int rank() const { return options_.rank; }
  int world_size() const { return options_.world_size; }
  bool enable_expert_parallel() const { return options_.enable_expert_parallel; }

  Range heads() const { return heads_; }                // of num_attention_heads
  Range vocabulary() const { return vocabulary_; }      // rows of embed_tokens and lm_head
  Range intermediate() const { return intermediate_; }  // dense layers
  Range shared_intermediate() const { return shared_intermediate_; }  // all shared experts as one
  Range experts() const { return experts_; }  // routed experts this rank has something of
  Range expert_intermediate() const { return expert_intermediate_; }  // what it has of each

 private:
  ShardLayout() = default;

  ShardLayoutOptions options_;
  Range heads_;
  Range vocabulary_;
  Range intermediate_;
  Range shared_intermediate_;
  Range experts_;
  Range expert_intermediate_;
};

}  // namespace fathom
