// The body of POST /v1/responses, as far as it asks for one answer: this server keeps nothing, so
// whatever refers to an earlier response is refused.
//
// Source: OpenAI's API reference, "Create a model response"; vllm/entrypoints/openai/responses
// (0.16).
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "gateway/openai/chat_request.h"

namespace fathom {

struct ResponsesRequest {
  ChatRequest chat;

  // What the response repeats, as JSON.
  std::string instructions = "null";
  std::string metadata = "{}";
  std::string text_format = R"({"type":"text"})";
  std::string reasoning_effort = "null";
  std::string tools = "[]";
  std::string tool_choice = "\"auto\"";
  bool parallel_tool_calls = true;
  std::string user = "null";
  std::string truncation = "\"disabled\"";
};

absl::StatusOr<ResponsesRequest> ParseResponsesRequest(std::string_view body,
                                                       const SamplingDefaults& defaults,
                                                       const ApiLimits& limits);

}  // namespace fathom
