#include "worker/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/philox.h"

namespace fathom {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

bool AllFinite(absl::Span<const float> logits) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (const float logit : logits) {
    found |= (std::bit_cast<uint32_t>(logit) & kExponent) == kExponent ? 1u : 0u;
  }
  return found == 0;
}

absl::Status NotFinite(int64_t position) {
  return absl::InternalError(absl::StrCat("logits are not finite at position ", position));
}

// The first of the largest.
int32_t ArgMax(absl::Span<const float> logits) {
  int32_t best = 0;
  for (int32_t id = 1; id < static_cast<int32_t>(logits.size()); ++id) {
    if (logits[id] > logits[best]) best = id;
  }
  return best;
}

}  // namespace

Sampler::Sampler(int vocab_size) : vocab_size_(vocab_size) { CHECK_GT(vocab_size, 0); }

absl::StatusOr<int32_t> Sampler::Sample(absl::Span<const float> logits,
                                        const SamplingContext& context) {
  CHECK_EQ(static_cast<int>(logits.size()), vocab_size_);
  if (!AllFinite(logits)) return NotFinite(context.position);
  const absl::Span<const float> adjusted = Adjust(logits, context);
  const int32_t best = ArgMax(adjusted);
  if (!std::isfinite(adjusted[best])) {
    return absl::InternalError(
        absl::StrCat("bans and penalties leave no token to choose at position ", context.position));
  }
  if (context.params.greedy() || context.params.top_k == 1) return best;
  return Draw(adjusted, adjusted[best], context);
}

absl::Span<const float> Sampler::Adjust(absl::Span<const float> logits,
                                        const SamplingContext& context) {
  const SamplingParams& params = context.params;
  const bool bans_stop_tokens =
      context.num_output_tokens < params.min_tokens && !params.stop_token_ids.empty();
  if (!bans_stop_tokens && params.logit_bias.empty() && !params.has_penalties()) return logits;

  adjusted_.assign(logits.begin(), logits.end());
  if (bans_stop_tokens) {
    for (const int32_t token_id : params.stop_token_ids) adjusted_[token_id] = kBanned;
  }
  for (const auto& [token_id, bias] : params.logit_bias) adjusted_[token_id] += bias;
  if (params.has_penalties()) AddPenalties(context);
  return adjusted_;
}

void Sampler::AddPenalties(const SamplingContext& context) {
  const SamplingParams& params = context.params;
  for (const auto& [token_id, output_count] : context.counts.output_counts()) {
    float& logit = adjusted_[token_id];
    if (logit == kBanned) continue;
    logit = logit > 0.0f ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (output_count == 0) continue;
    logit -= params.frequency_penalty * static_cast<float>(output_count);
    logit -= params.presence_penalty;
  }
}

int32_t Sampler::Draw(absl::Span<const float> logits, float best_logit,
                      const SamplingContext& context) {
  const SamplingParams& params = context.params;
  const double inverse_temperature = 1.0 / static_cast<double>(params.temperature);
  candidates_.clear();
  for (int32_t id = 0; id < vocab_size_; ++id) {
    const double weight =
        std::exp((static_cast<double>(logits[id]) - best_logit) * inverse_temperature);
    if (weight > 0.0 && weight >= params.min_p) candidates_.push_back({id, logits[id], weight});
  }
  if (params.top_k > 0) KeepTopK(params.top_k);
  if (params.top_p < 1.0f) KeepTopP(params.top_p);

  // In the order of ids, so that rounding does not depend on how the best ones were found.
  const auto by_id = [](const Candidate& a, const Candidate& b) { return a.token_id < b.token_id; };
  if (!std::is_sorted(candidates_.begin(), candidates_.end(), by_id)) {
    std::sort(candidates_.begin(), candidates_.end(), by_id);
  }
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double target = PhiloxUniform(params.seed, context.position) * total;
  double cumulative = 0.0;
  for (const Candidate& candidate : candidates_) {
    cumulative += candidate.weight;
    if (target < cumulative) return candidate.token_id;
  }
  return candidates_.back().token_id;
}

void Sampler::KeepTopK(int top_k) {
  if (static_cast<size_t>(top_k) >= candidates_.size()) return;
  std::nth_element(candidates_.begin(), candidates_.begin() + top_k, candidates_.end(),
                   [](const Candidate& a, const Candidate& b) {
                     return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
                   });
  candidates_.resize(top_k);
}

void Sampler::KeepTopP(double top_p) {
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;

  // All tokens below this weight together weigh less than 1 - top_p of the total, so the choice
  // never reaches them, and they need not be sorted. Halved against rounding.
  const double hopeless = 0.5 * (1.0 - top_p) * total / static_cast<double>(candidates_.size());
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < hopeless; });
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
  });
  double before = 0.0;
  size_t kept = 0;
  while (kept < candidates_.size() && (kept == 0 || before < top_p * total)) {
    before += candidates_[kept++].weight;
  }
  candidates_.resize(kept);
}

absl::StatusOr<TokenLogprobs> Sampler::Logprobs(absl::Span<const float> logits, int32_t token_id,
                                                int num_top, int64_t position) {
  CHECK_EQ(static_cast<int>(logits.size()), vocab_size_);
  CHECK(token_id >= 0 && token_id < vocab_size_) << "token " << token_id;
  if (!AllFinite(logits)) return NotFinite(position);

  const double best = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(logit - best);
  const double log_sum = best + std::log(sum);
  const auto better = [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };

  TokenLogprobs result;
  result.token_id = token_id;
  result.logprob = static_cast<float>(logits[token_id] - log_sum);
  result.rank = 1;
  for (int32_t id = 0; id < vocab_size_; ++id) result.rank += better(id, token_id) ? 1 : 0;
  if (num_top == 0) return result;

  const int top = std::min(num_top, vocab_size_);
  order_.resize(vocab_size_);
  std::iota(order_.begin(), order_.end(), 0);
  std::partial_sort(order_.begin(), order_.begin() + top, order_.end(), better);
  result.top_token_ids.assign(order_.begin(), order_.begin() + top);
  for (const int32_t id : result.top_token_ids) {
    result.top_logprobs.push_back(static_cast<float>(logits[id] - log_sum));
  }
  return result;
}

}  // namespace fathom
