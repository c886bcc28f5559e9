// The body of POST /v1/completions.
//
// Source: vllm/entrypoints/openai/completion/protocol.py (0.16).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/generation_config.h"
#include "gateway/openai/generation_parameters.h"

namespace fathom {

// Text, or token ids as they are.
using CompletionPrompt = std::variant<std::string, std::vector<uint32_t>>;

struct CompletionRequest {
  std::optional<std::string> model;
  std::vector<CompletionPrompt> prompts;  // at least one
  GenerationParameters parameters;
  uint32_t max_tokens = 16;              // 0 only with echo: the prompt is read, nothing generated
  bool echo = false;                     // the prompt comes before what was generated
  std::optional<uint32_t> num_logprobs;  // besides the token itself
  bool add_special_tokens = true;        // BOS before a text prompt
};

absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body,
                                                         const SamplingDefaults& defaults,
                                                         const ApiLimits& limits);

}  // namespace fathom
