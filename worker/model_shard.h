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
#include "worker/weight_source.h"

namespace fathom {

struct ModelShardOptions {
  DType dtype = DType::kF32;  // of activations: kF32 or kBF16
  Quantization quantization =
      Quantization::kNone;  // kFp8: quantise a BF16 or F32 checkpoint on loading
  // Linear layers with F8_E4M3 weights read their inputs in 1×128 (LinearInput in ops.h).
  bool quantize_activations = false;
  int max_tokens_per_step = 2048;
  int max_logit_rows = 2048;  // most rows of logits a step may want
  int max_sequences = 256;    // most sequences of a step
  int max_model_len = 0;      // positions that can occur; 0: max_position_embeddings
  // Of the caches that Forward will get.
  DType kv_cache_dtype = DType::kF32;
  int block_size = 16;
};

class ModelShard {
 public:
  // Whether config.json and the checkpoint tell of the same model, as far as no single shard can
  // see: InvalidArgument for a layer past the last, and for FP8 announced but nowhere stored.
  static absl::Status CheckAgreement(const ModelConfig& config, const Checkpoint& checkpoint);

  // What a shard will occupy, exactly; nothing is read but the checkpoint's headers.
  struct Footprint {
    int64_t weight_bytes = 0;
    int64_t activation_bytes = 0;  // scratch, rotary table, logits and a step's vectors
  };
  // Errors are Load's, without reading and allocating. Thread-safe.
  static absl::StatusOr<Footprint> Plan(const ModelShardOptions& options, const ModelConfig& config,
                                        const ShardLayout& layout, WeightSource& source,
                                        Device& device);

  // Reads this rank's slices. NotFound or InvalidArgument name file and tensor, or the option that
  // is out of range; ResourceExhausted when the device is full.
  // `device` must outlive the shard; `source` need not. RandomWeights need no more than `config`.
  static absl::StatusOr<std::unique_ptr<ModelShard>> Load(const ModelShardOptions& options,
                                                          const ModelConfig& config,
                                                          const ShardLayout& layout,
                                                          WeightSource& source, Device& device,
                                                          const LoadProgress& progress);
  virtual ~ModelShard() = default;

  // Runs the layers over a step's tokens, writes their latents into `kv_cache`, and gives the
  // logits of batch.logit_rows. An error is the communicator's. Every rank gets the same batch.
  // A step that only decodes is recorded on a device that can (StepRecordings).
  //   REQUIRES: 1 to max_tokens_per_step tokens, at most max_logit_rows logit rows
  //   logits [L, vocab_size] f32 in device memory, valid until the next call; absent on ranks other
  //   than 0, and when no logits are wanted. One rank of several that computes alone, with a lonely
  //   communicator, to be measured: [L, its part of vocab_size]
  virtual absl::StatusOr<Tensor> Forward(const StepBatch& batch, KvCache& kv_cache,
                                         Communicator& communicator) = 0;

  // Before the communicator of the last steps ends: recordings of them hold on to it, and NCCL's
  // wait for each other's end.
  virtual void ForgetRecordings() {}
};

}  // namespace fathom
