// DeepSeek-V3.2's tool calls in DSML, where ｜DSML｜ is a token of its own:
//
//   \n\n<｜DSML｜function_calls>
//   <｜DSML｜invoke name="NAME">
//   <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
//   </｜DSML｜invoke>
//   </｜DSML｜function_calls>
//
// A parameter becomes a member of the arguments: with string="true" its characters, else its JSON;
// what claims to be JSON and is not becomes a string, so that the arguments are always JSON once a
// call is complete. Strings come as they are written, other values when they are complete.
// Forgiven: calls without function_calls around them, ends that are missing before the next
// beginning, and a JSON object in place of the parameters.
// Not thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "gateway/text/tool_call_parser.h"

namespace fathom {

class DsmlCallParser : public ToolCallParser {
 public:
  void PushText(std::string_view text, ToolCallSink& sink) override;
  void PushMarker(Marker marker, std::string_view text, ToolCallSink& sink) override;
  void Finish(ToolCallSink& sink) override;
  bool is_in_call() const override { return state_ > State::kBetween; }

 private:
  enum class State {
    kOutside,
    kBetween,     // within function_calls, but in no invoke
    kInvokeHead,  // behind "<｜DSML｜invoke"
    kInvoke,      // between parameters
    kJson,        // a JSON object stands where parameters should
    kParameterHead,
    kString,
    kOtherValue,
  };

  // Each reads on in pending_ and returns whether more of it can be read at once.
  bool Step(ToolCallSink& sink);
  bool ReadOutside(ToolCallSink& sink);
  bool ReadBetween(ToolCallSink& sink);
  bool ReadHead(ToolCallSink& sink);
  bool ReadInvoke(ToolCallSink& sink);
  bool ReadJson(ToolCallSink& sink);
  bool ReadString(ToolCallSink& sink);
  bool ReadOtherValue(ToolCallSink& sink);

  void BeginCall(std::string_view head, ToolCallSink& sink);
  void BeginParameter(std::string_view head, ToolCallSink& sink);
  void EndOtherValue(std::string_view value, ToolCallSink& sink);
  void EndCall(ToolCallSink& sink);
  // Takes `word` off the front of pending_ if it is there.
  bool Skip(std::string_view word);
  void Take(size_t bytes);

  State state_ = State::kOutside;
  std::string pending_;     // not yet read; ｜DSML｜ is kDsmlByte in it
  size_t searched_ = 0;     // of it, by what waits for an end
  bool is_quoted_ = false;  // where a head was searched to
  bool is_text_between_ = false;
  bool has_parameters_ = false;
};

}  // namespace fathom
