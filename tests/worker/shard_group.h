// All ranks of a model in one process, each with its own device, weights and KV cache; a test says
// which tokens of which sequences to compute and gets rank 0's logits.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/device.h"
#include "tests/worker/distant_device.h"
#include "tests/worker/recording_device.h"
#include "tests/worker/thread_communicator.h"
#include "worker/kv_cache.h"
#include "worker/model_config.h"
#include "worker/model_shard.h"
#include "worker/safetensors.h"
#include "worker/shard_layout.h"
#include "worker/staged_communicator.h"
#include "worker/step_batch.h"
#include "worker/weight_source.h"

namespace fathom {

enum class DeviceKind { kCpu, kDistantCpu, kRecordingCpu, kCuda };

inline absl::StatusOr<std::unique_ptr<Device>> OpenDevice(DeviceKind kind) {
  if (kind == DeviceKind::kDistantCpu) return std::make_unique<DistantDevice>();
  if (kind == DeviceKind::kRecordingCpu) return std::make_unique<RecordingDevice>();
  return kind == DeviceKind::kCuda ? OpenCudaDevice({}) : OpenCpuDevice({});
}

struct ShardGroupOptions {
  DeviceKind device = DeviceKind::kCpu;  // with kCuda all ranks share one GPU
  int world_size = 1;
  bool enable_expert_parallel = false;
  ModelShardOptions shard = {
      .max_tokens_per_step = 512, .max_logit_rows = 512, .max_model_len = 1024};
  KvCacheOptions kv_cache = {.block_size = 16, .num_blocks = 96};
};

// A sequence as the coordinator sees it.
struct TestSequence {
  std::vector<int32_t> tokens;
  std::vector<int32_t> blocks;  // as many as the tokens will need
  int num_computed = 0;
};

// One sequence's part of a step.
struct Scheduled {
  TestSequence* sequence;
  int num_tokens;
};

class ShardGroup {
 public:
  static absl::StatusOr<std::unique_ptr<ShardGroup>> Load(const std::string& directory,
                                                          const ShardGroupOptions& options) {
    std::unique_ptr<ShardGroup> group(new ShardGroup(options));
    ASSIGN_OR_RETURN(group->config_, ReadModelConfig(directory));
    ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(directory));
    RETURN_IF_ERROR(ModelShard::CheckAgreement(group->config_, *checkpoint));
    CheckpointWeights source(*checkpoint);
    ModelShardOptions shard_options = options.shard;
    shard_options.kv_cache_dtype = options.kv_cache.dtype;
    shard_options.block_size = options.kv_cache.block_size;
    for (int rank = 0; rank < options.world_size; ++rank) {
      ASSIGN_OR_RETURN(
          const ShardLayout layout,
          ShardLayout::Create({.rank = rank,
                               .world_size = options.world_size,
                               .enable_expert_parallel = options.enable_expert_parallel},
                              group->config_));
      Rank& one = group->ranks_.emplace_back();
      ASSIGN_OR_RETURN(one.device, OpenDevice(options.device));
      ASSIGN_OR_RETURN(one.shard, ModelShard::Load(shard_options, group->config_, layout, source,
                                                   *one.device, nullptr));
      ASSIGN_OR_RETURN(one.kv_cache,
                       KvCache::Create(options.kv_cache, group->config_, *one.device));
      if (options.world_size == 1) {
        one.communicator = MakeLonelyCommunicator();
        continue;
      }
      one.communicator = std::make_unique<ThreadCommunicator>(rank, group->meeting_);
      if (!one.device->shares_host_memory()) {
        one.communicator = MakeStagedCommunicator(*one.device, std::move(one.communicator));
      }
    }
    return group;
  }

  const ModelConfig& config() const { return config_; }
  const KvCache& kv_cache(int rank) const { return *ranks_[rank].kv_cache; }
  const Device& device(int rank) const { return *ranks_[rank].device; }

  enum class Want { kEveryToken, kLastToken };

  // Computes the next tokens of each sequence; logits row by row.
  std::vector<float> Step(const std::vector<Scheduled>& scheduled, Want want) {
    const StepBatch batch = Batch(scheduled, want);
    std::vector<float> logits;
    std::vector<std::thread> threads;
    for (Rank& one : ranks_) {
      threads.emplace_back([&] {
        const absl::StatusOr<Tensor> result =
            one.shard->Forward(batch, *one.kv_cache, *one.communicator);
        CHECK(result.ok()) << result.status();
        if (&one != &ranks_.front()) {
          CHECK(!result->present());
          return;
        }
        CHECK_EQ(result->dim(0), static_cast<int64_t>(batch.logit_rows.size()));
        CHECK_EQ(result->dim(1), config_.vocab_size);
        CHECK(result->dense());
        logits.resize(result->num_elements());
        one.device->CopyToHost(*result, logits.data());
      });
    }
    for (std::thread& thread : threads) thread.join();
    return logits;
  }

  // Logits of every token of a prompt, computed `chunk` tokens at a time.
  std::vector<float> Prompt(const std::vector<int32_t>& tokens, int chunk) {
    TestSequence sequence = NewSequence(tokens, /*first_block=*/0);
    std::vector<float> logits;
    while (sequence.num_computed < static_cast<int>(tokens.size())) {
      const int left = static_cast<int>(tokens.size()) - sequence.num_computed;
      const auto rows = Step({{&sequence, std::min(chunk, left)}}, Want::kEveryToken);
      logits.insert(logits.end(), rows.begin(), rows.end());
    }
    return logits;
  }

  // Greedy continuation through the cache.
  std::vector<int32_t> Greedy(const std::vector<int32_t>& tokens, int count) {
    TestSequence sequence = NewSequence(tokens, /*first_block=*/0);
    for (int i = 0; i < count; ++i) {
      const int pending = static_cast<int>(sequence.tokens.size()) - sequence.num_computed;
      const auto row = Step({{&sequence, pending}}, Want::kLastToken);
      sequence.tokens.push_back(
          static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin()));
    }
    return {sequence.tokens.begin() + static_cast<int64_t>(tokens.size()), sequence.tokens.end()};
  }

  // Its blocks run backwards from the end of the cache, so that place and position differ.
  TestSequence NewSequence(const std::vector<int32_t>& tokens, int first_block) const {
    constexpr int kRoomForMore = 40;
    TestSequence sequence{.tokens = tokens, .blocks = {}};
    const int num_blocks =
        (static_cast<int>(tokens.size()) + kRoomForMore) / options_.kv_cache.block_size + 1;
    for (int i = 0; i < num_blocks; ++i) {
      sequence.blocks.push_back(options_.kv_cache.num_blocks - 1 - first_block - i);
      CHECK_GE(sequence.blocks.back(), 0);
    }
    return sequence;
  }

 private:
  struct Rank {
    std::unique_ptr<Device> device;
    std::unique_ptr<ModelShard> shard;
    std::unique_ptr<KvCache> kv_cache;
    std::unique_ptr<Communicator> communicator;
  };

  explicit ShardGroup(const ShardGroupOptions& options)
      : options_(options), meeting_(options.world_size) {}

  StepBatch Batch(const std::vector<Scheduled>& scheduled, Want want) const {
    const int block_size = options_.kv_cache.block_size;
    StepBatch batch;
    batch.query_start = {0};
    batch.block_size = block_size;
    for (const auto& [sequence, num_tokens] : scheduled) {
      batch.max_blocks = std::max(batch.max_blocks, static_cast<int>(sequence->blocks.size()));
    }
    for (const auto& [sequence, num_tokens] : scheduled) {
      for (int i = 0; i < num_tokens; ++i) {
        const int position = sequence->num_computed + i;
        if (want == Want::kEveryToken || i == num_tokens - 1) {
          batch.logit_rows.push_back(batch.num_tokens());
        }
        batch.token_ids.push_back(sequence->tokens[position]);
        batch.positions.push_back(position);
        batch.places.push_back(sequence->blocks[position / block_size] * block_size +
                               position % block_size);
      }
      sequence->num_computed += num_tokens;
      batch.query_start.push_back(batch.num_tokens());
      batch.context_lens.push_back(sequence->num_computed);
      std::vector<int32_t> table = sequence->blocks;
      table.resize(batch.max_blocks);
      batch.block_tables.insert(batch.block_tables.end(), table.begin(), table.end());
    }
    return batch;
  }

  const ShardGroupOptions options_;
  ModelConfig config_;
  ThreadGroup meeting_;
  std::vector<Rank> ranks_;
};

}  // namespace fathom
