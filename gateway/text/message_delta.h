// What an answer gains: thoughts, text and tool calls.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fathom {

// A piece of a tool call. The first piece of each has its id and name; the arguments of all its
// pieces joined are JSON, if the model wrote it so and to the end.
struct ToolCallDelta {
  size_t index = 0;  // in the answer
  std::string id;
  std::string name;
  std::string arguments;
};

struct MessageDelta {
  std::string reasoning;
  std::string content;
  std::vector<ToolCallDelta> tool_calls;  // at most one for each index, in order

  bool empty() const { return reasoning.empty() && content.empty() && tool_calls.empty(); }

  // Appends `next`, which follows this.
  void Append(MessageDelta next);

  // The piece of the call `index`, new if this has none.
  ToolCallDelta& CallAt(size_t index);
};

}  // namespace fathom
