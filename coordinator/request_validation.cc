#include "coordinator/request_validation.h"

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/grammar_fault.h"

namespace fathom {
namespace {

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// NaN is in no range.
bool IsWithin(float value, float low, float high) { return value >= low && value <= high; }

absl::Status CheckTokenIds(const char* field,
                           const google::protobuf::RepeatedField<uint32_t>& token_ids,
                           uint32_t vocab_size) {
  for (int i = 0; i < token_ids.size(); ++i) {
    if (token_ids[i] < vocab_size) continue;
    return Invalid(field, "[", i, "] must be in [0, ", vocab_size - 1, "], got ", token_ids[i],
                   ": that token id is out of vocabulary");
  }
  return absl::OkStatus();
}

absl::Status CheckChoice(const v1::SamplingParams& sampling) {
  if (sampling.has_temperature()) {
    const float temperature = sampling.temperature();
    if (temperature < 0) return Invalid("temperature must be non-negative, got ", temperature, ".");
    if (!IsWithin(temperature, 0, kMaxTemperature)) {
      return Invalid("temperature must be in [0, ", kMaxTemperature, "], got ", temperature, ".");
    }
  }
  if (sampling.has_top_p() && !(sampling.top_p() > 0 && sampling.top_p() <= 1)) {
    return Invalid("top_p must be in (0, 1], got ", sampling.top_p(), ".");
  }
  if (sampling.has_min_p() && !IsWithin(sampling.min_p(), 0, 1)) {
    return Invalid("min_p must be in [0, 1], got ", sampling.min_p(), ".");
  }
  return absl::OkStatus();
}

absl::Status CheckPenalties(const v1::SamplingParams& sampling) {
  if (sampling.has_presence_penalty() && !IsWithin(sampling.presence_penalty(), -2, 2)) {
    return Invalid("presence_penalty must be in [-2, 2], got ", sampling.presence_penalty(), ".");
  }
  if (sampling.has_frequency_penalty() && !IsWithin(sampling.frequency_penalty(), -2, 2)) {
    return Invalid("frequency_penalty must be in [-2, 2], got ", sampling.frequency_penalty(), ".");
  }
  if (!sampling.has_repetition_penalty()) return absl::OkStatus();
  const float penalty = sampling.repetition_penalty();
  if (penalty <= 0)
    return Invalid("repetition_penalty must be greater than zero, got ", penalty, ".");
  if (!IsWithin(penalty, kMinRepetitionPenalty, kMaxRepetitionPenalty)) {
    return Invalid("repetition_penalty must be in [", kMinRepetitionPenalty, ", ",
                   kMaxRepetitionPenalty, "], got ", penalty, ".");
  }
  return absl::OkStatus();
}

absl::Status CheckLogitBias(const v1::SamplingParams& sampling, uint32_t vocab_size) {
  if (sampling.logit_bias_size() > kMaxLogitBiases) {
    return Invalid("logit_bias must have at most ", kMaxLogitBiases, " entries, got ",
                   sampling.logit_bias_size());
  }
  std::unordered_set<uint32_t> seen;
  for (const v1::LogitBias& entry : sampling.logit_bias()) {
    if (entry.token_id() >= vocab_size) {
      return Invalid("token_id of logit_bias must be in [0, ", vocab_size - 1, "], got ",
                     entry.token_id(), ": that token id is out of vocabulary");
    }
    if (!IsWithin(entry.bias(), -100, 100)) {
      return Invalid("logit_bias of token ", entry.token_id(), " must be in [-100, 100], got ",
                     entry.bias());
    }
    if (!seen.insert(entry.token_id()).second) {
      return Invalid("logit_bias names token ", entry.token_id(), " twice");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLogprobs(const v1::SamplingParams& sampling, uint32_t vocab_size) {
  const uint32_t limit = std::min<uint32_t>(kMaxLogprobs, vocab_size);
  if (sampling.num_logprobs() > limit) {
    return Invalid("Requested sample logprobs of ", sampling.num_logprobs(),
                   ", which is greater than max allowed: ", limit);
  }
  if (sampling.num_prompt_logprobs() > limit) {
    return Invalid("Requested prompt logprobs of ", sampling.num_prompt_logprobs(),
                   ", which is greater than max allowed: ", limit);
  }
  return absl::OkStatus();
}

absl::Status CheckBadWords(const v1::SamplingParams& sampling, uint32_t vocab_size) {
  if (sampling.bad_words_size() > kMaxBadWords) {
    return Invalid("bad_words must have at most ", kMaxBadWords, " entries, got ",
                   sampling.bad_words_size());
  }
  for (const v1::TokenSequence& word : sampling.bad_words()) {
    if (word.token_ids().empty() || word.token_ids_size() > kMaxBadWordTokens) {
      return Invalid("a bad word must have 1 to ", kMaxBadWordTokens, " tokens, got ",
                     word.token_ids_size());
    }
    RETURN_IF_ERROR(CheckTokenIds("token_ids of bad_words", word.token_ids(), vocab_size));
  }
  return absl::OkStatus();
}

// What is wrong when nothing could be sampled, as far as that can be seen beforehand.
absl::Status CheckSomethingIsLeft(const v1::SamplingParams& sampling) {
  std::unordered_set<uint32_t> left(sampling.allowed_token_ids().begin(),
                                    sampling.allowed_token_ids().end());
  if (left.empty()) return absl::OkStatus();
  for (const v1::TokenSequence& word : sampling.bad_words()) {
    if (word.token_ids_size() == 1) left.erase(word.token_ids(0));
  }
  if (left.empty()) return Invalid("bad_words forbids all that allowed_token_ids allows");
  if (sampling.min_tokens() == 0) return absl::OkStatus();
  for (const uint32_t token_id : sampling.stop_token_ids()) left.erase(token_id);
  if (!left.empty()) return absl::OkStatus();
  return Invalid(
      "allowed_token_ids has nothing but stop tokens, which are not sampled before min_tokens=",
      sampling.min_tokens(), " tokens");
}

absl::Status CheckGrammar(const v1::SamplingParams& sampling, uint32_t vocab_size) {
  if (!sampling.has_grammar()) return absl::OkStatus();
  const v1::Grammar& grammar = sampling.grammar();
  if (!v1::Grammar::Kind_IsValid(grammar.kind()) ||
      grammar.kind() == v1::Grammar::KIND_UNSPECIFIED) {
    return Invalid("grammar.kind must be JSON_SCHEMA, REGEX, EBNF or STRUCTURAL_TAG, got ",
                   static_cast<int>(grammar.kind()));
  }
  if (grammar.text().empty() || grammar.text().size() > kMaxGrammarTextBytes) {
    return Invalid("grammar.text must have 1 to ", kMaxGrammarTextBytes, " bytes, got ",
                   grammar.text().size());
  }
  if (grammar.has_begins_after_token_id() && grammar.begins_after_token_id() >= vocab_size) {
    return Invalid("grammar.begins_after_token_id must be in [0, ", vocab_size - 1, "], got ",
                   grammar.begins_after_token_id(), ": that token id is out of vocabulary");
  }
  return absl::OkStatus();
}

absl::Status CheckSampling(const v1::SamplingParams& sampling, uint32_t vocab_size) {
  RETURN_IF_ERROR(CheckChoice(sampling));
  RETURN_IF_ERROR(CheckPenalties(sampling));
  RETURN_IF_ERROR(CheckLogitBias(sampling, vocab_size));
  RETURN_IF_ERROR(OfGrammar(CheckGrammar(sampling, vocab_size)));
  if (sampling.stop_token_ids_size() > kMaxStopTokenIds) {
    return Invalid("stop_token_ids must have at most ", kMaxStopTokenIds, " entries, got ",
                   sampling.stop_token_ids_size());
  }
  RETURN_IF_ERROR(CheckTokenIds("stop_token_ids", sampling.stop_token_ids(), vocab_size));
  if (sampling.allowed_token_ids_size() > kMaxAllowedTokenIds) {
    return Invalid("allowed_token_ids must have at most ", kMaxAllowedTokenIds, " entries, got ",
                   sampling.allowed_token_ids_size());
  }
  RETURN_IF_ERROR(CheckTokenIds("allowed_token_ids", sampling.allowed_token_ids(), vocab_size));
  RETURN_IF_ERROR(CheckBadWords(sampling, vocab_size));
  return CheckLogprobs(sampling, vocab_size);
}

absl::Status TooLong(uint64_t num_prompt_tokens, uint64_t max_tokens, uint64_t max_model_len) {
  const uint64_t max_prompt_tokens = max_tokens < max_model_len ? max_model_len - max_tokens : 0;
  return Invalid("You passed ", num_prompt_tokens, " input tokens and requested ", max_tokens,
                 " output tokens. However, the model's context length is only ", max_model_len,
                 " tokens, resulting in a maximum input length of ", max_prompt_tokens,
                 " tokens. Please reduce the length of the input prompt, or max_tokens.");
}

// The number of tokens to generate.
absl::StatusOr<int> ChooseMaxTokens(const v1::GenerateRequest& request, const ModelLimits& limits) {
  const uint64_t num_prompt_tokens = request.prompt_token_ids_size();
  const uint64_t max_model_len = limits.model.max_model_len();
  const uint64_t kv_cache_tokens = limits.kv_cache_tokens;
  if (request.has_max_tokens() && request.max_tokens() == 0 &&
      !request.sampling().has_num_prompt_logprobs()) {
    return Invalid("max_tokens must be at least 1, got 0. (0 goes with num_prompt_logprobs only.)");
  }
  // Left out, it is what there is room for; at least one token must be.
  const uint64_t wanted = request.has_max_tokens() ? request.max_tokens() : 1;
  if (num_prompt_tokens + wanted > max_model_len) {
    return TooLong(num_prompt_tokens, wanted, max_model_len);
  }
  if (num_prompt_tokens + wanted > kv_cache_tokens) {
    return Invalid("prompt and max_tokens need ", num_prompt_tokens + wanted,
                   " tokens of KV cache, which holds only ", kv_cache_tokens);
  }
  if (request.has_max_tokens()) return static_cast<int>(request.max_tokens());
  return static_cast<int>(std::min(max_model_len, kv_cache_tokens) - num_prompt_tokens);
}

std::vector<uint32_t> Sorted(const google::protobuf::RepeatedField<uint32_t>& token_ids) {
  std::vector<uint32_t> sorted(token_ids.begin(), token_ids.end());
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

// What the workers get: nothing left to choose there.
v1::SamplingParams SamplingForWorkers(const Request& request, const v1::SamplingParams& asked,
                                      uint32_t vocab_size, uint64_t default_seed) {
  v1::SamplingParams sampling = asked;
  if (!sampling.has_seed()) sampling.set_seed(default_seed);
  if (sampling.top_k() >= vocab_size) sampling.clear_top_k();  // all tokens
  std::vector<uint32_t> stops;
  std::set_union(request.eos_token_ids.begin(), request.eos_token_ids.end(),
                 request.stop_token_ids.begin(), request.stop_token_ids.end(),
                 std::back_inserter(stops));
  sampling.mutable_stop_token_ids()->Assign(stops.begin(), stops.end());
  return sampling;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Request>> ValidateRequest(const v1::GenerateRequest& request,
                                                               const ModelLimits& limits,
                                                               uint64_t default_seed) {
  const uint32_t vocab_size = limits.model.vocab_size();
  if (request.request_id().size() > kMaxRequestIdBytes) {
    return Invalid("request_id must have at most ", kMaxRequestIdBytes, " bytes, got ",
                   request.request_id().size());
  }
  if (request.cache_salt().size() > kMaxCacheSaltBytes) {
    return Invalid("cache_salt must have at most ", kMaxCacheSaltBytes, " bytes, got ",
                   request.cache_salt().size());
  }
  if (request.max_queue_ms() > kMaxQueueMilliseconds) {
    return Invalid("max_queue_ms must be at most ", kMaxQueueMilliseconds, ", got ",
                   request.max_queue_ms());
  }
  if (request.prompt_token_ids().empty()) {
    return Invalid("prompt_token_ids must have at least 1 token, got 0");
  }
  ASSIGN_OR_RETURN(const int max_tokens, ChooseMaxTokens(request, limits));
  RETURN_IF_ERROR(CheckTokenIds("prompt_token_ids", request.prompt_token_ids(), vocab_size));
  RETURN_IF_ERROR(CheckSampling(request.sampling(), vocab_size));
  if (request.sampling().min_tokens() > static_cast<uint32_t>(max_tokens)) {
    return Invalid("min_tokens must be less than or equal to max_tokens=", max_tokens, ", got ",
                   request.sampling().min_tokens(), ".");
  }

  auto validated = std::make_shared<Request>();
  validated->label = request.request_id();
  validated->prompt_token_ids.assign(request.prompt_token_ids().begin(),
                                     request.prompt_token_ids().end());
  validated->max_tokens = max_tokens;
  validated->min_tokens = static_cast<int>(request.sampling().min_tokens());
  validated->cache_salt = request.cache_salt();
  validated->priority = request.priority();
  validated->max_queue_milliseconds = static_cast<int>(request.max_queue_ms());
  validated->wants_prompt_logprobs = request.sampling().has_num_prompt_logprobs();
  if (!request.ignore_eos()) validated->eos_token_ids = Sorted(limits.model.eos_token_ids());
  validated->stop_token_ids = Sorted(request.sampling().stop_token_ids());
  validated->sampling =
      SamplingForWorkers(*validated, request.sampling(), vocab_size, default_seed);
  RETURN_IF_ERROR(CheckSomethingIsLeft(validated->sampling));
  return validated;
}

}  // namespace fathom
