// This rank's part of the model: weights, and the forward pass that reads like the paper.
//
// Source: DeepSeek-V3 report §2.1; deepseek-ai/DeepSeek-V3 inference/model.py.
// Not thread-safe.
#pragma once

#include <cstdint>
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
#include "worker/weight_loader.h"

namespace fathom {

struct ModelShardOptions {
  DType dtype = DType::kF32;  // of activations: kF32 or kBF16
  Quantization quantization =
      Quantization::kNone;  // kFp8: quantise a BF16 or F32 checkpoint on loading
  int max_tokens_per_step = 2048;
  int max_logit_rows = 2048;  // most rows of logits a step may want
  int max_model_len = 0;      // positions that can occur; 0: max_position_embeddings
};

class ModelShard {
 public:
  // Whether config.json and the checkpoint tell of the same model, as far as no single shard can
  // see: InvalidArgument for a layer past the last, and for FP8 announced but nowhere stored.
  static absl::Status CheckAgreement(const ModelConfig& config, const Checkpoint& checkpoint);

  // What a shard will occupy, exactly; nothing is read but the checkpoint's headers.
  struct Footprint {
    int64_t weight_bytes = 0;
    int64_t activation_bytes = 0;  // scratch, rotary table and logits
  };
  // Errors are Load's, without reading and allocating.
  static absl::StatusOr<Footprint> Plan(const ModelShardOptions& options, const ModelConfig& config,
                                        const ShardLayout& layout, const Checkpoint& checkpoint);

  // Reads this rank's slices. NotFound or InvalidArgument name file and tensor, or the option that
  // is out of range; ResourceExhausted when the device is full.
  // `device` must outlive the shard; `checkpoint` need not.
  static absl::StatusOr<std::unique_ptr<ModelShard>> Load(const ModelShardOptions& options,
                                                          const ModelConfig& config,
                                                          const ShardLayout& layout,
                                                          const Checkpoint& checkpoint,
                                                          Device& device, LoadProgress progress);
  virtual ~ModelShard() = default;

  // Runs the layers over a step's tokens, writes their latents into `kv_cache`, and gives the
  // logits of batch.logit_rows. An error is the communicator's. Every rank gets the same batch.
  //   REQUIRES: 1 to max_tokens_per_step tokens, at most max_logit_rows logit rows
  //   logits [L, vocab_size] f32 in host memory, valid until the next call; absent on ranks other
  //   than 0, and when no logits are wanted
  virtual absl::StatusOr<Tensor> Forward(const StepBatch& batch, KvCache& kv_cache,
                                         Communicator& communicator) = 0;
};

}  // namespace fathom
