// What an answer gains: thoughts, text and tool calls.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
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

// Neighbouring bytes of one kind, of a tool call those of its arguments, which may be none.
struct MessageRun {
  enum class Kind { kReasoning, kContent, kToolCall };
  Kind kind = Kind::kContent;
  size_t call = 0;  // its index in the answer
  size_t num_bytes = 0;

  bool IsOfSamePart(const MessageRun& other) const {
    return kind == other.kind && call == other.call;
  }
};

struct MessageDelta {
  std::string reasoning;
  std::string content;
  std::vector<ToolCallDelta> tool_calls;  // at most one for each index, in order
  // In which order the model wrote all that. Neighbours are of different parts.
  std::vector<MessageRun> runs;

  bool empty() const { return reasoning.empty() && content.empty() && tool_calls.empty(); }

  // Appends `next`, which follows this.
  void Append(MessageDelta next);

  void AddReasoning(std::string_view text);
  void AddContent(std::string_view text);
  void BeginCall(size_t index, std::string id, std::string name);
  // Of a call that has begun, here or before this.
  void AddArguments(size_t index, std::string_view text);

 private:
  // The piece of the call `index`, the last or new.
  ToolCallDelta& CallAt(size_t index);
  void AddRun(const MessageRun& run);
};

}  // namespace fathom
