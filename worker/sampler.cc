#include "worker/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
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
  // min_p and top_k both keep a run of the best tokens, so their order does not matter; this one
  // computes fewer exponentials.
  if (params.top_k > 0) {
    CollectTopK(logits, params.top_k);
  } else {
    CollectAll(logits);
  }
  for (Candidate& candidate : candidates_) {
    candidate.weight =
        std::exp((static_cast<double>(candidate.logit) - best_logit) * inverse_temperature);
  }
  const double least_weight = std::max<double>(params.min_p, std::numeric_limits<double>::min());
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < least_weight; });
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

void Sampler::CollectAll(absl::Span<const float> logits) {
  candidates_.resize(logits.size());
  for (int32_t id = 0; id < vocab_size_; ++id) candidates_[id] = {id, logits[id], 0.0};
}

void Sampler::CollectTopK(absl::Span<const float> logits, int top_k) {
  const int num_kept = std::min(top_k, vocab_size_);
  candidates_.resize(num_kept);
  for (int32_t id = 0; id < num_kept; ++id) candidates_[id] = {id, logits[id], 0.0};
  // A heap with the worst one in front. Ids ascend, so who ties with it is worse.
  std::make_heap(candidates_.begin(), candidates_.end(), IsBetter);
  for (int32_t id = num_kept; id < vocab_size_; ++id) {
    if (logits[id] <= candidates_.front().logit) continue;
    std::pop_heap(candidates_.begin(), candidates_.end(), IsBetter);
    candidates_.back() = {id, logits[id], 0.0};
    std::push_heap(candidates_.begin(), candidates_.end(), IsBetter);
  }
}

void Sampler::KeepTopP(double top_p) {
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double enough = top_p * total;

  // All tokens below this weight together weigh less than 1 - top_p of the total, so the choice
  // never reaches them. Halved against rounding.
  const double hopeless = 0.5 * (1.0 - top_p) * total / static_cast<double>(candidates_.size());
  ranked_.clear();
  std::copy_if(candidates_.begin(), candidates_.end(), std::back_inserter(ranked_),
               [&](const Candidate& c) { return c.weight >= hopeless; });

  // Halves the range in which the last kept token lies until it is worth sorting: everything before
  // `first` is kept, and nothing from `last` on.
  constexpr ptrdiff_t kWorthSorting = 32;
  auto first = ranked_.begin();
  auto last = ranked_.end();
  double before = 0.0;
  while (last - first > kWorthSorting) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, IsBetter);
    double half = 0.0;
    for (auto candidate = first; candidate != middle; ++candidate) half += candidate->weight;
    if (before + half >= enough) {
      last = middle;
    } else {
      before += half;
      first = middle;
    }
  }
  std::sort(first, last, IsBetter);
  while (first != last && (first == ranked_.begin() || before < enough)) {
    before += first->weight;
    ++first;
  }
  const auto worst = std::max_element(ranked_.begin(), first, IsBetter);
  std::erase_if(candidates_, [&](const Candidate& c) { return IsBetter(*worst, c); });
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
