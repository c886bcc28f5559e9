#include "gateway/text/message_delta.h"

#include <utility>

namespace fathom {

ToolCallDelta& MessageDelta::CallAt(size_t index) {
  // Calls are written one after the other: it is the last, or new.
  if (tool_calls.empty() || tool_calls.back().index != index) {
    tool_calls.emplace_back().index = index;
  }
  return tool_calls.back();
}

void MessageDelta::AddRun(const MessageRun& run) {
  if (!runs.empty() && runs.back().IsOfSamePart(run)) {
    runs.back().num_bytes += run.num_bytes;
  } else {
    runs.push_back(run);
  }
}

void MessageDelta::AddReasoning(std::string_view text) {
  if (text.empty()) return;
  reasoning += text;
  AddRun({.kind = MessageRun::Kind::kReasoning, .num_bytes = text.size()});
}

void MessageDelta::AddContent(std::string_view text) {
  if (text.empty()) return;
  content += text;
  AddRun({.kind = MessageRun::Kind::kContent, .num_bytes = text.size()});
}

void MessageDelta::BeginCall(size_t index, std::string id, std::string name) {
  ToolCallDelta& call = CallAt(index);
  call.id = std::move(id);
  call.name = std::move(name);
  AddRun({.kind = MessageRun::Kind::kToolCall, .call = index});
}

void MessageDelta::AddArguments(size_t index, std::string_view text) {
  if (text.empty()) return;
  CallAt(index).arguments += text;
  AddRun({.kind = MessageRun::Kind::kToolCall, .call = index, .num_bytes = text.size()});
}

void MessageDelta::Append(MessageDelta next) {
  reasoning += next.reasoning;
  content += next.content;
  for (ToolCallDelta& piece : next.tool_calls) {
    ToolCallDelta& call = CallAt(piece.index);
    if (call.id.empty()) call.id = std::move(piece.id);
    if (call.name.empty()) call.name = std::move(piece.name);
    call.arguments += piece.arguments;
  }
  for (const MessageRun& run : next.runs) AddRun(run);
}

}  // namespace fathom
