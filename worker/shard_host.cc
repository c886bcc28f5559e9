#include "worker/shard_host.h"

#include <array>
#include <cstdint>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"

namespace fathom {
namespace {

constexpr std::array<uint32_t, 5> kBlockSizes = {1, 16, 32, 64, 128};

absl::Status CheckRange(const char* field, uint32_t value, uint32_t low, uint32_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is ", value, ", expected ", low, " to ", high));
}

}  // namespace

absl::Status CheckStepOrder(const v1::StepCommand& command, uint64_t epoch, uint64_t last_step) {
  if (command.epoch() != epoch) {
    return absl::FailedPreconditionError(absl::StrCat("the command is of epoch ", command.epoch(),
                                                      ", this worker is in epoch ", epoch));
  }
  if (command.step() == last_step + 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("step ", command.step(), " came after step ", last_step));
}

absl::Status CheckShardSpec(const v1::ShardSpec& spec) {
  constexpr uint32_t kMillion = 1 << 20;
  RETURN_IF_ERROR(CheckRange("world_size", spec.world_size(), 1, 1024));
  RETURN_IF_ERROR(CheckRange("rank", spec.rank(), 0, spec.world_size() - 1));
  RETURN_IF_ERROR(CheckRange("max_tokens_per_step", spec.max_tokens_per_step(), 1, kMillion));
  RETURN_IF_ERROR(CheckRange("max_sequences", spec.max_sequences(), 1, kMillion));
  RETURN_IF_ERROR(CheckRange("max_logit_rows", spec.max_logit_rows(), 1, 2 * kMillion));
  RETURN_IF_ERROR(CheckRange("max_model_len", spec.max_model_len(), 0, INT32_MAX));
  RETURN_IF_ERROR(CheckRange("workers_on_this_host", spec.workers_on_this_host(), 1, 1024));
  if (absl::c_linear_search(kBlockSizes, spec.block_size())) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("block_size is ", spec.block_size(), ", expected 1, 16, 32, 64 or 128"));
}

SlotTableOptions SlotLimitsOf(const v1::ShardSpec& spec, const ModelConfig& config,
                              int num_kv_blocks) {
  return {.vocab_size = config.vocab_size,
          .max_sequences = static_cast<int>(spec.max_sequences()),
          .max_model_len = spec.max_model_len() > 0 ? static_cast<int>(spec.max_model_len())
                                                    : config.max_position_embeddings,
          .max_tokens_per_step = static_cast<int>(spec.max_tokens_per_step()),
          .max_logit_rows = static_cast<int>(spec.max_logit_rows()),
          .block_size = static_cast<int>(spec.block_size()),
          .num_kv_blocks = num_kv_blocks};
}

}  // namespace fathom
