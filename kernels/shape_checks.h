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
  int64_t experts;  // E; 1 for a plain weight
};

// values and, for F8_E4M3, the grid of factors that the offsets reach into.
void CheckWeight(const Weight& weight, int rank);

// Rows of `act`, or in 1×128.
void CheckLinearInput(const char* name, const LinearInput& rows, DType act, int64_t num_rows,
                      int64_t width);

void CheckEmbed(const Tensor& token_ids, const Tensor& table, const Tensor& out);
void CheckAddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& normed,
                     const LinearInput& quantized);
// Quantised rows meet F8_E4M3 weights only.
LinearSizes CheckLinear(const LinearInput& x, const Weight& weight, const Tensor& out);

struct LatentSizes {
  int64_t tokens;        // T
  int64_t q_lora_rank;   // Q
  int64_t kv_lora_rank;  // R
  int64_t rope_dim;      // P
};
LatentSizes CheckStoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm,
                              const Tensor& positions, const Tensor& cos_sin, const Tensor& places,
                              const LinearInput& q_a, const Tensor& cache);

struct AttentionSizes {
  int64_t tokens;        // T
  int64_t heads;         // A
  int64_t kv_lora_rank;  // R
  int64_t nope_dim;      // D
  int64_t rope_dim;      // P
  int64_t v_dim;         // V
  int64_t sequences;     // S
};
AttentionSizes CheckMlaAttention(const Tensor& q, const MlaWeights& weights,
                                 const Tensor& positions, const Tensor& cos_sin,
                                 const Tensor& cache, const AttentionBatch& batch,
                                 const LinearInput& out);

void CheckRoute(const Tensor& x, const Tensor& gate, const Tensor& bias,
                const RoutingConfig& config, const Routes& routes);
LinearSizes CheckGroupedLinear(const LinearInput& x, const ExpertGroups& groups,
                               const Weight& weight, int num_choices, const Tensor& out);
void CheckSwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out);
void CheckCombineExperts(const Tensor& y, const Routes& routes, const Tensor& out);
void CheckAdd(const Tensor& x, const Tensor& y);
void CheckGatherRows(const Tensor& x, const Tensor& rows, const Tensor& out);
void CheckDequantize(const Weight& weight, const Tensor& out);
void CheckQuantizeFp8(const Tensor& x, const Weight& out);
void CheckSampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens);
void CheckFillRandom(const Tensor& out);

}  // namespace fathom
