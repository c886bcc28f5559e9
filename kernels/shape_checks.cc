#include "kernels/shape_checks.h"

#include <cstdint>
#include <initializer_list>

#include "base/check.h"

namespace fathom {
namespace {

int64_t BlocksOf(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

void CheckRank(const char* name, const Tensor& tensor, int rank) {
  CHECK_EQ(tensor.rank(), rank) << name << " is " << tensor.DebugString();
}

void CheckSameType(const char* name, const Tensor& tensor, const Tensor& other) {
  CHECK(tensor.dtype() == other.dtype())
      << name << " is " << tensor.DebugString() << ", beside " << other.DebugString();
}

void CheckGroups(const ExpertGroups& groups) {
  CheckRank("rows", groups.rows, 1);
  CheckType("rows", groups.rows, DType::kI32);
  CheckRank("offsets", groups.offsets, 1);
  CheckType("offsets", groups.offsets, DType::kI32);
  CHECK_GE(groups.offsets.dim(0), 1);
  if (!groups.notes.present()) return;
  CheckRank("notes", groups.notes, 1);
  CheckType("notes", groups.notes, DType::kI32);
  CHECK_GE(groups.notes.dim(0), NumGroupNotes(groups.offsets.dim(0) - 1, groups.rows.dim(0)));
}

void CheckPositions(const Tensor& positions, const Tensor& cos_sin, int64_t tokens,
                    int64_t rope_dim) {
  CHECK_EQ(rope_dim % 2, 0);
  CheckShape("positions", positions, {tokens});
  CheckType("positions", positions, DType::kI32);
  CheckRank("cos_sin", cos_sin, 3);
  CheckShape("cos_sin", cos_sin, {cos_sin.dim(0), rope_dim / 2, 2});
  CheckType("cos_sin", cos_sin, DType::kF32);
  CheckDense("cos_sin", cos_sin);
}

void CheckCache(const Tensor& cache, int64_t kv_lora_rank, int64_t rope_dim) {
  const int64_t width = cache.dtype() == DType::kF8E4M3
                            ? kv_lora_rank + 4 * BlocksOf(kv_lora_rank) + 2 * rope_dim
                            : kv_lora_rank + rope_dim;
  CheckRank("cache", cache, 3);
  CheckShape("cache", cache, {cache.dim(0), cache.dim(1), width});
  CHECK(cache.dtype() != DType::kI32) << cache.DebugString();
  CheckDense("cache", cache);
}

// What a linear layer may read: act, or 1×128 if its weight is F8_E4M3.
void CheckLinearInputOf(const Weight& weight, const LinearInput& x, int64_t num_rows,
                        int64_t inputs) {
  if (!x.quantized()) CheckAct("x", x.values);
  CheckLinearInput("x", x, x.values.dtype(), num_rows, inputs);
  CHECK(!x.quantized() || weight.values.dtype() == DType::kF8E4M3)
      << "quantised x for a weight " << weight.values.DebugString();
}

}  // namespace

void CheckShape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  CheckRank(name, tensor, static_cast<int>(shape.size()));
  int i = 0;
  for (int64_t size : shape) {
    CHECK_EQ(tensor.dim(i), size) << "dimension " << i << " of " << name << ", which is "
                                  << tensor.DebugString();
    ++i;
  }
  CHECK(tensor.dim(i - 1) <= 1 || tensor.stride(i - 1) == 1)
      << name << ", " << tensor.DebugString() << ", has gaps in its last dimension";
}

void CheckType(const char* name, const Tensor& tensor, DType dtype) {
  CHECK(tensor.dtype() == dtype) << name << " is " << tensor.DebugString() << ", not "
                                 << NameOf(dtype);
}

void CheckAct(const char* name, const Tensor& tensor) {
  CHECK(tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kBF16)
      << name << " is " << tensor.DebugString() << ", neither F32 nor BF16";
}

void CheckDense(const char* name, const Tensor& tensor) {
  CHECK(tensor.dense()) << name << ", " << tensor.DebugString() << ", has gaps";
}

void CheckWeight(const Weight& weight, int rank) {
  const Tensor& values = weight.values;
  CheckRank("weight", values, rank);
  CheckDense("weight", values);
  CHECK(values.dtype() != DType::kI32) << values.DebugString();
  if (values.dtype() != DType::kF8E4M3) return;

  const Tensor& scale_inv = weight.scale_inv;
  CHECK_GE(weight.row_offset, 0);
  CHECK_GE(weight.column_offset, 0);
  CheckRank("scale_inv", scale_inv, rank);
  CheckType("scale_inv", scale_inv, DType::kF32);
  CheckDense("scale_inv", scale_inv);
  if (rank == 3) CHECK_EQ(scale_inv.dim(0), values.dim(0));
  CHECK_GE(scale_inv.dim(rank - 2), BlocksOf(values.dim(rank - 2) + weight.row_offset))
      << scale_inv.DebugString() << " for " << values.DebugString();
  CHECK_GE(scale_inv.dim(rank - 1), BlocksOf(values.dim(rank - 1) + weight.column_offset))
      << scale_inv.DebugString() << " for " << values.DebugString();
}

void CheckEmbed(const Tensor& token_ids, const Tensor& table, const Tensor& out) {
  CheckRank("token_ids", token_ids, 1);
  CheckType("token_ids", token_ids, DType::kI32);
  CheckRank("table", table, 2);
  CheckAct("table", table);
  CheckShape("out", out, {token_ids.dim(0), table.dim(1)});
  CheckAct("out", out);
}

void CheckLinearInput(const char* name, const LinearInput& rows, DType act, int64_t num_rows,
                      int64_t width) {
  CheckShape(name, rows.values, {num_rows, width});
  CheckType(name, rows.values, rows.quantized() ? DType::kF8E4M3 : act);
  if (!rows.quantized()) return;
  CheckShape("scales", rows.scales, {num_rows, BlocksOf(width)});
  CheckType("scales", rows.scales, DType::kF32);
}

void CheckAddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& normed,
                     const LinearInput& quantized) {
  CheckRank("x", x, 2);
  CheckAct("x", x);
  CheckShape("x", x, {x.dim(0), x.dim(1)});
  if (y.present()) {
    CheckShape("y", y, {x.dim(0), x.dim(1)});
    CheckSameType("y", y, x);
    CHECK(normed.raw() != x.raw()) << "x takes the sum, so it cannot take the norm";
  }
  CheckShape("weight", weight, {x.dim(1)});
  CheckAct("weight", weight);
  CHECK(normed.present() || quantized.present() || x.dim(0) == 0);
  if (normed.present()) {
    CheckShape("normed", normed, {x.dim(0), x.dim(1)});
    CheckSameType("normed", normed, x);
  }
  if (quantized.present()) {
    CHECK(quantized.quantized()) << "no scales for " << quantized.values.DebugString();
    CheckLinearInput("quantized", quantized, x.dtype(), x.dim(0), x.dim(1));
  }
}

LinearSizes CheckLinear(const LinearInput& x, const Weight& weight, const Tensor& out) {
  CheckWeight(weight, 2);
  CheckRank("x", x.values, 2);
  const LinearSizes sizes = {.rows = x.values.dim(0),
                             .outputs = weight.values.dim(0),
                             .inputs = weight.values.dim(1),
                             .experts = 1};
  CheckLinearInputOf(weight, x, sizes.rows, sizes.inputs);
  CheckShape("out", out, {sizes.rows, sizes.outputs});
  CheckAct("out", out);
  return sizes;
}

LatentSizes CheckStoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm,
                              const Tensor& positions, const Tensor& cos_sin, const Tensor& places,
                              const LinearInput& q_a, const Tensor& cache) {
  CheckRank("qkv_a", qkv_a, 2);
  CheckAct("qkv_a", qkv_a);
  CheckRank("kv_norm", kv_norm, 1);
  CheckType("kv_norm", kv_norm, DType::kF32);
  LatentSizes sizes = {.tokens = qkv_a.dim(0),
                       .q_lora_rank = q_norm.present() ? q_norm.dim(0) : 0,
                       .kv_lora_rank = kv_norm.dim(0),
                       .rope_dim = 0};
  sizes.rope_dim = qkv_a.dim(1) - sizes.q_lora_rank - sizes.kv_lora_rank;
  CHECK_GE(sizes.rope_dim, 0) << qkv_a.DebugString();
  CheckShape("qkv_a", qkv_a, {sizes.tokens, qkv_a.dim(1)});
  CheckShape("kv_norm", kv_norm, {sizes.kv_lora_rank});
  CHECK_EQ(q_norm.present(), q_a.present());
  if (q_a.present()) {
    CheckShape("q_norm", q_norm, {sizes.q_lora_rank});
    CheckType("q_norm", q_norm, DType::kF32);
    CheckLinearInput("q_a", q_a, qkv_a.dtype(), sizes.tokens, sizes.q_lora_rank);
  }
  CheckPositions(positions, cos_sin, sizes.tokens, sizes.rope_dim);
  CheckShape("places", places, {sizes.tokens});
  CheckType("places", places, DType::kI32);
  CheckCache(cache, sizes.kv_lora_rank, sizes.rope_dim);
  return sizes;
}

AttentionSizes CheckMlaAttention(const Tensor& q, const MlaWeights& weights,
                                 const Tensor& positions, const Tensor& cos_sin,
                                 const Tensor& cache, const AttentionBatch& batch,
                                 const LinearInput& out) {
  CheckRank("q", q, 3);
  CheckWeight({.values = weights.w_uk}, 3);
  CheckWeight({.values = weights.w_uv}, 3);
  CheckRank("context_lens", batch.context_lens, 1);
  const AttentionSizes sizes = {.tokens = q.dim(0),
                                .heads = q.dim(1),
                                .kv_lora_rank = weights.w_uk.dim(1),
                                .nope_dim = weights.w_uk.dim(2),
                                .rope_dim = q.dim(2) - weights.w_uk.dim(2),
                                .v_dim = weights.w_uv.dim(1),
                                .sequences = batch.context_lens.dim(0)};
  CheckShape("q", q, {sizes.tokens, sizes.heads, q.dim(2)});
  CheckAct("q", q);
  CHECK_GE(sizes.rope_dim, 0) << q.DebugString() << ", w_uk " << weights.w_uk.DebugString();
  CheckShape("w_uk", weights.w_uk, {sizes.heads, sizes.kv_lora_rank, sizes.nope_dim});
  CheckAct("w_uk", weights.w_uk);
  CheckShape("w_uv", weights.w_uv, {sizes.heads, sizes.v_dim, sizes.kv_lora_rank});
  CheckAct("w_uv", weights.w_uv);
  CheckPositions(positions, cos_sin, sizes.tokens, sizes.rope_dim);
  CHECK_GE(batch.block_size, 1);
  CheckCache(cache, sizes.kv_lora_rank, sizes.rope_dim);
  CHECK_EQ(cache.dim(1), batch.block_size);
  CheckRank("block_tables", batch.block_tables, 2);
  CheckShape("block_tables", batch.block_tables, {sizes.sequences, batch.block_tables.dim(1)});
  CheckType("block_tables", batch.block_tables, DType::kI32);
  CheckShape("query_start", batch.query_start, {sizes.sequences + 1});
  CheckType("query_start", batch.query_start, DType::kI32);
  CheckShape("context_lens", batch.context_lens, {sizes.sequences});
  CheckType("context_lens", batch.context_lens, DType::kI32);
  CheckLinearInput("out", out, q.dtype(), sizes.tokens, sizes.heads * sizes.v_dim);
  return sizes;
}

void CheckRoute(const Tensor& x, const Tensor& gate, const Tensor& bias,
                const RoutingConfig& config, const Routes& routes) {
  CheckAct("gate", gate);
  CheckType("logits", routes.logits, DType::kF32);
  CheckLinear(x, {.values = gate}, routes.logits);
  const int64_t tokens = x.dim(0);
  const int64_t n_routed_experts = gate.dim(0);
  if (config.topk_method == TopkMethod::kNoauxTc) {
    CheckShape("bias", bias, {n_routed_experts});
    CheckType("bias", bias, DType::kF32);
  }
  CHECK(config.n_group >= 1 && n_routed_experts % config.n_group == 0) << config.n_group;
  CHECK(config.topk_group >= 1 && config.topk_group <= config.n_group) << config.topk_group;
  CHECK(config.num_experts_per_tok >= 1 && config.num_experts_per_tok <= n_routed_experts)
      << config.num_experts_per_tok;
  CHECK_GE(config.num_shared_experts, 0);
  CheckShape("experts", routes.experts, {tokens, config.num_choices()});
  CheckType("experts", routes.experts, DType::kI32);
  CheckDense("experts", routes.experts);
  CheckShape("weights", routes.weights, {tokens, config.num_choices()});
  CheckType("weights", routes.weights, DType::kF32);
  CheckDense("weights", routes.weights);
  CheckGroups(routes.groups);
  CHECK_EQ(routes.groups.rows.dim(0), tokens * config.num_choices());
}

LinearSizes CheckGroupedLinear(const LinearInput& x, const ExpertGroups& groups,
                               const Weight& weight, int num_choices, const Tensor& out) {
  CheckWeight(weight, 3);
  CheckGroups(groups);
  const LinearSizes sizes = {.rows = groups.rows.dim(0),
                             .outputs = weight.values.dim(1),
                             .inputs = weight.values.dim(2),
                             .experts = weight.values.dim(0)};
  CHECK_EQ(groups.offsets.dim(0), sizes.experts + 1);
  CheckRank("x", x.values, 2);
  const int64_t rows_of_x = x.values.dim(0);
  CheckLinearInputOf(weight, x, rows_of_x, sizes.inputs);
  CHECK_GE(num_choices, 0);
  CHECK(rows_of_x == sizes.rows || rows_of_x * num_choices == sizes.rows)
      << "x is " << x.values.DebugString() << " for " << sizes.rows << " rows, " << num_choices
      << " to a token";
  CheckShape("out", out, {sizes.rows, sizes.outputs});
  CheckAct("out", out);
  return sizes;
}

void CheckSwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out) {
  CheckRank("out", out.values, 2);
  const int64_t rows = out.values.dim(0);
  const int64_t width = out.values.dim(1);
  CheckAct("gate_up", gate_up);
  CheckShape("gate_up", gate_up, {rows, 2 * width});
  CheckLinearInput("out", out, gate_up.dtype(), rows, width);
  if (groups == nullptr) return;
  CheckGroups(*groups);
  CHECK_EQ(groups->rows.dim(0), rows);
}

void CheckCombineExperts(const Tensor& y, const Routes& routes, const Tensor& out) {
  const ExpertGroups& groups = routes.groups;
  const Tensor& weights = routes.weights;
  CheckGroups(groups);
  CheckRank("weights", weights, 2);
  CheckType("weights", weights, DType::kF32);
  CheckDense("weights", weights);
  CHECK_EQ(groups.rows.dim(0), weights.num_elements());
  CheckRank("out", out, 2);
  CheckAct("out", out);
  CheckShape("out", out, {weights.dim(0), out.dim(1)});
  CheckShape("y", y, {groups.rows.dim(0), out.dim(1)});
  CheckSameType("y", y, out);
}

void CheckAdd(const Tensor& x, const Tensor& y) {
  CheckRank("x", x, 2);
  CheckAct("x", x);
  CheckShape("x", x, {x.dim(0), x.dim(1)});
  CheckShape("y", y, {x.dim(0), x.dim(1)});
  CheckSameType("y", y, x);
}

void CheckGatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) {
  CheckRank("x", x, 2);
  CheckShape("x", x, {x.dim(0), x.dim(1)});
  CheckRank("rows", rows, 1);
  CheckType("rows", rows, DType::kI32);
  CheckShape("out", out, {rows.dim(0), x.dim(1)});
  CheckSameType("out", out, x);
}

void CheckDequantize(const Weight& weight, const Tensor& out) {
  CheckWeight(weight, 2);
  CheckShape("out", out, {weight.values.dim(0), weight.values.dim(1)});
  CheckAct("out", out);
}

void CheckQuantizeFp8(const Tensor& x, const Weight& out) {
  CheckRank("x", x, 2);
  CheckAct("x", x);
  CheckShape("x", x, {x.dim(0), x.dim(1)});
  CheckWeight(out, 2);
  CheckShape("out", out.values, {x.dim(0), x.dim(1)});
  CheckType("out", out.values, DType::kF8E4M3);
  CHECK_EQ(out.row_offset, 0);
  CHECK_EQ(out.column_offset, 0);
}

void CheckSampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) {
  CHECK_EQ(logits.rank(), 2) << logits.DebugString();
  CheckType("logits", logits, DType::kF32);
  CheckType("tokens", tokens, DType::kI32);
  CheckDense("tokens", tokens);
  CheckType("rows", rows, DType::kI32);
  CheckShape("rows", rows, {tokens.dim(0), kSamplingRowWords});
  CheckDense("rows", rows);
}

void CheckFillRandom(const Tensor& out) {
  CHECK(out.dtype() != DType::kI32) << out.DebugString();
  CheckDense("out", out);
}

}  // namespace fathom
