#include "worker/shard_keeper.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"
#include "worker/device_sampler.h"
#include "worker/step_runner.h"

namespace fathom {

absl::StatusOr<std::unique_ptr<ShardKeeper>> ShardKeeper::Open(const ShardKeeperOptions& options,
                                                               std::unique_ptr<Device> device) {
  ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(options.model_directory));
  std::unique_ptr<ShardKeeper> keeper(
      new ShardKeeper(options, std::move(config), std::move(device)));
  RETURN_IF_ERROR(keeper->OpenSource());
  if (options.activation_quantization == ActivationQuantization::kFp8 && !keeper->HasFp8Weights()) {
    return absl::InvalidArgumentError(
        "--activation-quantization is fp8, expected none: the weights are not FP8, neither in the "
        "checkpoint nor by --quantization fp8");
  }
  return keeper;
}

absl::Status ShardKeeper::OpenSource() {
  if (options_.load_format == LoadFormat::kDummy) {
    ASSIGN_OR_RETURN(checkpoint_, Checkpoint::WithoutTensors(options_.model_directory));
    source_ = std::make_unique<RandomWeights>();
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(options_.model_directory));
  RETURN_IF_ERROR(ModelShard::CheckAgreement(config_, *checkpoint_));
  source_ = std::make_unique<CheckpointWeights>(*checkpoint_);
  return absl::OkStatus();
}

bool ShardKeeper::HasFp8Weights() const {
  return config_.fp8_weights || options_.quantization == Quantization::kFp8;
}

bool ShardKeeper::QuantizesActivations() const {
  if (options_.activation_quantization != ActivationQuantization::kAuto) {
    return options_.activation_quantization == ActivationQuantization::kFp8;
  }
  // On a GPU the arithmetic of F8_E4M3 is what makes it fast; a CPU has none.
  return HasFp8Weights() && !device_->shares_host_memory();
}

void ShardKeeper::Describe(v1::DescribeResponse& response) const {
  response.set_model_fingerprint(checkpoint_->fingerprint());
  response.set_architecture(config_.architecture);
  response.set_vocab_size(config_.vocab_size);
  response.set_max_position_embeddings(config_.max_position_embeddings);
  for (const int id : config_.eos_token_ids) response.add_eos_token_ids(id);
  response.set_device(device_->name());
  response.set_dtype(FlagNameOf(options_.dtype));
  response.set_kv_cache_dtype(FlagNameOf(options_.kv_cache_dtype));
  response.set_quantization(HasFp8Weights() ? "fp8" : "none");
  response.set_activation_quantization(QuantizesActivations() ? "fp8" : "none");
}

absl::StatusOr<ShardLayout> ShardKeeper::Layout(const v1::ShardSpec& spec) const {
  return ShardLayout::Create({.rank = static_cast<int>(spec.rank()),
                              .world_size = static_cast<int>(spec.world_size()),
                              .enable_expert_parallel = spec.enable_expert_parallel()},
                             config_);
}

ModelShardOptions ShardKeeper::ShardOptions(const v1::ShardSpec& spec) const {
  return {.dtype = options_.dtype,
          .quantization = options_.quantization,
          .quantize_activations = QuantizesActivations(),
          .max_tokens_per_step = static_cast<int>(spec.max_tokens_per_step()),
          .max_logit_rows = static_cast<int>(spec.max_logit_rows()),
          .max_sequences = static_cast<int>(spec.max_sequences()),
          .max_model_len = static_cast<int>(spec.max_model_len()),
          .kv_cache_dtype = options_.kv_cache_dtype,
          .block_size = static_cast<int>(spec.block_size())};
}

absl::StatusOr<WorkerMemoryPlan> ShardKeeper::Plan(const v1::ShardSpec& spec) const {
  RETURN_IF_ERROR(CheckShardSpec(spec));
  ASSIGN_OR_RETURN(const ShardLayout layout, Layout(spec));
  ASSIGN_OR_RETURN(const ModelShard::Footprint footprint,
                   ModelShard::Plan(ShardOptions(spec), config_, layout, *source_, *device_));
  const KvCacheOptions kv_cache = {.dtype = options_.kv_cache_dtype,
                                   .block_size = static_cast<int>(spec.block_size())};
  const uint32_t sharing = device_->shares_host_memory() ? spec.workers_on_this_host() : 1;
  return PlanWorkerMemory(options_.memory,
                          {.host_bytes = options_.host_bytes,
                           .available_bytes = options_.available_bytes,
                           .workers_on_this_host = static_cast<int>(sharing),
                           .weight_bytes = footprint.weight_bytes,
                           .activation_bytes = footprint.activation_bytes,
                           .kv_block_bytes = KvCache::BlockBytes(kv_cache, config_),
                           .block_size = kv_cache.block_size,
                           .max_model_len = static_cast<int>(spec.max_model_len()),
                           .max_position_embeddings = config_.max_position_embeddings});
}

absl::StatusOr<ModelShard*> ShardKeeper::Load(const v1::ShardSpec& spec,
                                              const LoadProgress& progress) {
  RETURN_IF_ERROR(CheckShardSpec(spec));
  const ModelShardOptions options = ShardOptions(spec);
  const LoadedShard wanted = {.rank = static_cast<int>(spec.rank()),
                              .world_size = static_cast<int>(spec.world_size()),
                              .enable_expert_parallel = spec.enable_expert_parallel(),
                              .max_tokens_per_step = options.max_tokens_per_step,
                              .max_logit_rows = options.max_logit_rows,
                              .max_sequences = options.max_sequences,
                              .max_model_len = options.max_model_len,
                              .block_size = options.block_size};
  if (loaded_ == wanted) return shard_.get();

  // The old one goes first: there may be no room for both.
  loaded_.reset();
  shard_.reset();
  ASSIGN_OR_RETURN(const ShardLayout layout, Layout(spec));
  ASSIGN_OR_RETURN(shard_,
                   ModelShard::Load(options, config_, layout, *source_, *device_, progress));
  loaded_ = wanted;
  return shard_.get();
}

absl::StatusOr<std::unique_ptr<KvCache>> ShardKeeper::CreateKvCache(int block_size,
                                                                    int num_kv_blocks) {
  return KvCache::Create(
      {.dtype = options_.kv_cache_dtype, .block_size = block_size, .num_blocks = num_kv_blocks},
      config_, *device_);
}

GrammarKeeper* ShardKeeper::Grammars(int rank) {
  if (rank != 0 || options_.grammar_program.empty()) return nullptr;
  absl::MutexLock lock(&mutex_);
  if (grammars_ == nullptr) {
    grammars_ = std::make_unique<GrammarKeeper>(
        GrammarKeeperOptions{.program = options_.grammar_program,
                             .model_directory = options_.model_directory,
                             .vocab_size = config_.vocab_size,
                             .eos_token_ids = config_.eos_token_ids});
    grammars_->Start();
  }
  return grammars_.get();
}

absl::Status ShardKeeper::PrepareGrammar(const Grammar& grammar) {
  GrammarKeeper* grammars;
  {
    absl::MutexLock lock(&mutex_);
    grammars = grammars_.get();
  }
  if (grammars == nullptr) {
    return absl::FailedPreconditionError("only rank 0 has grammars, once it has joined");
  }
  return grammars->Prepare(grammar);
}

absl::StatusOr<std::shared_ptr<StepMaker>> ShardKeeper::Join(const ShardJoin& join) {
  const v1::ShardSpec& spec = join.shard;
  ASSIGN_OR_RETURN(ModelShard * model, Load(spec, join.on_loading));
  join.on_loaded();
  ASSIGN_OR_RETURN(std::unique_ptr<KvCache> kv_cache,
                   CreateKvCache(static_cast<int>(spec.block_size()), join.num_kv_blocks));
  const SlotTableOptions slots = SlotLimitsOf(spec, config_, join.num_kv_blocks);
  ASSIGN_OR_RETURN(std::unique_ptr<DeviceSampler> device_sampler,
                   DeviceSampler::Create(*device_, slots.max_sequences));
  ASSIGN_OR_RETURN(std::unique_ptr<Communicator> communicator, join.connect(*device_));
  return std::make_shared<StepRunner>(join.epoch, slots, *model, std::move(kv_cache),
                                      std::move(communicator), std::move(device_sampler),
                                      Grammars(static_cast<int>(spec.rank())));
}

std::string FlagNameOf(DType dtype) {
  CHECK(dtype != DType::kI32);
  if (dtype == DType::kF8E4M3) return "fp8";
  return dtype == DType::kF32 ? "float32" : "bfloat16";
}

}  // namespace fathom
