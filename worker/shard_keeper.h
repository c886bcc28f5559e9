// A model folder and this worker's shard of it, which outlives the groups that the worker joins:
// weights are loaded again only when another shard is asked for.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "grammar/grammar_keeper.h"
#include "kernels/device.h"
#include "worker/kv_cache.h"
#include "worker/memory_plan.h"
#include "worker/model_config.h"
#include "worker/model_shard.h"
#include "worker/safetensors.h"
#include "worker/shard_host.h"
#include "worker/weight_source.h"

namespace fathom {

// Whether linear layers with F8_E4M3 weights read F8_E4M3 activations.
enum class ActivationQuantization {
  kAuto,  // on a device whose memory is its own, if linear layers have such weights
  kNone,
  kFp8,
};

enum class LoadFormat {
  kAuto,   // *.safetensors of the folder
  kDummy,  // random numbers (RandomWeights): the folder needs no more than config.json
};

struct ShardKeeperOptions {
  std::string model_directory;
  DType dtype = DType::kF32;           // of activations
  DType kv_cache_dtype = DType::kF32;  // kF32, kBF16 or kF8E4M3
  Quantization quantization = Quantization::kNone;
  ActivationQuantization activation_quantization = ActivationQuantization::kNone;
  LoadFormat load_format = LoadFormat::kAuto;
  MemoryPlanOptions memory = {};
  // Memory that the workers of this host share; with a GPU, all of its memory, and how much of it
  // was free when the worker started.
  int64_t host_bytes = 0;
  int64_t available_bytes = 0;
  std::string grammar_program = {};  // fathom-grammar; empty: nobody may ask for a grammar
};

// What loading decided on, by value, so that it can be compared.
struct LoadedShard {
  int rank = 0;
  int world_size = 1;
  bool enable_expert_parallel = false;
  int max_tokens_per_step = 0;
  int max_logit_rows = 0;
  int max_sequences = 0;
  int max_model_len = 0;  // as asked for; 0: the model's own
  int block_size = 0;
  bool operator==(const LoadedShard&) const = default;
};

class ShardKeeper final : public ShardHost {
 public:
  // Reads config.json and the checkpoint's headers. Errors as of ReadModelConfig,
  // Checkpoint::Open and ModelShard::CheckAgreement; InvalidArgument for F8_E4M3 activations
  // without such weights.
  static absl::StatusOr<std::unique_ptr<ShardKeeper>> Open(const ShardKeeperOptions& options,
                                                           std::unique_ptr<Device> device);

  // Thread-safe from here on.
  const ModelConfig& config() const { return config_; }
  void Describe(v1::DescribeResponse& response) const override;
  // Errors of ModelShard::Plan besides those of every ShardHost.
  absl::StatusOr<WorkerMemoryPlan> Plan(const v1::ShardSpec& spec) const override;

  // Not thread-safe: one Join at a time.
  // The shard, loaded now unless it is there already. It stays until another one is loaded.
  absl::StatusOr<ModelShard*> Load(const v1::ShardSpec& spec, const LoadProgress& progress);
  absl::StatusOr<std::unique_ptr<KvCache>> CreateKvCache(int block_size, int num_kv_blocks);
  // Loads, allocates, waits for the others, connects.
  absl::Status PrepareGrammar(const Grammar& grammar) override;
  absl::StatusOr<std::shared_ptr<StepMaker>> Join(const ShardJoin& join) override;

 private:
  ShardKeeper(const ShardKeeperOptions& options, ModelConfig config, std::unique_ptr<Device> device)
      : options_(options), config_(std::move(config)), device_(std::move(device)) {}

  // Finds the weights.
  absl::Status OpenSource();
  // Rank 0's, made once. It outlives everything that Join gave.
  GrammarKeeper* Grammars(int rank);
  bool HasFp8Weights() const;
  bool QuantizesActivations() const;
  ModelShardOptions ShardOptions(const v1::ShardSpec& spec) const;
  absl::StatusOr<ShardLayout> Layout(const v1::ShardSpec& spec) const;

  const ShardKeeperOptions options_;
  const ModelConfig config_;
  const std::unique_ptr<Device> device_;
  std::unique_ptr<Checkpoint> checkpoint_;  // without tensors with kDummy
  std::unique_ptr<WeightSource> source_;

  absl::Mutex mutex_;
  std::unique_ptr<GrammarKeeper> grammars_ ABSL_GUARDED_BY(mutex_);

  std::optional<LoadedShard> loaded_;
  std::unique_ptr<ModelShard> shard_;
};

// As in flags and in DescribeResponse: float32, bfloat16, fp8.
std::string FlagNameOf(DType dtype);

}  // namespace fathom
