// The mathematics of the DeepSeek-V3 family, one function per step of the forward pass.
//
// Shapes use these letters: T tokens of the step, H hidden_size, N output and K input width of a
// linear layer, A attention heads of this rank, R kv_lora_rank, P qk_rope_head_dim, E experts of
// this rank, k num_experts_per_tok, M = T * k rows routed to experts, S sequences of the step.
// "act" is the activation type, F32 or BF16, the same for all act tensors of one call. Everything
// is accumulated in F32. Shapes and types are CHECKed: they are our own doing, never a client's.
//
// Rows are independent: what is computed for a token depends on nothing but that token (and, in
// attention, on the sequence before it), bit by bit: not on T, on its place in the batch, or on how
// the prompt was cut into chunks. (On a GPU only to rounding: cuda/cuda_ops.h.) Outputs must not
// overlap inputs unless it says "in place".
//
// Not thread-safe; asynchronous on a GPU, complete on return on the CPU.
#pragma once

#include "kernels/tensor.h"

namespace fathom {

// A linear layer's weight, [N, K] as in the checkpoint, or [E, N, K] for a stack of experts: F32,
// BF16, or F8_E4M3 in blocks of 128×128 with one F32 factor each (`weight_scale_inv`).
//
// A rank's slice may begin in the middle of a block: then row_offset and column_offset say how far,
// and element (n, k) belongs to factor ((n + row_offset) / 128, (k + column_offset) / 128).
struct Weight {
  Tensor values;
  Tensor scale_inv = {};  // F8_E4M3 only: [blocks, blocks] or [E, blocks, blocks] f32
  int row_offset = 0;
  int column_offset = 0;
};

inline constexpr int kFp8Block = 128;

enum class ScoringFunc { kSigmoid, kSoftmax };
enum class TopkMethod {
  kGreedy,              // the k best scores
  kGroupLimitedGreedy,  // only in the topk_group groups with the best member (V2)
  kNoauxTc,             // bias steers the choice; a group counts by its two best members (V3)
};

struct RoutingConfig {
  int num_experts_per_tok = 0;
  int n_group = 1;
  int topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSigmoid;
  TopkMethod topk_method = TopkMethod::kNoauxTc;
  bool norm_topk_prob = false;
  float routed_scaling_factor = 1.0f;
};

// Where the tokens of a step stand in their sequences. Sequence s owns tokens
// [query_start[s], query_start[s + 1]), at least one, the last ones of its context_lens[s] tokens.
// Example: a prompt of 5 tokens computed at once beside a sequence that decodes its 9th token:
// query_start = [0, 5, 6], context_lens = [5, 9].
struct AttentionBatch {
  Tensor block_tables;  // [S, blocks] i32; entries past a sequence's end are not read
  Tensor query_start;   // [S + 1] i32
  Tensor context_lens;  // [S] i32, this step's tokens included
  int block_size = 0;   // tokens per block
};

// Rows of a step sorted by the expert of this rank that they go to.
struct ExpertGroups {
  Tensor
      rows;  // [M] i32: token * k + choice, ascending within an expert; the first offsets[E] count
  Tensor offsets;  // [E + 1] i32: expert e owns rows [offsets[e], offsets[e + 1])
};

class Ops {
 public:
  virtual ~Ops() = default;

  // out[t] = table[token_ids[t] - first_row]; zero where this rank does not hold the row.
  //   token_ids [T] i32   table [rows, H] f32 or bf16   out [T, H] act
  virtual void Embed(const Tensor& token_ids, const Tensor& table, int first_row,
                     const Tensor& out) = 0;

  // out = x / sqrt(mean(x²) + eps) * weight. Rows may be strided; x and out may be the same tensor.
  //   x, out [T, N] act   weight [N] f32 or bf16
  virtual void RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) = 0;

  // out = x · weightᵀ.   x [T, K] act or f32   weight [N, K]   out [T, N] act or f32. Rows may be
  // strided.
  virtual void Linear(const Tensor& x, const Weight& weight, const Tensor& out) = 0;

  // One small linear layer per head: out[t, a] = x[t, a] · weight[a]ᵀ. x may be strided.
  //   x [T, A, K] act   weight [A, N, K] f32 or bf16   out [T, A, N] act
  virtual void HeadLinear(const Tensor& x, const Tensor& weight, const Tensor& out) = 0;

  // Rotary embedding of neighbouring pairs (2i, 2i + 1), in place. x may be strided.
  //   x [T, heads, P] act   positions [T] i32   cos_sin [max positions, P / 2, 2] f32, amplitude
  //   included
  // Source: deepseek-ai/DeepSeek-V3 inference/model.py, apply_rotary_emb.
  virtual void RotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin) = 0;

  // Writes what MLA keeps of each token: cache[place] = [latent | rope].
  //   latent [T, R] act   rope [T, P] act   places [T] i32: block id * block_size + offset
  //   cache [blocks, block_size, R + P] f32 or bf16
  virtual void StoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
                       const Tensor& cache) = 0;

  // Multi-head latent attention in the latent space (weights absorbed), causal.
  //   q_latent [T, A, R] act   q_rope [T, A, P] act, rotated   cache as in StoreKv   out [T, A, R]
  //   act score = scale * (q_latent · latent + q_rope · rope); out = softmax(score) · latent
  // Source: DeepSeek-V2 report §2.1.2–2.1.3; inference/model.py, class MLA, attn_impl "absorb".
  virtual void MlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                            const AttentionBatch& batch, float scale, const Tensor& out) = 0;

  // Picks the experts of each token and how much each one counts.
  //   logits [T, n_routed_experts] f32   gate output, before the scoring function
  //   bias [n_routed_experts] f32        kNoauxTc only: steers the choice, never the weight
  //   experts [T, k] i32, out            best first, ties to the lower id
  //   weights [T, k] f32, out            times routed_scaling_factor; normalised first if asked
  // Source: DeepSeek-V3 report §2.1.2; inference/model.py, class Gate (dropped groups masked with
  // -inf).
  virtual void RouteExperts(const Tensor& logits, const Tensor& bias, const RoutingConfig& config,
                            const Tensor& experts, const Tensor& weights) = 0;

  // Sorts the choices of a step by expert, for the experts [first_expert, first_expert + E).
  //   experts [T, k] i32   groups: out
  virtual void GroupByExpert(const Tensor& experts, int first_expert,
                             const ExpertGroups& groups) = 0;

  // out[i] = x[row of i] · weight[expert of i]ᵀ for the sorted rows i.
  //   x [T, K] act: row of i is groups.rows[i] / k;   or [M, K]: row i itself. Which of the two its
  //   number of rows says; with k = 1 it cannot, and num_experts_per_tok = 0 means the second.
  //   weight [E, N, K]   out [M, N] act, may be strided; rows past offsets[E] are left alone
  virtual void GroupedLinear(const Tensor& x, const ExpertGroups& groups, const Weight& weight,
                             int num_experts_per_tok, const Tensor& out) = 0;

  // out = silu(gate) * up.   gate_up [rows, 2 * N] act: [gate | up]   out [rows, N] act
  virtual void SwiGlu(const Tensor& gate_up, const Tensor& out) = 0;

  // out[t] += Σ weights[t, j] * y[i] over the sorted rows i of token t, j ascending.
  //   y [M, H] act   weights [T, k] f32   out [T, H] act
  virtual void CombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                              const Tensor& out) = 0;

  // out = 0.   out [T, N] act
  virtual void Clear(const Tensor& out) = 0;

  // x += y, in place.   x, y [T, N] act
  virtual void Add(const Tensor& x, const Tensor& y) = 0;

  // out[r] = x[rows[r]].   x [T, N]   rows [R] i32   out [R, N], same type
  virtual void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) = 0;

  // Loading: out = the values of a weight slice, factors applied.   out [N, K] f32 or bf16
  virtual void Dequantize(const Weight& weight, const Tensor& out) = 0;

  // Loading: quantises to F8_E4M3 in 128×128 blocks, factor = max |x| / 448 (1 for a block of
  // zeros).
  //   x [N, K] f32 or bf16   out: values [N, K], scale_inv [⌈N/128⌉, ⌈K/128⌉], offsets 0
  virtual void QuantizeFp8(const Tensor& x, const Weight& out) = 0;
};

}  // namespace fathom
