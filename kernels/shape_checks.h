// What ops.h demands of the arguments of each operation, said once for every backend.
//
// Each function CHECKs shapes and types with the letters of ops.h and returns the sizes. It reads
// no device memory, so what a tensor holds (ids, offsets) is not checked here. Thread-safe.
#pragma once

#include "kernels/ops.h"

namespace fathom {

// A tensor of this type and these sizes whose last dimension is contiguous.
// Prints `name` and what was given instead.
void CheckShape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape);
void CheckType(const char* name, const Tensor& tensor, DType dtype);
void CheckAct(const char* name, const Tensor& tensor);  // F32 or BF16
// `shape` without strides between rows.
void CheckDense(const char* name, const Tensor& tensor);

struct LinearSizes {
  int64_t rows;     // T, or M
  int64_t outputs;  // N
  int64_t inputs;   // K
  int64_t experts;  // E, or A; 1 for a plain weight
};

// values and, for F8_E4M3, the grid of factors that the offsets reach into.
void CheckWeight(const Weight& weight, int rank);

void CheckEmbed(const Tensor& token_ids, const Tensor& table, const Tensor& out);
void CheckRmsNorm(const Tensor& x, const Tensor& weight, const Tensor& out);
LinearSizes CheckLinear(const Tensor& x, const Weight& weight, const Tensor& out);
LinearSizes CheckHeadLinear(const Tensor& x, const Tensor& weight, const Tensor& out);
void CheckRotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin);
void CheckStoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
                  const Tensor& cache);

struct AttentionSizes {
  int64_t tokens;        // T
  int64_t heads;         // A
  int64_t kv_lora_rank;  // R
  int64_t rope_dim;      // P
  int64_t sequences;     // S
};
AttentionSizes CheckMlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                                 const AttentionBatch& batch, const Tensor& out);

void CheckRouteExperts(const Tensor& logits, const Tensor& bias, const RoutingConfig& config,
                       const Tensor& experts, const Tensor& weights);
void CheckGroupByExpert(const Tensor& experts, const ExpertGroups& groups);
LinearSizes CheckGroupedLinear(const Tensor& x, const ExpertGroups& groups, const Weight& weight,
                               int num_experts_per_tok, const Tensor& out);
void CheckSwiGlu(const Tensor& gate_up, const Tensor& out);
void CheckCombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                         const Tensor& out);
void CheckClear(const Tensor& out);
void CheckAdd(const Tensor& x, const Tensor& y);
void CheckGatherRows(const Tensor& x, const Tensor& rows, const Tensor& out);
void CheckDequantize(const Weight& weight, const Tensor& out);
void CheckQuantizeFp8(const Tensor& x, const Weight& out);

}  // namespace fathom
