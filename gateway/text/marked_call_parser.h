// Tool calls between special tokens: those of DeepSeek-V3, R1 and V3.1, and of Kimi-K2.
//
//   V3, R1    CALL_BEGIN type SEPARATOR name "\n```json\n" arguments "\n```" CALL_END
//   V3.1      CALL_BEGIN name SEPARATOR arguments CALL_END
//   Kimi-K2   CALL_BEGIN "functions." name ":" number SEPARATOR arguments CALL_END
//
// all between CALLS_BEGIN and CALLS_END. Forgiven: a call without CALLS_BEGIN, one without its end
// before the next or before CALLS_END, and a fence of V3's that is missing or no "```json".
// Not thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "gateway/text/tool_call_parser.h"

namespace fathom {

class MarkedCallParser : public ToolCallParser {
 public:
  // Not kDsml.
  explicit MarkedCallParser(ToolSyntax syntax) : syntax_(syntax) {}

  void PushText(std::string_view text, ToolCallSink& sink) override;
  void PushMarker(Marker marker, std::string_view text, ToolCallSink& sink) override;
  void Finish(ToolCallSink& sink) override;
  bool is_in_call() const override { return state_ > State::kBetween; }

 private:
  enum class State {
    kOutside,
    kBetween,   // within CALLS_BEGIN and CALLS_END, but in no call
    kHead,      // before SEPARATOR
    kNameLine,  // V3: behind it, up to the end of the line
    kFence,     // V3: the line with ```
    kArguments,
  };

  void PushNameLine(std::string_view text, ToolCallSink& sink);
  void PushFence(std::string_view text, ToolCallSink& sink);
  void PushArguments(std::string_view text, ToolCallSink& sink);
  void EndHead(ToolCallSink& sink);
  void EndCall(ToolCallSink& sink);

  const ToolSyntax syntax_;
  State state_ = State::kOutside;
  bool is_text_between_ = false;  // something other than white space stands between two calls
  bool has_arguments_ = false;
  std::string held_;  // the head; the name's line; what may be the fence, at either end
};

}  // namespace fathom
