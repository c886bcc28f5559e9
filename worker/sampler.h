// Logits to token ids, one row at a time, on rank 0.
//
// A row's logits go through these stages, in the order of vLLM's V1 sampler:
//   1. banned are tokens that a grammar forbids or that are not allowed, those that would complete
//      a bad word, and stop tokens while fewer than min_tokens tokens were generated;
//   2. logit_bias is added;
//   3. repetition penalty over prompt and output: logits above 0 are divided by it, others
//      multiplied; then frequency * count and presence are subtracted, over the output only;
//   4. greedy: the best token, ties to the lower id; otherwise
//   5. temperature; tokens less likely than min_p times the most likely one are dropped; the top_k
//      best stay; of those, the fewest best ones whose share reaches top_p;
//   6. one is drawn with the uniform number of (seed, position).
// Where tokens are equally likely the lower id counts as the better one (vLLM keeps all that tie
// with the k-th). With top_k = 1 this is greedy exactly.
//
// Nothing depends on the other rows of the batch or on earlier calls. Probabilities are computed in
// F64. A row that is not finite is the fault of its own sequence: Internal, and no other row is
// touched.
//
// Source: vLLM v0.16 v1/sample/sampler.py, ops/penalties.py, ops/topk_topp_sampler.py,
// logits_processor/builtin.py.
// Not thread-safe (keeps scratch memory).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/cpu/token_draw.h"
#include "kernels/ops.h"
#include "worker/sampling_params.h"

namespace fathom {

// How often each token occurs in a sequence, for the penalties.
class TokenCounts {
 public:
  void AddPromptToken(int32_t token_id) { output_counts_.try_emplace(token_id, 0); }
  void AddOutputToken(int32_t token_id) { ++output_counts_[token_id]; }

  // Of every token that occurs, how often in the output; 0 when only in the prompt.
  const absl::flat_hash_map<int32_t, int>& output_counts() const { return output_counts_; }

 private:
  absl::flat_hash_map<int32_t, int> output_counts_;
};

// What the sampler knows of the sequence that a row belongs to. Refers to things that outlive it.
struct SamplingContext {
  const SamplingParams& params;
  const TokenCounts& counts;                        // read only when params.has_penalties()
  absl::Span<const int32_t> output_token_ids = {};  // generated so far
  int64_t position = 0;  // of the token to be chosen, within the sequence
  // A bit for each token that may be chosen, 32 to the word; empty: all may.
  absl::Span<const uint32_t> allowed = {};

  int num_output_tokens() const { return static_cast<int>(output_token_ids.size()); }
};

struct TokenLogprobs {
  int32_t token_id = 0;
  float logprob = 0.0f;
  int rank = 0;                        // 1: the best token; ties to the lower id
  std::vector<int32_t> top_token_ids;  // best first
  std::vector<float> top_logprobs;
};

class Sampler {
 public:
  explicit Sampler(int vocab_size);

  //   logits [vocab_size] f32, as the model gave them
  // Internal names the position when they are not finite; InvalidArgument when what was asked for
  // leaves nothing to choose.
  absl::StatusOr<int32_t> Sample(absl::Span<const float> logits, const SamplingContext& context);

  // What the model itself thought of `token_id` at `position`, and of the `num_top` best tokens:
  // log-softmax of the logits before any of the stages above. Internal as in Sample.
  absl::StatusOr<TokenLogprobs> Logprobs(absl::Span<const float> logits, int32_t token_id,
                                         int num_top, int64_t position);

  // Whether the logits stay as they are, so that Ops::SampleTokens can do what Sample does; and
  // how.
  static bool IsPlain(const SamplingContext& context);
  static SamplingRow RowOf(const SamplingContext& context);
  // What Sample says of logits that are not finite.
  static absl::Status NotFinite(int64_t position);

 private:
  absl::Span<const float> Adjust(absl::Span<const float> logits, const SamplingContext& context);
  // The bans of stage 1.
  void BanWhatGrammarForbids(absl::Span<const uint32_t> allowed);
  // min_tokens: no stop token, unless the grammar leaves nothing else.
  void BanStopTokens(const SamplingContext& context);
  void BanAllBut(absl::Span<const int32_t> token_ids);
  void BanBadWords(const SamplingContext& context);
  void AddPenalties(const SamplingContext& context);

  const int vocab_size_;
  std::vector<float> adjusted_;
  std::vector<std::pair<int32_t, float>> kept_;  // scratch of BanAllBut
  TokenDraw draw_;
  std::vector<int32_t> order_;
};

}  // namespace fathom
