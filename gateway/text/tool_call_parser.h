// Finds tool calls between text; a class for each family of forms (marked_call_parser.h,
// dsml_call_parser.h).
//
// Not thread-safe.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "gateway/text/output_markers.h"
#include "gateway/text/output_syntax.h"

namespace fathom {

// What a parser finds, in order.
class ToolCallSink {
 public:
  virtual ~ToolCallSink() = default;
  virtual void PlainText(std::string_view text) = 0;
  // From here on calls follow; told also before each of them.
  virtual void BeginCalls() = 0;
  // `id`: as the model wrote it, or empty.
  virtual void BeginCall(std::string id, std::string name) = 0;
  // More arguments of the call that began last.
  virtual void Arguments(std::string_view text) = 0;
};

class ToolCallParser {
 public:
  virtual ~ToolCallParser() = default;
  virtual void PushText(std::string_view text, ToolCallSink& sink) = 0;
  virtual void PushMarker(Marker marker, std::string_view text, ToolCallSink& sink) = 0;
  // What is held back because it might have become a call is text, or what was written of one.
  virtual void Finish(ToolCallSink& sink) = 0;
  // Whether text that is pushed now belongs to a call.
  virtual bool is_in_call() const = 0;
};

std::unique_ptr<ToolCallParser> MakeToolCallParser(ToolSyntax syntax);

// How many bytes at the end of `text` begin `word` without being all of it.
size_t HeldBytes(std::string_view text, std::string_view word);

// Without white space at both ends, and at the front.
std::string_view Stripped(std::string_view text);
std::string_view StrippedFront(std::string_view text);

}  // namespace fathom
