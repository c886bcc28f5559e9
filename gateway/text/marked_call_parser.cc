#include "gateway/text/marked_call_parser.h"

#include <utility>

namespace fathom {
namespace {

constexpr std::string_view kFenceEnd = "\n```";

// "get_weather" of "functions.get_weather:0".
std::string_view NameInKimisId(std::string_view id) {
  constexpr std::string_view kPrefix = "functions.";
  if (id.starts_with(kPrefix)) id.remove_prefix(kPrefix.size());
  return id.substr(0, id.rfind(':'));
}

// How much at the end of a call's arguments may be the fence that closes them, with a little white
// space behind it.
size_t HeldFence(std::string_view text) {
  constexpr size_t kMostSpace = 64;
  const size_t last = text.find_last_not_of(" \t\r\n");
  const size_t size = last == std::string_view::npos ? 0 : last + 1;
  const size_t num_space = text.size() - size;
  if (num_space <= kMostSpace && text.substr(0, size).ends_with(kFenceEnd)) {
    return num_space + kFenceEnd.size();
  }
  return HeldBytes(text, kFenceEnd);
}

}  // namespace

void MarkedCallParser::PushText(std::string_view text, ToolCallSink& sink) {
  switch (state_) {
    case State::kOutside:
      return sink.PlainText(text);
    case State::kBetween:
      if (!is_text_between_) text = StrippedFront(text);
      is_text_between_ = is_text_between_ || !text.empty();
      return sink.PlainText(text);
    case State::kHead:
      held_ += text;
      return;
    case State::kNameLine:
      return PushNameLine(text, sink);
    case State::kFence:
      return PushFence(text, sink);
    case State::kArguments:
      return PushArguments(text, sink);
  }
}

void MarkedCallParser::PushNameLine(std::string_view text, ToolCallSink& sink) {
  const size_t end = text.find('\n');
  held_ += text.substr(0, end);
  if (end == std::string_view::npos) return;
  sink.BeginCall("", std::string(Stripped(held_)));
  held_.clear();
  state_ = State::kFence;
  PushFence(text.substr(end + 1), sink);
}

void MarkedCallParser::PushFence(std::string_view text, ToolCallSink& sink) {
  constexpr std::string_view kFence = "```";
  held_ += text;
  if (held_.size() < kFence.size() && kFence.starts_with(held_)) return;
  size_t begin = 0;
  if (held_.starts_with(kFence)) {
    begin = held_.find('\n');
    if (begin++ == std::string::npos) return;
  }
  const std::string arguments = std::exchange(held_, "").substr(begin);
  state_ = State::kArguments;
  PushArguments(arguments, sink);
}

void MarkedCallParser::PushArguments(std::string_view text, ToolCallSink& sink) {
  held_ += text;
  const size_t num_held = syntax_ == ToolSyntax::kV3 ? HeldFence(held_) : 0;
  const std::string_view certain = std::string_view(held_).substr(0, held_.size() - num_held);
  has_arguments_ = has_arguments_ || !Stripped(certain).empty();
  sink.Arguments(certain);
  held_.erase(0, certain.size());
}

void MarkedCallParser::EndHead(ToolCallSink& sink) {
  if (syntax_ == ToolSyntax::kV3) {
    state_ = State::kNameLine;  // the head is the type, which is always "function"
    held_.clear();
    return;
  }
  state_ = State::kArguments;
  const std::string head(Stripped(std::exchange(held_, "")));
  if (syntax_ == ToolSyntax::kKimiK2) {
    sink.BeginCall(head, std::string(NameInKimisId(head)));
  } else {
    sink.BeginCall("", head);
  }
}

void MarkedCallParser::EndCall(ToolCallSink& sink) {
  switch (state_) {
    case State::kOutside:
    case State::kBetween:
      break;
    case State::kHead:
      sink.PlainText(held_);  // no call after all
      break;
    case State::kNameLine: {
      const size_t begin = held_.find('{');  // arguments on the name's own line
      sink.BeginCall("", std::string(Stripped(held_.substr(0, begin))));
      sink.Arguments(begin == std::string::npos ? "{}" : held_.substr(begin));
      break;
    }
    case State::kFence:
      sink.Arguments("{}");  // at most a fence without a line behind it
      break;
    case State::kArguments:
      if (Stripped(held_) != Stripped(kFenceEnd)) {
        has_arguments_ = has_arguments_ || !Stripped(held_).empty();
        sink.Arguments(held_);
      }
      if (!has_arguments_) sink.Arguments("{}");
      break;
  }
  held_.clear();
  is_text_between_ = false;
  state_ = State::kBetween;
}

void MarkedCallParser::PushMarker(Marker marker, std::string_view text, ToolCallSink& sink) {
  switch (marker) {
    case Marker::kCallsBegin:
    case Marker::kCallBegin:
      EndCall(sink);
      sink.BeginCalls();
      has_arguments_ = false;
      state_ = marker == Marker::kCallBegin ? State::kHead : State::kBetween;
      return;
    case Marker::kSeparator:
      if (state_ == State::kHead) return EndHead(sink);
      return PushText(text, sink);
    case Marker::kCallEnd:
      if (!is_in_call()) return;
      return EndCall(sink);
    case Marker::kCallsEnd:
      EndCall(sink);
      state_ = State::kOutside;
      return;
    default:
      return PushText(text, sink);
  }
}

void MarkedCallParser::Finish(ToolCallSink& sink) {
  const bool is_fence = Stripped(held_) == Stripped(kFenceEnd);
  if (state_ == State::kArguments && !is_fence) sink.Arguments(held_);
  held_.clear();
  is_text_between_ = false;
  state_ = State::kOutside;
}

}  // namespace fathom
