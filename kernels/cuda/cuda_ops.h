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

#include "kernels/ops.h"

namespace fathom {

// Device memory that grows to what its user needed most and stays; or a part of what was planned
// for all operations (Ops::UseScratch), which is enough for planned steps. Contents do not survive
// growth.
class GrowingMemory {
 public:
  GrowingMemory() = default;
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;
  ~GrowingMemory();

  // 256-byte aligned.
  void* Reserve(int64_t num_bytes);
  // Takes the place of what was allocated; owned by somebody else.
  void Use(void* data, int64_t num_bytes);

 private:
  void Release();

  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
  bool is_owned_ = false;
};

class CudaOps final : public Ops {
 public:
  // `stream` must outlive this.
  CudaOps(const cudaDeviceProp& device, cudaStream_t stream) : device_(device), stream_(stream) {}

  int64_t ScratchBytes(const StepLimits& limits) const override;
  void UseScratch(const StepLimits& limits, void* memory) override;
  void BeginStep(const AttentionBatch&) override {}
  void Prefetch(const Tensor&) override {}
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
  void SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) override;
  void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) override;
  void Add(const Tensor& x, const Tensor& y) override;
  void Dequantize(const Weight& weight, const Tensor& out) override;
  void QuantizeFp8(const Tensor& x, const Weight& out) override;
  void FillRandom(const Tensor& out, float amplitude, uint64_t seed) override;

 private:
  // One small linear layer per head: out[t, a] = x[t, a] · weight[a]ᵀ. x and out may be strided.
  //   x [T, A, K] act   weight [A, N, K] act   out [T, A, N] act
  void MultiplyHeads(const Tensor& x, const Tensor& weight, const Tensor& out);

  // Attention in the latent space, on queries that are rotated and absorbed.
  //   q_latent [T, A, R] act   q_rope [T, A, P] act   out [T, A, R] act
  void AttendLatents(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                     const AttentionBatch& batch, float scale, const Tensor& out);

  // One query token per sequence in the shape of DeepSeek-V3 on eight GPUs: MlaDecodeSm90 takes it.
  bool IsHopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                      const AttentionBatch& batch) const;
  void HopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                    const AttentionBatch& batch, float scale, const Tensor& out);

  const cudaDeviceProp device_;
  const cudaStream_t stream_;
  GrowingMemory attention_memory_;  // what lies between the steps of MlaAttention
  GrowingMemory decode_memory_;     // of MlaDecodeSm90
};

}  // namespace fathom
