// The fields of a request that no part of this server reads, though its clients know them.
//
// | a field that            | is                                                               |
// | changes nothing here    | ignored, but must be of its type, as in vLLM                     |
// | would change the answer | refused, with what to do instead, unless it says nothing: null,  |
// |                         | and but for a chat's own false, "", [], {} and 0                 |
// | nobody knows            | ignored                                                          |
//
// Source: OpenAI's and Anthropic's API references; vllm/entrypoints/openai/*/protocol.py (0.16).
#pragma once

#include "absl/status/status.h"
#include "gateway/openai/json_fields.h"

namespace fathom {

enum class ApiRoute { kCompletions, kChat, kResponses, kMessages };

// MalformedRequest: one is of the wrong type. InvalidArgument: one cannot be served.
absl::Status CheckUnreadFields(const JsonFields& fields, ApiRoute route);

}  // namespace fathom
