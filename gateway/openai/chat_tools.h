// What a request says of tools: which there are, and whether the model may call them.
//
// Source: vllm/entrypoints/openai/chat_completion/protocol.py, anthropic/serving.py (0.16).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gateway/openai/json_fields.h"
#include "gateway/text/chat_message.h"

namespace fathom {

// `tools`: functions with a name of their own, a description if they like, and parameters, a
// schema of objects. An absent schema is that of no parameters.
absl::StatusOr<std::vector<ChatTool>> ReadTools(const JsonFields& fields);

// The same where no "function" is around a function: its schema is at `schema_key`, and the only
// `type` that is known is `known_type`. The model is told of them in the same words.
absl::StatusOr<std::vector<ChatTool>> ReadBareTools(const JsonFields& fields,
                                                    std::string_view known_type,
                                                    std::string_view schema_key);

// Whether the model calls tools.
enum class ToolCalls {
  kNone,  // the model is not told of tools, and what looks like a call is text
  kOne,   // the first call counts
  kAny
};

// What a client wishes, in whatever words its API has for it.
struct ToolChoice {
  enum class Kind { kUnsaid, kNone, kAuto, kRequired, kNamed };
  Kind kind = Kind::kUnsaid;
  struct Chosen {
    std::string name;
    std::string field;  // where it was said
  };
  // kNamed: the one that is to be called. Else: the others are as if they were not there; empty:
  // there are no others.
  std::vector<Chosen> chosen;
  bool parallel = true;  // more than one call
};

// Leaves in `tools` those that the model is told of. InvalidArgument: a choice without `tools`, or
// of a tool that is not among them.
absl::StatusOr<ToolCalls> ApplyToolChoice(const ToolChoice& choice, std::vector<ChatTool>& tools);

// The choice that `tool_choice` and `parallel_tool_calls` make: a word, or an object with
// `type` function or allowed_tools. With `FunctionName::kWrapped` the name of the function is
// within `function`.
enum class FunctionName { kWrapped, kBare };
absl::StatusOr<ToolChoice> ReadToolChoice(const JsonFields& fields, FunctionName name);

}  // namespace fathom
