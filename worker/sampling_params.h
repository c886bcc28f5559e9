// How one sequence's tokens are chosen: the wire's SamplingParams with every default filled in and
// every value checked. A value; thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "grammar/grammar.h"

namespace fathom {

namespace v1 {
class Grammar;
class SamplingParams;
}  // namespace v1

struct SamplingParams {
  // A temperature below this means greedy; one between this and kLowestTemperature is raised to the
  // latter, because logits divided by less overflow. Source: vLLM sampling_params.py.
  static constexpr float kGreedyBelow = 1e-5f;
  static constexpr float kLowestTemperature = 0.01f;
  // More than anyone needs, and little enough that a step's result fits into a message.
  static constexpr int kMaxLogprobs = 1024;
  static constexpr int kMaxListEntries = 2048;  // of logit_bias, of stop_token_ids, of bad_words
  static constexpr int kMaxAllowedTokenIds = 16'384;

  float temperature = 1.0f;  // 0: greedy, else at least kLowestTemperature
  float top_p = 1.0f;        // (0, 1]
  int top_k = 0;             // 0: all tokens
  float min_p = 0.0f;        // [0, 1]
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, what is added to its logit
  uint64_t seed = 0;
  std::vector<int32_t> stop_token_ids;  // not sampled before min_tokens tokens were generated
  int min_tokens = 0;
  std::vector<int32_t> allowed_token_ids;       // if any, no others are sampled
  std::vector<std::vector<int32_t>> bad_words;  // none is empty; the output contains none
  std::optional<int> num_logprobs;
  std::optional<int> num_prompt_logprobs;
  std::optional<Grammar> grammar;               // what the output must look like
  std::optional<int32_t> grammar_begins_after;  // this token of the output; absent: at once

  bool greedy() const { return temperature == 0.0f; }
  bool has_penalties() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
};

// InvalidArgument names the field, its value and what was expected, here and below.
absl::StatusOr<Grammar> ParseGrammar(const v1::Grammar& message);
absl::StatusOr<SamplingParams> ParseSamplingParams(const v1::SamplingParams& message,
                                                   int vocab_size);

}  // namespace fathom
