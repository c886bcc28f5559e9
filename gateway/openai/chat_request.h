// The body of POST /v1/chat/completions, and its messages, which POST /tokenize takes too.
//
// Source: vllm/entrypoints/openai/chat_completion/protocol.py (0.16).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/chat_tools.h"
#include "gateway/openai/generation_config.h"
#include "gateway/openai/generation_parameters.h"
#include "gateway/openai/json_fields.h"
#include "gateway/text/chat_message.h"

namespace fathom {

// What becomes the prompt.
struct ChatPrompt {
  std::vector<ChatMessage> messages;
  ChatOptions options;
  bool add_special_tokens = false;  // the encoding already begins with BOS
};

struct ChatRequest {
  std::optional<std::string> model;
  ChatPrompt prompt;
  GenerationParameters parameters;
  std::optional<uint32_t> max_tokens;    // absent: up to the model's limit
  bool echo = false;                     // an assistant's last message comes before the answer
  std::optional<uint32_t> num_logprobs;  // `logprobs` was true: how many `top_logprobs`
  ToolCalls tool_calls = ToolCalls::kNone;
  std::vector<ChatTool> required_tools;  // one of these must be called; empty: none need be
  bool ends_as_call = true;              // finish_reason "tool_calls" where tools were called
  std::string call_id_prefix;  // of calls that the model does not name; empty: as vLLM has them
  bool include_reasoning = true;
};

absl::StatusOr<ChatRequest> ParseChatRequest(std::string_view body,
                                             const SamplingDefaults& defaults,
                                             const ApiLimits& limits);

// Lets the model call the prompt's tools as the client chose, makes it, or hides them. Errors as of
// ApplyToolChoice.
absl::Status AllowTools(const ToolChoice& choice, ChatRequest& request);

// `top_logprobs`: how many besides the token itself; 0 when absent. Refused beyond the limit.
absl::StatusOr<uint32_t> ReadTopLogprobs(const JsonFields& fields, const ApiLimits& limits);

// How hard the model is to think. It knows only whether: anything but `none` sets `thinking`.
// Leaves it when absent; returns what was said.
absl::StatusOr<std::optional<std::string>> ReadEffort(const JsonFields& fields,
                                                      std::string_view key, bool& thinking);

// `messages`, `tools` and what says how to encode them. Contents are strings or lists of text
// parts, joined by newlines; the role `developer` is a system message. A last message by the
// assistant with `prefix` is continued.
absl::StatusOr<ChatPrompt> ReadChatPrompt(const JsonFields& fields, const ApiLimits& limits);

}  // namespace fathom
