// The body of POST /v1/messages and of /v1/messages/count_tokens, Anthropic's API.
//
// Source: Anthropic's API reference, "Messages"; vllm/entrypoints/anthropic (0.16).
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "gateway/openai/chat_request.h"

namespace fathom {

// `max_tokens` is there.
absl::StatusOr<ChatRequest> ParseMessagesRequest(std::string_view body,
                                                 const SamplingDefaults& defaults,
                                                 const ApiLimits& limits);

// Only what becomes the prompt.
absl::StatusOr<ChatRequest> ParseCountTokensRequest(std::string_view body, const ApiLimits& limits);

}  // namespace fathom
