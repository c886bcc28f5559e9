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

  void BeginStep(const AttentionBatch&) override {}
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
  void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) override;
  void Add(const Tensor& x, const Tensor& y) override;
  void Dequantize(const Weight& weight, const Tensor& out) override;
  void QuantizeFp8(const Tensor& x, const Weight& out) override;
  void SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) override;
  void FillRandom(const Tensor& out, float amplitude, uint64_t seed) override;

 private:
  // Computes tasks_, each of them for all its num_outputs outputs.
  void MultiplyTasks(int64_t num_outputs);

  // One small linear layer per head: out[t, a] = x[t, a] · weight[a]ᵀ. x and out may be strided.
  //   x [T, A, K] act   weight [A, N, K] f32 or bf16   out [T, A, N] act
  void MultiplyHeads(const Tensor& x, const Tensor& weight, const Tensor& out);

  // Turns the last dimension of q_rope, [T, A, P] act, into out, of the same shape.
  void RotateHeads(const Tensor& q_rope, const Tensor& positions, const Tensor& cos_sin,
                   const Tensor& out);

  // Attention in the latent space of tokens [begin, end) of the batch, pointed at by the task.
  void AttendLatents(const AttentionTask& task, const AttentionBatch& batch, int64_t num_heads,
                     int64_t begin, int64_t end);

  // Sorts the choices by expert, for the experts [first_expert, first_expert + E).
  void GroupByExpert(const Tensor& experts, int first_expert, const ExpertGroups& groups);

  ThreadPool threads_;
  std::vector<Scratch> scratch_;  // by range of ThreadPool::ParallelFor

  // Lists that keep their memory between operations.
  std::vector<LinearTask> tasks_;
  std::vector<AttentionPiece> pieces_;
  Scratch attention_scratch_;    // MlaAttention: what lies between its steps
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
