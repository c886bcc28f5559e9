// The operations on a CUDA device. Each is implemented in the file of its family, cuda/<family>.cu.
//
// They are queued on one stream and complete in the order of the calls. Unlike the CPU's, the bits
// of a row may depend on the rows beside it (few rows take other kernels than many, and attention
// divides the work of a step among all multiprocessors); the same step gives the same bits always.
//
// Not thread-safe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "kernels/cuda/fp8_stream_sm90.h"
#include "kernels/cuda/fp8_tile_sm90.h"
#include "kernels/cuda/mla_step.h"
#include "kernels/cuda/scratch.h"
#include "kernels/ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

namespace cuda {

int64_t RouteSlotBytes(int num_multiprocessors);

}  // namespace cuda

class CudaOps final : public Ops {
 public:
  static constexpr int kMostChooseBlocks = 128;  // of Route, which sort rows together

  // `stream` must outlive this.
  CudaOps(const cudaDeviceProp& device, cudaStream_t stream);

  int64_t ScratchBytes(const StepLimits& limits) const override;
  void UseScratch(const StepLimits& limits, void* memory) override;

  void BeginStep(const AttentionBatch& batch) override;

  void Embed(const Tensor& token_ids, const Tensor& table, int first_row,
             const Tensor& out) override;
  void AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                  const Tensor& normed, const LinearInput& quantized) override;
  void Linear(const LinearInput& x, const Weight& weight, const Tensor& out) override;
  void StoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm, float eps,
                    const Tensor& positions, const Tensor& cos_sin, const Tensor& places,
                    const LinearInput& q_a, const Tensor& cache) override;
  void MlaAttention(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                    float scale, const LinearInput& out) override;
  void Route(const Tensor& x, const Tensor& gate, const Tensor& bias, const RoutingConfig& config,
             int first_expert, const Routes& routes) override;
  void GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                     int num_choices, const Tensor& out) override;
  void SwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out) override;
  void CombineExperts(const Tensor& y, const Routes& routes, bool accumulate,
                      const Tensor& out) override;
  void DownAndCombine(const Tensor& gate_up, const Routes& routes, const Weight& weight,
                      bool accumulate, const ExpertRoom& room, const Tensor& out) override;
  void SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) override;
  void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) override;
  void Add(const Tensor& x, const Tensor& y) override;
  void Dequantize(const Weight& weight, const Tensor& out) override;
  void QuantizeFp8(const Tensor& x, const Weight& out) override;
  void FillRandom(const Tensor& out, float amplitude, uint64_t seed) override;

 private:
  // Each kind of kernel for linear layers takes the shapes that it is good for, and says so.
  bool LinearSm90(const LinearInput& x, const Weight& weight, const Tensor& out);
  bool LinearBf16(const LinearInput& x, const Weight& weight, const Tensor& out);
  bool GroupedLinearSm90(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                         int num_choices, int64_t most_rows, const Tensor& out);
  // GroupedLinear, where an expert has at most `most_rows`.
  void MultiplyGrouped(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                       int num_choices, int64_t most_rows, const Tensor& out);
  // DownAndCombine of one token.
  bool JoinedLinearSm90(const Tensor& gate_up, const Routes& routes, const Weight& weight,
                        const LinearInput& activated, const Tensor& out);

  // The steps of MlaAttention, for some tokens: queries into the latent space, what they gather
  // there, and out of it.
  struct Latents {
    Tensor q_latent, latent;  // [T, A, R] act
    Tensor q_rope;            // [T, A, P] act
    Tensor values;            // [T, A * V] act, where they must be quantised afterwards
  };
  Latents ReserveLatents(const AttentionSizes& sizes, int64_t tokens, DType act);
  void IntoLatentSpace(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                       const Tensor& cos_sin, const Latents& latents);
  void AttendGeneric(const Latents& latents, const Tensor& cache, const AttentionBatch& batch,
                     float scale, int64_t first);
  void OutOfLatentSpace(const Latents& latents, const MlaWeights& weights, const LinearInput& out);
  // All of it in the shape of DeepSeek-V3 on Hopper; false for other ones.
  bool AttendSm90(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                  const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                  float scale, const LinearInput& out);

  // Of Route, between kernels: two counters are zero, and behind them stand slots with all bits
  // set.
  static constexpr int64_t kCounterBytes = 256;
  uint32_t* route_slots() const {
    return reinterpret_cast<uint32_t*>(counter_) + kCounterBytes / sizeof(uint32_t);
  }

  const cudaDeviceProp device_;
  const cudaStream_t stream_;
  GrowingMemory route_memory_;
  int* counter_ = nullptr;
  cuda::Scratch scratch_;  // of one operation at a time
  cuda::MlaStep step_;
  GrowingMemory fp8_stream_memory_;
  // Of the last Route, once a grouped linear layer has waited for them (Groups::complete_early).
  const int* complete_notes_ = nullptr;
  std::optional<Fp8StreamSm90> fp8_stream_;  // on Hopper, as is this:
  std::optional<Fp8TileSm90> fp8_tile_;
};

}  // namespace fathom
