// This rank's part of the model: weights, and the forward pass that reads like the paper.
//
// Source: DeepSeek-V3 report §2.1; deepseek-ai/DeepSeek-V3 inference/model.py.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "worker/communicator.h"
#include "worker/kv_cache.h"
#include "worker/model_config.h"
#include "worker/safetensors.h"
#include "worker/shard_layout.h"
#include "worker/step_batch.h"

namespace fathom {

enum class Quantization { kNone, kFp8 };

struct ModelShardOptions {
  DType dtype = DType::kF32;  // of activations: kF32 or kBF16
  Quantization quantization =
      Quantization::kNone;  // kFp8: quantise a BF16 or F32 checkpoint on loading
  int max_tokens_per_step = 2048;
  int max_logit_rows = 2048;  // most rows of logits a step may want
  int max_model_len = 0;      // positions that can occur
};

// Bytes of the checkpoint read so far, of how many. Called from the loading thread, often.
using LoadProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;

class ModelShard {
 public:
  // What a shard will occupy; nothing is read but the checkpoint's headers.
  struct Footprint {
    int64_t weight_bytes = 0;
    int64_t activation_bytes = 0;
  };
  static absl::StatusOr<Footprint> Plan(const ModelShardOptions& options, const ModelConfig& config,
                                        const ShardLayout& layout, const Checkpoint& checkpoint);

  // Reads this rank's slices. NotFound or InvalidArgument name file and tensor.
  // `device` must outlive the shard.
  static absl::StatusOr<std::unique_ptr<ModelShard>> Load(const ModelShardOptions& options,
                                                          const ModelConfig& config,
                                                          const ShardLayout& layout,
                                                          const Checkpoint& checkpoint,
                                                          Device& device, LoadProgress progress);
  virtual ~ModelShard() = default;

  // Runs the layers over a step's tokens, writes their latents into `kv_cache`, and gives the
  // logits of batch.logit_rows. An error is the communicator's.
  //   logits [L, vocab_size] f32 in host memory, valid until the next call; absent on ranks other
  //   than 0
  virtual absl::StatusOr<Tensor> Forward(const StepBatch& batch, KvCache& kv_cache,
                                         Communicator& communicator) = 0;
};

}  // namespace fathom
