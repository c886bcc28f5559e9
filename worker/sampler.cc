#include "worker/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

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

}  // namespace

Sampler::Sampler(int vocab_size) : vocab_size_(vocab_size) { CHECK_GT(vocab_size, 0); }

absl::StatusOr<int32_t> Sampler::Sample(absl::Span<const float> logits,
                                        const SamplingContext& context) {
  CHECK_EQ(static_cast<int>(logits.size()), vocab_size_);
  if (!AllFinite(logits)) return NotFinite(context.position);
  SamplingRow how = Sampler::RowOf(context);
  how.may_ban = 1;
  const int32_t token_id = draw_.Draw(Adjust(logits, context).data(), vocab_size_, how);
  if (token_id >= 0) return token_id;
  return absl::InvalidArgumentError(absl::StrCat(
      "bans, penalties and the grammar leave no token to choose at position ", context.position));
}

bool Sampler::IsPlain(const SamplingContext& context) {
  const SamplingParams& params = context.params;
  const bool bans_stop_tokens =
      context.num_output_tokens() < params.min_tokens && !params.stop_token_ids.empty();
  return !bans_stop_tokens && context.allowed.empty() && params.logit_bias.empty() &&
         !params.has_penalties() && params.allowed_token_ids.empty() && params.bad_words.empty();
}

SamplingRow Sampler::RowOf(const SamplingContext& context) {
  const SamplingParams& params = context.params;
  SamplingRow row;
  if (params.greedy()) return row;
  row.inverse_temperature = 1.0 / static_cast<double>(params.temperature);
  row.uniform = PhiloxUniform(params.seed, context.position);
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  row.top_k = params.top_k;
  return row;
}

absl::Status Sampler::NotFinite(int64_t position) {
  return absl::InternalError(absl::StrCat("logits are not finite at position ", position));
}

absl::Span<const float> Sampler::Adjust(absl::Span<const float> logits,
                                        const SamplingContext& context) {
  const SamplingParams& params = context.params;
  if (IsPlain(context)) return logits;

  adjusted_.assign(logits.begin(), logits.end());
  if (!context.allowed.empty()) BanWhatGrammarForbids(context.allowed);
  if (!params.allowed_token_ids.empty()) BanAllBut(params.allowed_token_ids);
  BanBadWords(context);
  if (context.num_output_tokens() < params.min_tokens) BanStopTokens(context);
  for (const auto& [token_id, bias] : params.logit_bias) adjusted_[token_id] += bias;
  if (params.has_penalties()) AddPenalties(context);
  return adjusted_;
}

void Sampler::BanWhatGrammarForbids(absl::Span<const uint32_t> allowed) {
  CHECK_GE(allowed.size() * 32, adjusted_.size());
  for (size_t begin = 0; begin < adjusted_.size(); begin += 32) {
    const uint32_t word = allowed[begin / 32];
    if (word == ~uint32_t{0}) continue;
    const size_t end = std::min(begin + 32, adjusted_.size());
    for (size_t id = begin; id < end; ++id) {
      if ((word >> (id - begin) & 1) == 0) adjusted_[id] = kBanned;
    }
  }
}

void Sampler::BanStopTokens(const SamplingContext& context) {
  kept_.clear();
  for (const int32_t token_id : context.params.stop_token_ids) {
    kept_.emplace_back(token_id, std::exchange(adjusted_[token_id], kBanned));
  }
  if (context.allowed.empty()) return;
  const bool is_something_left =
      std::any_of(adjusted_.begin(), adjusted_.end(), [](float x) { return x != kBanned; });
  if (is_something_left) return;
  // The grammar has come to its end.
  for (const auto& [token_id, logit] : kept_) {
    if (logit != kBanned) adjusted_[token_id] = logit;
  }
}

void Sampler::BanAllBut(absl::Span<const int32_t> token_ids) {
  kept_.clear();
  for (const int32_t token_id : token_ids) kept_.emplace_back(token_id, adjusted_[token_id]);
  std::fill(adjusted_.begin(), adjusted_.end(), kBanned);
  for (const auto& [token_id, logit] : kept_) adjusted_[token_id] = logit;
}

void Sampler::BanBadWords(const SamplingContext& context) {
  const absl::Span<const int32_t> output = context.output_token_ids;
  for (const std::vector<int32_t>& word : context.params.bad_words) {
    const size_t num_before = word.size() - 1;
    if (num_before > output.size()) continue;
    const absl::Span<const int32_t> tail = output.last(num_before);
    if (std::equal(tail.begin(), tail.end(), word.begin())) adjusted_[word.back()] = kBanned;
  }
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
