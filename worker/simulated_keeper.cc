#include "worker/simulated_keeper.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"
#include "worker/safetensors.h"
#include "worker/simulated_runner.h"

namespace fathom {
namespace {

constexpr int64_t kMaxProfileBytes = 1'000'000;

}  // namespace

absl::StatusOr<std::unique_ptr<SimulatedKeeper>> SimulatedKeeper::Open(
    const SimulatedKeeperOptions& options) {
  ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(options.model_directory));
  if (static_cast<int>(config.eos_token_ids.size()) >= config.vocab_size) {
    return absl::InvalidArgumentError("config.json: every token ends a sequence");
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> folder,
                   Checkpoint::WithoutTensors(options.model_directory));
  const auto refuse = [](const absl::Status& reason) {
    return absl::Status(reason.code(), absl::StrCat("--sim-profile ", reason.message()));
  };
  const absl::StatusOr<std::string> json = ReadTextFile(options.profile_file, kMaxProfileBytes);
  if (!json.ok()) return refuse(json.status());
  const absl::StatusOr<SimProfile> profile = ParseSimProfile(*json);
  if (!profile.ok()) {
    return refuse(absl::InvalidArgumentError(
        absl::StrCat(options.profile_file, ": ", profile.status().message())));
  }
  std::string fingerprint = absl::StrCat(folder->fingerprint(), " simulated ",
                                         absl::Hex(XXH3_64bits(json->data(), json->size())));
  return std::unique_ptr<SimulatedKeeper>(
      new SimulatedKeeper(std::move(config), *profile, std::move(fingerprint)));
}

void SimulatedKeeper::Describe(v1::DescribeResponse& response) const {
  response.set_model_fingerprint(fingerprint_);
  response.set_architecture(config_.architecture);
  response.set_vocab_size(config_.vocab_size);
  response.set_max_position_embeddings(config_.max_position_embeddings);
  for (const int id : config_.eos_token_ids) response.add_eos_token_ids(id);
  response.set_device("sim");
  response.set_dtype("simulated");
  response.set_kv_cache_dtype("simulated");
  response.set_quantization("none");
  response.set_activation_quantization("none");
}

absl::StatusOr<WorkerMemoryPlan> SimulatedKeeper::Plan(const v1::ShardSpec& spec) const {
  RETURN_IF_ERROR(CheckShardSpec(spec));
  const int64_t capacity = profile_.kv_cache_tokens / spec.block_size();
  const int64_t kv_tokens = capacity * spec.block_size();
  if (capacity < 1 || spec.max_model_len() > kv_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "kv_cache_tokens of the profile is ", profile_.kv_cache_tokens, ", expected at least ",
        std::max(spec.block_size(), spec.max_model_len()), ": --block-size is ", spec.block_size(),
        ", --max-model-len ", spec.max_model_len()));
  }
  const int64_t model_limit = config_.max_position_embeddings;
  if (spec.max_model_len() > model_limit) {
    return absl::InvalidArgumentError(absl::StrCat("--max-model-len is ", spec.max_model_len(),
                                                   ", but max_position_embeddings of the model is ",
                                                   model_limit));
  }
  WorkerMemoryPlan plan;
  plan.kv_block_capacity = static_cast<int>(capacity);
  plan.max_model_len = static_cast<int>(
      spec.max_model_len() > 0 ? int64_t{spec.max_model_len()} : std::min(model_limit, kv_tokens));
  return plan;
}

absl::Status SimulatedKeeper::PrepareGrammar(const Grammar&) {
  return absl::InvalidArgumentError("simulated workers write nothing that could obey a grammar");
}

absl::StatusOr<std::shared_ptr<StepMaker>> SimulatedKeeper::Join(const ShardJoin& join) {
  RETURN_IF_ERROR(join.await_others());
  return std::make_shared<SimulatedRunner>(
      SimulatedRunnerOptions{.epoch = join.epoch,
                             .rank = static_cast<int>(join.shard.rank()),
                             .slots = SlotLimitsOf(join.shard, config_, join.num_kv_blocks),
                             .profile = profile_,
                             .eos_token_ids = config_.eos_token_ids});
}

}  // namespace fathom
