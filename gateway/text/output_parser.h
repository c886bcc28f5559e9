// Takes a model's output apart, as it comes: thoughts, text, tool calls.
//
// It is a state machine over text and markers, so any split of the same tokens gives the same
// answer, and one that is streamed equals one that is not:
//
//   <think> begins thoughts and </think> ends them, wherever the model was; neither is text.
//   Thoughts that are not ended are thoughts: what is cut short never becomes an answer.
//   Tool calls end thoughts. Between calls white space is no text; all else around them is.
//   Within a call only what ends it is a marker, the rest belongs to the arguments.
//   A call that is cut short has the arguments that were written.
//
// Not thread-safe; one per choice.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "gateway/text/message_delta.h"
#include "gateway/text/output_markers.h"
#include "gateway/text/output_syntax.h"
#include "gateway/text/tool_call_parser.h"

namespace fathom {

struct OutputParserOptions {
  OutputSyntax syntax;
  bool begins_in_thinking = false;  // the prompt has begun the thoughts
  bool include_reasoning = true;    // false: thoughts are left out
  bool calls_tools = false;         // false: the markers of tool calls are text
  bool only_one_call = false;       // further calls are left out
  // Names a call where the model does not. Empty: ids are empty.
  std::function<std::string()> make_call_id;
};

class OutputParser : private ToolCallSink {
 public:
  explicit OutputParser(OutputParserOptions options);

  // What each adds to `delta`. `text`: whole characters; of a marker its own text.
  void PushText(std::string_view text, MessageDelta& delta);
  void PushMarker(Marker marker, std::string_view text, MessageDelta& delta);
  // The end.
  void Finish(MessageDelta& delta);

  // Whether what comes next is a thought, unless a marker ends them.
  bool thinks() const { return thinks_; }
  // Whether a call has begun.
  bool has_called() const { return num_calls_ > 0; }
  // Whether what comes next belongs to a call that has not ended.
  bool is_in_call() const { return tools_ != nullptr && tools_->is_in_call(); }

 private:
  void PlainText(std::string_view text) override;
  void BeginCalls() override { thinks_ = false; }
  void BeginCall(std::string id, std::string name) override;
  void Arguments(std::string_view text) override;

  const OutputParserOptions options_;
  const std::unique_ptr<ToolCallParser> tools_;  // null: no tools are called
  bool thinks_;
  size_t num_calls_ = 0;
  MessageDelta* delta_ = nullptr;  // while pushing
};

}  // namespace fathom
