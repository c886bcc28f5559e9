// What the whole answer to a chat must look like.
//
//   tool_choice required, or a tool by name   calls of these tools (tool_call_grammar.h), whatever
//                                             else was asked for: there is no other content
//   else                                      what structured_output.h has read
//
// Thoughts obey no grammar. Where the prompt has begun them it begins after </think>; where the
// model may begin them itself they may come first.
#pragma once

#include "absl/status/status.h"
#include "gateway/openai/chat_request.h"
#include "gateway/openai/model_text.h"

namespace fathom {

// Completes `request.parameters.structured_output`. InvalidArgument naming tools: these cannot be
// required; or naming what takes too many bytes to say. REQUIRES: the messages have been encoded.
absl::Status FitGrammar(ChatRequest& request, const ModelText& text);

}  // namespace fathom
