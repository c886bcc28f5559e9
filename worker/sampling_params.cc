#include "worker/sampling_params.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/sampling.pb.h"

namespace fathom {
namespace {

// Comparisons are written so that NaN fails them.
absl::Status CheckWithin(const char* field, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is ", value, ", expected ", low, " to ", high));
}

absl::Status CheckAbove(const char* field, float value, float low) {
  if (value > low && std::isfinite(value)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is ", value, ", expected a number above ", low));
}

absl::Status CheckTokenId(const char* field, uint32_t token_id, int vocab_size) {
  if (token_id < static_cast<uint32_t>(vocab_size)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      field, " names token ", token_id, ", but the vocabulary has ", vocab_size, " tokens"));
}

absl::Status CheckEntries(const char* field, int entries,
                          int limit = SamplingParams::kMaxListEntries) {
  if (entries <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", entries, " entries, limit ", limit));
}

absl::StatusOr<std::vector<int32_t>> TokenIds(
    const char* field, const google::protobuf::RepeatedField<uint32_t>& token_ids, int limit,
    int vocab_size) {
  RETURN_IF_ERROR(CheckEntries(field, token_ids.size(), limit));
  for (const uint32_t token_id : token_ids) {
    RETURN_IF_ERROR(CheckTokenId(field, token_id, vocab_size));
  }
  return std::vector<int32_t>(token_ids.begin(), token_ids.end());
}

absl::StatusOr<int> LogprobsWanted(const char* field, uint32_t value, int vocab_size) {
  const uint32_t limit = std::min(vocab_size, SamplingParams::kMaxLogprobs);
  if (value <= limit) return static_cast<int>(value);
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, ", limit ", limit));
}

absl::Status ParseLists(const v1::SamplingParams& message, int vocab_size, SamplingParams& params) {
  RETURN_IF_ERROR(CheckEntries("logit_bias", message.logit_bias_size()));
  for (const v1::LogitBias& entry : message.logit_bias()) {
    RETURN_IF_ERROR(CheckTokenId("logit_bias", entry.token_id(), vocab_size));
    RETURN_IF_ERROR(CheckWithin("logit_bias", entry.bias(), -100.0f, 100.0f));
    params.logit_bias.emplace_back(static_cast<int32_t>(entry.token_id()), entry.bias());
  }
  ASSIGN_OR_RETURN(params.stop_token_ids, TokenIds("stop_token_ids", message.stop_token_ids(),
                                                   SamplingParams::kMaxListEntries, vocab_size));
  ASSIGN_OR_RETURN(params.allowed_token_ids,
                   TokenIds("allowed_token_ids", message.allowed_token_ids(),
                            SamplingParams::kMaxAllowedTokenIds, vocab_size));
  RETURN_IF_ERROR(CheckEntries("bad_words", message.bad_words_size()));
  for (const v1::TokenSequence& word : message.bad_words()) {
    if (word.token_ids().empty()) {
      return absl::InvalidArgumentError("bad_words has a word without tokens");
    }
    params.bad_words.emplace_back();
    ASSIGN_OR_RETURN(
        params.bad_words.back(),
        TokenIds("bad_words", word.token_ids(), SamplingParams::kMaxListEntries, vocab_size));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Grammar> ParseGrammar(const v1::Grammar& message) {
  const int kind = message.kind();
  if (kind < v1::Grammar::KIND_JSON_SCHEMA || kind > v1::Grammar::KIND_STRUCTURAL_TAG) {
    return absl::InvalidArgumentError(absl::StrCat(
        "grammar.kind is ", kind, ", expected JSON_SCHEMA, REGEX, EBNF or STRUCTURAL_TAG"));
  }
  if (message.text().empty() || message.text().size() > kMaxGrammarBytes) {
    return absl::InvalidArgumentError(absl::StrCat("grammar.text has ", message.text().size(),
                                                   " bytes, expected 1 to ", kMaxGrammarBytes));
  }
  return Grammar{.kind = Grammar::Kind{kind}, .text = message.text()};
}

absl::StatusOr<SamplingParams> ParseSamplingParams(const v1::SamplingParams& message,
                                                   int vocab_size) {
  SamplingParams params;
  if (message.has_temperature()) {
    RETURN_IF_ERROR(CheckWithin("temperature", message.temperature(), 0.0f, 1e6f));
    params.temperature = message.temperature() < SamplingParams::kGreedyBelow
                             ? 0.0f
                             : std::max(message.temperature(), SamplingParams::kLowestTemperature);
  }
  if (message.has_top_p()) {
    RETURN_IF_ERROR(CheckAbove("top_p", message.top_p(), 0.0f));
    RETURN_IF_ERROR(CheckWithin("top_p", message.top_p(), 0.0f, 1.0f));
    params.top_p = message.top_p();
  }
  if (message.has_top_k()) {
    params.top_k = static_cast<int>(std::min(message.top_k(), static_cast<uint32_t>(vocab_size)));
  }
  if (message.has_min_p()) {
    RETURN_IF_ERROR(CheckWithin("min_p", message.min_p(), 0.0f, 1.0f));
    params.min_p = message.min_p();
  }
  if (message.has_repetition_penalty()) {
    RETURN_IF_ERROR(CheckAbove("repetition_penalty", message.repetition_penalty(), 0.0f));
    params.repetition_penalty = message.repetition_penalty();
  }
  if (message.has_presence_penalty()) {
    RETURN_IF_ERROR(CheckWithin("presence_penalty", message.presence_penalty(), -2.0f, 2.0f));
    params.presence_penalty = message.presence_penalty();
  }
  if (message.has_frequency_penalty()) {
    RETURN_IF_ERROR(CheckWithin("frequency_penalty", message.frequency_penalty(), -2.0f, 2.0f));
    params.frequency_penalty = message.frequency_penalty();
  }
  RETURN_IF_ERROR(ParseLists(message, vocab_size, params));
  if (message.has_grammar()) {
    ASSIGN_OR_RETURN(params.grammar, ParseGrammar(message.grammar()));
    if (message.grammar().has_begins_after_token_id()) {
      const uint32_t token_id = message.grammar().begins_after_token_id();
      RETURN_IF_ERROR(CheckTokenId("grammar.begins_after_token_id", token_id, vocab_size));
      params.grammar_begins_after = static_cast<int32_t>(token_id);
    }
  }
  params.seed = message.seed();
  params.min_tokens = static_cast<int>(std::min<uint32_t>(message.min_tokens(), INT32_MAX));
  if (message.has_num_logprobs()) {
    ASSIGN_OR_RETURN(params.num_logprobs,
                     LogprobsWanted("num_logprobs", message.num_logprobs(), vocab_size));
  }
  if (message.has_num_prompt_logprobs()) {
    ASSIGN_OR_RETURN(
        params.num_prompt_logprobs,
        LogprobsWanted("num_prompt_logprobs", message.num_prompt_logprobs(), vocab_size));
  }
  return params;
}

}  // namespace fathom
