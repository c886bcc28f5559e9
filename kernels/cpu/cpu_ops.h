// The operations on the CPU. Each is implemented in the file of its family, cpu/<family>.cc.
//
// Not thread-safe; an operation may use all threads of the pool and is complete on return.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/attention_task.h"
#include "kernels/cpu/linear_task.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"

namespace fathom {

class CpuOps final : public Ops {
 public:
  explicit CpuOps(int num_threads)
      : threads_(num_threads), scratch_(static_cast<size_t>(num_threads)) {}

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
  // Computes tasks_, each of them for all its num_outputs outputs.
  void MultiplyTasks(int64_t num_outputs);

  ThreadPool threads_;
  std::vector<Scratch> scratch_;  // by range of ThreadPool::ParallelFor

  // Lists that keep their memory between operations.
  std::vector<LinearTask> tasks_;
  std::vector<AttentionPiece> pieces_;
  std::vector<int32_t> places_;  // CombineExperts: row → its place among the sorted rows, or -1
};

// Rows of a loop over elements that are worth a thread of their own.
inline int64_t SmallestRange(int64_t row_elements) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  return kElementsPerThread / (row_elements + 1) + 1;
}

// The rows of a tensor of rank 2 as pointers to Element, which is float, BFloat16 or Float8E4M3.
template <typename Element>
Element* RowOf(const Tensor& tensor, int64_t row) {
  return tensor.data<Element>() + row * tensor.stride(0);
}

// Calls fn with a value of the C++ type behind an activation type: float or BFloat16.
template <typename Fn>
void VisitAct(DType dtype, Fn&& fn) {
  if (dtype == DType::kF32) {
    fn(float{});
  } else {
    fn(BFloat16{});
  }
}

}  // namespace fathom
