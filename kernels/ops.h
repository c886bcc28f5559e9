// The mathematics of the DeepSeek-V3 family, one function per step of the forward pass.
//
// Shapes use these letters: T tokens of the step, H hidden_size, N output and K input width of a
// linear layer, A attention heads of this rank, R kv_lora_rank, P qk_rope_head_dim, D
// qk_nope_head_dim, V v_head_dim, Q q_lora_rank (0 without), E experts of this rank, k choices of a
// token, M = T * k rows routed to experts, S sequences of the step.
// "act" is the activation type, F32 or BF16, the same for all act tensors of one call. Everything
// is accumulated in F32; where a step of several parts rounds to act in between, it says so. Shapes
// and types are CHECKed: they are our own doing, never a client's.
//
// Rows are independent: what is computed for a token depends on nothing but that token (and, in
// attention, on the sequence before it), bit by bit: not on T, on its place in the batch, or on how
// the prompt was cut into chunks. (On a GPU only to rounding: cuda/cuda_ops.h.) Outputs must not
// overlap inputs unless it says "in place".
//
// Not thread-safe; asynchronous on a GPU, complete on return on the CPU.
#pragma once

#include <cstdint>

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
inline constexpr float kSmallestQuantizedMagnitude = 1e-4f;  // of 1×128, see LinearInput

// What a linear layer reads, and what the operation before it writes in the form it is given: rows
// in act, or F8_E4M3 with one F32 factor per row and 128 columns ("1×128"):
// factor = max(max |x|, 1e-4) / 448, value = x / factor (divided, not multiplied), rounded to
// nearest. What is quantised was rounded to act before. With F8_E4M3 weights this is DeepSeek's
// arithmetic ("W8A8"): products within 128 columns are summed, then times both factors, in F32.
// Source: DeepSeek-V3 report §3.3.2; deepseek-ai/DeepSeek-V3 inference/kernel.py, act_quant,
// fp8_gemm.
struct LinearInput {
  LinearInput() = default;
  LinearInput(const Tensor& values, const Tensor& scales = {}) : values(values), scales(scales) {}

  bool present() const { return values.present(); }
  bool quantized() const { return scales.present(); }

  Tensor values;  // [T, K] act or F8_E4M3
  Tensor scales;  // F8_E4M3 only: [T, ⌈K / 128⌉] f32
};

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
  // Shared experts that stand behind the routed ones in the same stack: every token chooses all of
  // them, with weight 1. They have the ids n_routed_experts, n_routed_experts + 1, …
  int num_shared_experts = 0;

  constexpr int num_choices() const { return num_experts_per_tok + num_shared_experts; }  // k
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
  // The same numbers where the host can read them, alive as long as the step.
  const int32_t* host_query_start = nullptr;
  const int32_t* host_context_lens = nullptr;
};

// What turns latents into keys and values, split from kv_b_proj.
struct MlaWeights {
  Tensor w_uk;  // [A, R, D] act: key = latent · w_uk; the query absorbs it: q_latent = w_uk · q
  Tensor w_uv;  // [A, V, R] act: value = w_uv · latent
};

// Rows of a step sorted by the expert of this rank that they go to.
struct ExpertGroups {
  Tensor
      rows;  // [M] i32: token * k + choice, ascending within an expert; the first offsets[E] count
  Tensor offsets;  // [E + 1] i32: expert e owns rows [offsets[e], offsets[e + 1])
  // The device's own notes about the sorted rows, from Route to GroupedLinear and CombineExperts.
  Tensor notes;  // [NumGroupNotes(E, M)] i32
};
constexpr int64_t NumGroupNotes(int64_t num_experts, int64_t num_rows) {
  return 4 * (1 + num_experts + num_rows / 8) + num_rows;
}

// Which experts each token goes to, and how much each one counts.
struct Routes {
  Tensor logits;   // [T, n_routed_experts] f32: gate output, before the scoring function
  Tensor experts;  // [T, k] i32: best first, ties to the lower id; then the shared ones
  Tensor
      weights;  // [T, k] f32: times routed_scaling_factor; normalised first if asked; 1 if shared
  ExpertGroups groups;
};

// Of DownAndCombine: what stands between its parts, of no use afterwards.
struct ExpertRoom {
  LinearInput activated;  // [M, K], as GroupedLinear is to read it
  Tensor y;               // [M, H] act
};

// How a row of logits becomes a token: stages 4 to 6 of worker/sampler.h.
struct SamplingRow {
  double inverse_temperature = 0.0;  // 0: the best token, ties to the lower id
  double uniform = 0.0;              // [0, 1), a multiple of 2^-53: where the draw falls
  float top_p = 1.0f;                // (0, 1]
  float min_p = 0.0f;                // [0, 1]
  int32_t top_k = 0;                 // 0: all
  int32_t may_ban = 0;    // whether -inf is a ban; else it is a fault, as inf and NaN are
  int32_t logit_row = 0;  // of the logits of the step
  int32_t unused = 0;
};
inline constexpr int64_t kSamplingRowWords = sizeof(SamplingRow) / sizeof(int32_t);

// The largest steps that will come, of one model, as this rank sees it.
struct StepLimits {
  DType act = DType::kF32;
  DType kv_cache_dtype = DType::kF32;
  int64_t max_tokens = 0;        // T
  int64_t max_sequences = 0;     // S
  int64_t max_model_len = 0;     // tokens of one sequence
  int64_t block_size = 0;        // tokens per block
  int64_t num_layers = 0;        // calls of MlaAttention in a step
  int64_t hidden_size = 0;       // H
  int64_t heads = 0;             // A
  int64_t qk_nope_head_dim = 0;  // D
  int64_t qk_rope_head_dim = 0;  // P
  int64_t kv_lora_rank = 0;      // R
  int64_t v_head_dim = 0;        // V
  int64_t n_routed_experts = 0;  // of the router
  int64_t num_experts = 0;       // E, the largest of any layer
  int64_t num_choices = 0;       // k, the same
  int64_t widest_linear = 0;     // largest N or K of a linear layer
};

class Ops {
 public:
  virtual ~Ops() = default;

  // Memory that operations need beside their arguments for steps within `limits`, so that a memory
  // plan can count it and no step allocates. UseScratch gives it to them, zero-filled, before the
  // first step; it stays theirs until UseScratch is called again or they are destroyed.
  //   memory: ScratchBytes(limits) bytes, of Device::Allocate
  virtual int64_t ScratchBytes(const StepLimits&) const { return 0; }
  virtual void UseScratch(const StepLimits&, void* /*memory*/) {}

  // Before the first layer of a step: what all layers share may be worked out now. `batch` is the
  // one that the step's calls of MlaAttention get.
  //
  // What follows may be a recording (Device::Record) of a step with the same shapes and other
  // numbers: operations may choose kernels and launch sizes by the shapes of their tensors, never
  // by what the host reads in `batch`, unless it holds for every step of these shapes. Of a
  // recorded step all sequences have one token. BeginStep itself is never recorded.
  virtual void BeginStep(const AttentionBatch& batch) = 0;

  // out[t] = table[token_ids[t] - first_row]; zero where this rank does not hold the row.
  //   token_ids [T] i32   table [rows, H] f32 or bf16   out [T, H] act
  virtual void Embed(const Tensor& token_ids, const Tensor& table, int first_row,
                     const Tensor& out) = 0;

  // x += y, in place, unless y is absent; then normed = x / sqrt(mean(x²) + eps) * weight.
  //   x, y [T, N] act   weight [N] f32 or bf16   normed [T, N] act, or absent   quantized [T, N]:
  //   normed, in 1×128, or absent. Rows may be strided. x may be normed, without y.
  virtual void AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                          const Tensor& normed, const LinearInput& quantized) = 0;

  // out = x · weightᵀ.   x [T, K] act, f32 or quantised   weight [N, K]   out [T, N] act or f32.
  // Rows may be strided.
  virtual void Linear(const LinearInput& x, const Weight& weight, const Tensor& out) = 0;

  // The two latents of each token, side by side: norms the query's for its next linear layer, norms
  // the KV one, rotates the key, and writes both to the cache: cache[place] = [latent | key].
  //   qkv_a [T, Q + R + P] act   q_norm [Q] f32, absent if Q is 0   kv_norm [R] f32
  //   positions [T] i32   cos_sin [max positions, P / 2, 2] f32, amplitude included
  //   places [T] i32: block id * block_size + offset
  //   q_a [T, Q] out, absent if Q is 0   cache: see MlaAttention
  // Rotary embedding turns neighbouring pairs (2i, 2i + 1).
  // Source: deepseek-ai/DeepSeek-V3 inference/model.py, class MLA, apply_rotary_emb.
  virtual void StoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm,
                            float eps, const Tensor& positions, const Tensor& cos_sin,
                            const Tensor& places, const LinearInput& q_a, const Tensor& cache) = 0;

  // Multi-head latent attention over the cached latents, causal:
  //   score = scale * (q_nope · key + rotated q_rope · cached key);  out = softmax(score) · value
  // in the latent space (weights absorbed) or on keys and values computed from it: the same.
  //   q [T, A, D + P] act, not yet rotated   positions, cos_sin as in StoreLatents
  //   cache [blocks, block_size, R + P] f32 or bf16; or F8_E4M3 [blocks, block_size, bytes] with
  //   R + 4 * ⌈R / 128⌉ + 2 * P bytes: the latent in 1×128, its factors (f32), the rotated key
  //   (bf16); factors begin at byte R, the key behind them
  //   out [T, A * V]
  // Source: DeepSeek-V2 report §2.1.2–2.1.3; inference/model.py, class MLA.
  virtual void MlaAttention(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                            const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                            float scale, const LinearInput& out) = 0;

  // The router: logits = x · gateᵀ in F32, the experts of each token, and the rows of the experts
  // [first_expert, first_expert + E) sorted by expert.
  //   x [T, H] act   gate [n_routed_experts, H] f32 or bf16   bias [n_routed_experts] f32, kNoauxTc
  //   only: steers the choice, never the weight   routes: out
  // Source: DeepSeek-V3 report §2.1.2; inference/model.py, class Gate (dropped groups masked with
  // -inf).
  virtual void Route(const Tensor& x, const Tensor& gate, const Tensor& bias,
                     const RoutingConfig& config, int first_expert, const Routes& routes) = 0;

  // out[i] = x[row of i] · weight[expert of i]ᵀ for the sorted rows i.
  //   x [T, K]: row of i is groups.rows[i] / k;   or [M, K]: row i itself. Which of the two its
  //   number of rows says; with k = 1 it cannot, and num_choices = 0 means the second.
  //   weight [E, N, K]   out [M, N] act, may be strided; rows past offsets[E] are left alone
  virtual void GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                             int num_choices, const Tensor& out) = 0;

  // out = silu(gate) * up.   gate_up [rows, 2 * N] act: [gate | up]   out [rows, N]
  // With groups: only of the rows that some expert of this rank owns.
  virtual void SwiGlu(const Tensor& gate_up, const ExpertGroups* groups,
                      const LinearInput& out) = 0;

  // out[t] = Σ weights[t, j] * y[i] over the sorted rows i of token t, j ascending; plus out[t] as
  // it was, if `accumulate`.
  //   y [M, H] act   routes: of Route   out [T, H] act
  virtual void CombineExperts(const Tensor& y, const Routes& routes, bool accumulate,
                              const Tensor& out) = 0;

  // out[r] = x[rows[r]].   x [T, N]   rows [R] i32   out [R, N], same type
  virtual void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) = 0;

  // Picks a token for each of `rows`; -1 where a logit is faulty or nothing is left to choose.
  //   logits [L, V] f32   rows [S, kSamplingRowWords] i32: SamplingRow   tokens [S] i32, out
  virtual void SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) = 0;

  // x += y, in place.   x, y [T, N] act
  virtual void Add(const Tensor& x, const Tensor& y) = 0;

  // Loading: out = the values of a weight slice, factors applied.   out [N, K] f32 or bf16
  virtual void Dequantize(const Weight& weight, const Tensor& out) = 0;

  // Loading: quantises to F8_E4M3 in 128×128 blocks, factor = max |x| / 448 (1 for a block of
  // zeros).
  //   x [N, K] f32 or bf16   out: values [N, K], scale_inv [⌈N/128⌉, ⌈K/128⌉], offsets 0
  virtual void QuantizeFp8(const Tensor& x, const Weight& out) = 0;

  // Random numbers instead of a checkpoint's (random_bits.h): uniform in [-amplitude, amplitude],
  // from a counter and `seed`; of F8_E4M3 all values below 1 in magnitude, whatever the amplitude.
  //   out f32, bf16 or F8_E4M3, dense
  virtual void FillRandom(const Tensor& out, float amplitude, uint64_t seed) = 0;

  // Several of the above in one. From gate and up of the experts to what they add to each token:
  // SwiGlu, GroupedLinear and CombineExperts, which a device may make fewer kernels of.
  //   gate_up [M, 2 * K] act   weight [E, H, K]   room: what may be written in between   the rest:
  //   as there
  virtual void DownAndCombine(const Tensor& gate_up, const Routes& routes, const Weight& weight,
                              bool accumulate, const ExpertRoom& room, const Tensor& out) {
    SwiGlu(gate_up, &routes.groups, room.activated);
    GroupedLinear(room.activated, routes.groups, weight, /*num_choices=*/0, room.y);
    CombineExperts(room.y, routes, accumulate, out);
  }
};

}  // namespace fathom
