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

void MessageDelta::Append(MessageDelta next) {
  reasoning += next.reasoning;
  content += next.content;
  for (ToolCallDelta& piece : next.tool_calls) {
    ToolCallDelta& call = CallAt(piece.index);
    if (call.id.empty()) call.id = std::move(piece.id);
    if (call.name.empty()) call.name = std::move(piece.name);
    call.arguments += piece.arguments;
  }
}

}  // namespace fathom
