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

void CheckRmsNorm(const Tensor& x, const Tensor& weight, const Tensor& out) {
  CheckRank("x", x, 2);
  CheckAct("x", x);
  CheckShape("x", x, {x.dim(0), x.dim(1)});
  CheckShape("weight", weight, {x.dim(1)});
  CheckAct("weight", weight);
  CheckShape("out", out, {x.dim(0), x.dim(1)});
  CheckSameType("out", out, x);
}

LinearSizes CheckLinear(const Tensor& x, const Weight& weight, const Tensor& out) {
  CheckWeight(weight, 2);
  CheckRank("x", x, 2);
  const LinearSizes sizes = {.rows = x.dim(0),
                             .outputs = weight.values.dim(0),
                             .inputs = weight.values.dim(1),
                             .experts = 1};
  CheckShape("x", x, {sizes.rows, sizes.inputs});
  CheckAct("x", x);
  CheckShape("out", out, {sizes.rows, sizes.outputs});
  CheckAct("out", out);
  return sizes;
}

LinearSizes CheckHeadLinear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  CheckWeight({.values = weight}, 3);
  CheckAct("weight", weight);
  CheckRank("x", x, 3);
  const LinearSizes sizes = {.rows = x.dim(0),
                             .outputs = weight.dim(1),
                             .inputs = weight.dim(2),
                             .experts = weight.dim(0)};
  CheckShape("x", x, {sizes.rows, sizes.experts, sizes.inputs});
  CheckAct("x", x);
  CheckShape("out", out, {sizes.rows, sizes.experts, sizes.outputs});
  CheckAct("out", out);
  return sizes;
}

void CheckRotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin) {
  CheckRank("x", x, 3);
  CheckAct("x", x);
  CheckShape("x", x, {x.dim(0), x.dim(1), x.dim(2)});
  CHECK_EQ(x.dim(2) % 2, 0);
  CheckShape("positions", positions, {x.dim(0)});
  CheckType("positions", positions, DType::kI32);
  CheckRank("cos_sin", cos_sin, 3);
  CheckShape("cos_sin", cos_sin, {cos_sin.dim(0), x.dim(2) / 2, 2});
  CheckType("cos_sin", cos_sin, DType::kF32);
  CheckDense("cos_sin", cos_sin);
}

void CheckStoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
                  const Tensor& cache) {
  CheckRank("latent", latent, 2);
  CheckAct("latent", latent);
  CheckShape("latent", latent, {latent.dim(0), latent.dim(1)});
  CheckRank("rope", rope, 2);
  CheckShape("rope", rope, {latent.dim(0), rope.dim(1)});
  CheckSameType("rope", rope, latent);
  CheckShape("places", places, {latent.dim(0)});
  CheckType("places", places, DType::kI32);
  CheckRank("cache", cache, 3);
  CheckShape("cache", cache, {cache.dim(0), cache.dim(1), latent.dim(1) + rope.dim(1)});
  CheckAct("cache", cache);
  CheckDense("cache", cache);
}

AttentionSizes CheckMlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                                 const AttentionBatch& batch, const Tensor& out) {
  CheckRank("q_latent", q_latent, 3);
  CheckRank("q_rope", q_rope, 3);
  CheckRank("context_lens", batch.context_lens, 1);
  const AttentionSizes sizes = {.tokens = q_latent.dim(0),
                                .heads = q_latent.dim(1),
                                .kv_lora_rank = q_latent.dim(2),
                                .rope_dim = q_rope.dim(2),
                                .sequences = batch.context_lens.dim(0)};
  CheckShape("q_latent", q_latent, {sizes.tokens, sizes.heads, sizes.kv_lora_rank});
  CheckAct("q_latent", q_latent);
  CheckShape("q_rope", q_rope, {sizes.tokens, sizes.heads, sizes.rope_dim});
  CheckSameType("q_rope", q_rope, q_latent);
  CHECK_GE(batch.block_size, 1);
  CheckRank("cache", cache, 3);
  CheckShape("cache", cache, {cache.dim(0), batch.block_size, sizes.kv_lora_rank + sizes.rope_dim});
  CheckAct("cache", cache);
  CheckDense("cache", cache);
  CheckRank("block_tables", batch.block_tables, 2);
  CheckShape("block_tables", batch.block_tables, {sizes.sequences, batch.block_tables.dim(1)});
  CheckType("block_tables", batch.block_tables, DType::kI32);
  CheckShape("query_start", batch.query_start, {sizes.sequences + 1});
  CheckType("query_start", batch.query_start, DType::kI32);
  CheckShape("context_lens", batch.context_lens, {sizes.sequences});
  CheckType("context_lens", batch.context_lens, DType::kI32);
  CheckShape("out", out, {sizes.tokens, sizes.heads, sizes.kv_lora_rank});
  CheckSameType("out", out, q_latent);
  return sizes;
}

void CheckRouteExperts(const Tensor& logits, const Tensor& bias, const RoutingConfig& config,
                       const Tensor& experts, const Tensor& weights) {
  CheckRank("logits", logits, 2);
  const int64_t tokens = logits.dim(0);
  const int64_t n_routed_experts = logits.dim(1);
  CheckShape("logits", logits, {tokens, n_routed_experts});
  CheckType("logits", logits, DType::kF32);
  if (config.topk_method == TopkMethod::kNoauxTc) {
    CheckShape("bias", bias, {n_routed_experts});
    CheckType("bias", bias, DType::kF32);
  }
  CHECK(config.n_group >= 1 && n_routed_experts % config.n_group == 0) << config.n_group;
  CHECK(config.topk_group >= 1 && config.topk_group <= config.n_group) << config.topk_group;
  const int64_t choices = config.num_experts_per_tok;
  CHECK(choices >= 1 && choices <= n_routed_experts) << choices;
  CheckShape("experts", experts, {tokens, choices});
  CheckType("experts", experts, DType::kI32);
  CheckDense("experts", experts);
  CheckShape("weights", weights, {tokens, choices});
  CheckType("weights", weights, DType::kF32);
  CheckDense("weights", weights);
}

void CheckGroupByExpert(const Tensor& experts, const ExpertGroups& groups) {
  CheckRank("experts", experts, 2);
  CheckType("experts", experts, DType::kI32);
  CheckDense("experts", experts);
  CheckGroups(groups);
  CHECK_EQ(groups.rows.dim(0), experts.num_elements());
}

LinearSizes CheckGroupedLinear(const Tensor& x, const ExpertGroups& groups, const Weight& weight,
                               int num_experts_per_tok, const Tensor& out) {
  CheckWeight(weight, 3);
  CheckGroups(groups);
  const LinearSizes sizes = {.rows = groups.rows.dim(0),
                             .outputs = weight.values.dim(1),
                             .inputs = weight.values.dim(2),
                             .experts = weight.values.dim(0)};
  CHECK_EQ(groups.offsets.dim(0), sizes.experts + 1);
  CheckRank("x", x, 2);
  CheckShape("x", x, {x.dim(0), sizes.inputs});
  CheckAct("x", x);
  CHECK_GE(num_experts_per_tok, 0);
  CHECK(x.dim(0) == sizes.rows || x.dim(0) * num_experts_per_tok == sizes.rows)
      << "x is " << x.DebugString() << " for " << sizes.rows << " rows, " << num_experts_per_tok
      << " to a token";
  CheckShape("out", out, {sizes.rows, sizes.outputs});
  CheckAct("out", out);
  return sizes;
}

void CheckSwiGlu(const Tensor& gate_up, const Tensor& out) {
  CheckRank("out", out, 2);
  CheckAct("out", out);
  CheckShape("out", out, {out.dim(0), out.dim(1)});
  CheckShape("gate_up", gate_up, {out.dim(0), 2 * out.dim(1)});
  CheckSameType("gate_up", gate_up, out);
}

void CheckCombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                         const Tensor& out) {
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

void CheckClear(const Tensor& out) {
  CheckRank("out", out, 2);
  CheckAct("out", out);
  CheckShape("out", out, {out.dim(0), out.dim(1)});
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

}  // namespace fathom
