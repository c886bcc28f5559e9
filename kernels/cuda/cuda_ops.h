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

// Device memory that grows to what its user needed most and stays. Contents do not survive growth.
class GrowingMemory {
 public:
  GrowingMemory() = default;
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;
  ~GrowingMemory();

  // 256-byte aligned.
  void* Reserve(int64_t num_bytes);

 private:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

class CudaOps final : public Ops {
 public:
  // `stream` must outlive this.
  CudaOps(const cudaDeviceProp& device, cudaStream_t stream) : device_(device), stream_(stream) {}

  void Embed(const Tensor& token_ids, const Tensor& table, int first_row,
             const Tensor& out) override;
  void RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) override;
  void Linear(const Tensor& x, const Weight& weight, const Tensor& out) override;
  void HeadLinear(const Tensor& x, const Tensor& weight, const Tensor& out) override;
  void RotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin) override;
  void StoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
               const Tensor& cache) override;
  void MlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                    const AttentionBatch& batch, float scale, const Tensor& out) override;
  void RouteExperts(const Tensor& logits, const Tensor& bias, const RoutingConfig& config,
                    const Tensor& experts, const Tensor& weights) override;
  void GroupByExpert(const Tensor& experts, int first_expert, const ExpertGroups& groups) override;
  void GroupedLinear(const Tensor& x, const ExpertGroups& groups, const Weight& weight,
                     int num_experts_per_tok, const Tensor& out) override;
  void SwiGlu(const Tensor& gate_up, const Tensor& out) override;
  void CombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                      const Tensor& out) override;
  void Clear(const Tensor& out) override;
  void Add(const Tensor& x, const Tensor& y) override;
  void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) override;
  void Dequantize(const Weight& weight, const Tensor& out) override;
  void QuantizeFp8(const Tensor& x, const Weight& out) override;

 private:
  // One query token per sequence in the shape of DeepSeek-V3 on eight GPUs: MlaDecodeSm90 takes it.
  bool IsHopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                      const AttentionBatch& batch, const Tensor& out) const;
  void HopperDecode(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                    const AttentionBatch& batch, float scale, const Tensor& out);

  const cudaDeviceProp device_;
  const cudaStream_t stream_;
  GrowingMemory decode_memory_;  // of MlaDecodeSm90
  GrowingMemory places_memory_;  // CombineExperts: row → its place among the sorted rows, or -1
};

}  // namespace fathom
