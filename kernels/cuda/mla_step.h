// How the operations drive the attention kernels that want the shape of DeepSeek-V3: arguments made
// of tensors, and the state of a step that its layers share.
//
// A step on Hopper: sequences with one token are rows of MlaDecodeSm90, longer ones are
// MlaPrefillSm90's. Not thread-safe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "kernels/cuda/mla_decode_sm90.h"
#include "kernels/cuda/mla_prefill_sm90.h"
#include "kernels/cuda/mla_projections.h"
#include "kernels/cuda/scratch.h"
#include "kernels/ops.h"

namespace fathom::cuda {

// Whether mla_projections.h has kernels for these: both weights, and what queries need beside them.
bool HasProjections(const MlaWeights& weights);
bool HasProjections(const Tensor& q, const MlaWeights& weights, const Tensor& cos_sin,
                    int64_t rope_dim);

// Arguments as in Ops::MlaAttention; q_latent, latent [T, A, R], q_rope [T, A, P].
Absorption AbsorptionOf(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                        const Tensor& cos_sin, const Tensor& q_latent, const Tensor& q_rope);
ValueProjection ProjectionOf(const Tensor& latent, const MlaWeights& weights,
                             const LinearInput& out);

// What the layers of a step share on Hopper.
class MlaStep {
 public:
  explicit MlaStep(const cudaDeviceProp& device) : device_(device) {}

  // Device memory for steps within `limits`; see Ops::ScratchBytes.
  int64_t ScratchBytes(const StepLimits& limits) const;
  void UseScratch(const StepLimits& limits, void* memory);

  // Divides the work of a step, if these kernels could ever take it.
  void Begin(const AttentionBatch& batch, cudaStream_t stream);

  // Sequences of one token, and whether there are others.
  int num_rows() const { return num_rows_; }
  bool has_prefill() const { return has_prefill_; }
  // [num_rows] which token of the step a row is; null if every token is one, in order.
  const int* tokens() const { return has_prefill_ ? tokens_ : nullptr; }

  // The next layer; its number.
  int TakeLayer(const AttentionBatch& batch, cudaStream_t stream);
  const MlaDecodeSm90& decode() const { return *decode_; }
  const MlaPrefillSm90& prefill() const { return *prefill_; }
  const MlaPrefillSm90::Step& prefill_step() const { return prefill_step_; }

 private:
  MlaPrefillSm90::Limits PrefillLimits(int64_t max_tokens, int64_t max_context_tokens) const;
  void MakeDecode(void* workspace, int num_layers);
  void ScheduleRows(const AttentionBatch& batch, cudaStream_t stream);
  void SchedulePrefill(const AttentionBatch& batch, cudaStream_t stream);

  const cudaDeviceProp device_;
  GrowingMemory decode_memory_, prefill_memory_, row_memory_;  // where UseScratch gave none
  int num_layers_ = 0;
  std::optional<MlaDecodeSm90> decode_;
  std::optional<MlaPrefillSm90> prefill_;
  MlaPrefillSm90::Limits prefill_limits_;
  int* row_numbers_ = nullptr;  // [3][kMaxRows]: context lengths, sequences, tokens

  int num_rows_ = 0;
  bool has_prefill_ = false;
  const int* tokens_ = nullptr;
  int layer_ = 0;
  MlaPrefillSm90::Step prefill_step_;
};

}  // namespace fathom::cuda
