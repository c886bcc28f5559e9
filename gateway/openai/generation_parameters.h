// The fields that completions and chat completions share: how to sample, when to stop, what to
// send back.
//
// Field names, defaults and messages are those of vLLM's OpenAI server 0.16
// (vllm/entrypoints/openai/{completion,chat_completion}/protocol.py, vllm/sampling_params.py).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/generation_config.h"
#include "gateway/openai/json_fields.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/structured_output.h"
#include "gateway/text/stop_matcher.h"
#include "gateway/text/tokenizer.h"
#include "proto/sampling.pb.h"

namespace fathom {

struct GenerationParameters {
  v1::SamplingParams sampling;  // all but the grammar, the numbers of logprobs, and bad_words below
  std::optional<StructuredOutput> structured_output;
  int n = 1;
  bool ignore_eos = false;
  int32_t priority = 0;    // lower first, where the coordinator heeds it
  std::string cache_salt;  // KV is shared among requests of the same salt; empty: those without

  std::vector<std::string> stop;
  StopString stop_string = StopString::kLeaveOut;  // include_stop_str_in_output
  bool skip_special_tokens = true;
  std::vector<std::string> bad_words;             // AddBadWords makes tokens of them
  std::optional<int64_t> truncate_prompt_tokens;  // -1: to what fits

  bool stream = false;
  bool include_usage = false;           // a last chunk with the usage
  bool continuous_usage_stats = false;  // the usage so far in every chunk

  std::optional<uint32_t> num_prompt_logprobs;
  bool return_token_ids = false;
  TokenNames::Style token_names = TokenNames::Style::kText;  // return_tokens_as_token_ids
};

// Reads and checks them, as far as that can be done without the model (model_limits.h).
absl::StatusOr<GenerationParameters> ReadGenerationParameters(const JsonFields& fields,
                                                              const SamplingDefaults& defaults,
                                                              const ApiLimits& limits);

// How many stop strings, how long; `name` is the field they came in.
absl::Status CheckStopStrings(std::string_view name, const std::vector<std::string>& stop,
                              const ApiLimits& limits);

// Adds the tokens of bad_words to `sampling`, as at the beginning of a text and after a space.
void AddBadWords(const Tokenizer& tokenizer, GenerationParameters& parameters);

// max_tokens of a request, which is called `name` there: within [at_least, 2^31), and not below
// min_tokens.
absl::Status CheckMaxTokens(const std::string& name, int64_t max_tokens, int64_t at_least,
                            const GenerationParameters& parameters);

}  // namespace fathom
