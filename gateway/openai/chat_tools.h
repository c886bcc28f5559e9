// What a chat request says of tools: which there are, and whether the model may call them.
//
// Source: vllm/entrypoints/openai/chat_completion/protocol.py (0.16).
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "gateway/openai/json_fields.h"
#include "gateway/text/chat_message.h"

namespace fathom {

// `tools`: functions with a name, a description if they like, and parameters. An absent schema is
// that of no parameters.
absl::StatusOr<std::vector<ChatTool>> ReadTools(const JsonFields& fields);

// What `tool_choice` and `parallel_tool_calls` ask for.
enum class ToolCalls {
  kNone,  // the model is not told of tools, and what looks like a call is text
  kOne,   // the first call counts
  kAny
};

// InvalidArgument: a choice without `tools`, of a tool that is not among them, or one that would
// need the output to be constrained (required, or a tool by name).
absl::StatusOr<ToolCalls> ReadToolChoice(const JsonFields& fields,
                                         const std::vector<ChatTool>& tools);

}  // namespace fathom
