#include "gateway/text/dsml_call_parser.h"

#include <algorithm>
#include <array>
#include <utility>

#include "gateway/text/deepseek_markers.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

// Stands for the token in pending_: no text has this byte.
constexpr char kDsmlByte = '\xFF';
constexpr std::string_view kCalls =
    "<\xFF"
    "function_calls>";
constexpr std::string_view kCallsEnd =
    "</\xFF"
    "function_calls>";
constexpr std::string_view kInvoke =
    "<\xFF"
    "invoke";
constexpr std::string_view kInvokeEnd =
    "</\xFF"
    "invoke>";
constexpr std::string_view kParameter =
    "<\xFF"
    "parameter";
constexpr std::string_view kParameterEnd =
    "</\xFF"
    "parameter>";

// Text without the stand-in.
std::string Spelled(std::string_view text) {
  std::string spelled;
  for (const char c : text) {
    if (c == kDsmlByte) {
      spelled += deepseek::kDsml;
    } else {
      spelled += c;
    }
  }
  return spelled;
}

// The end of the value that `text` begins with, and how long the tag is that ends it: its own, or
// one that can only stand behind it. `from`: nothing ends before.
struct End {
  size_t at = std::string_view::npos;
  size_t tag_bytes = 0;  // 0: the tag is not a part of the value's end and is read again
};

End FindEnd(std::string_view text, size_t from) {
  End end;
  const size_t own = text.find(kParameterEnd, from);
  const size_t other = std::min(text.find(kInvokeEnd, from), text.find(kCallsEnd, from));
  end.at = std::min(own, other);
  end.tag_bytes = own < other ? kParameterEnd.size() : 0;
  return end;
}

// How much at the end of a value may be the tag that ends it.
size_t HeldEnd(std::string_view text) {
  return std::max(
      {HeldBytes(text, kParameterEnd), HeldBytes(text, kInvokeEnd), HeldBytes(text, kCallsEnd)});
}

// What stands in quotes behind `name="` in a tag; nullopt without.
std::optional<std::string> Attribute(std::string_view head, std::string_view name) {
  const std::string prefix = std::string(name) + "=\"";
  const size_t begin = head.find(prefix);
  if (begin == std::string_view::npos) return std::nullopt;
  const std::string_view value = head.substr(begin + prefix.size());
  return Spelled(value.substr(0, value.find('"')));
}

bool IsPrefixOfAny(std::string_view text, std::initializer_list<std::string_view> words) {
  return std::any_of(words.begin(), words.end(),
                     [text](std::string_view word) { return word.starts_with(text); });
}

}  // namespace

void DsmlCallParser::PushText(std::string_view text, ToolCallSink& sink) {
  pending_ += text;
  while (Step(sink)) {
  }
}

void DsmlCallParser::PushMarker(Marker marker, std::string_view text, ToolCallSink& sink) {
  PushText(marker == Marker::kDsml ? std::string_view(&kDsmlByte, 1) : text, sink);
}

bool DsmlCallParser::Step(ToolCallSink& sink) {
  switch (state_) {
    case State::kOutside:
      return ReadOutside(sink);
    case State::kBetween:
      return ReadBetween(sink);
    case State::kInvokeHead:
    case State::kParameterHead:
      return ReadHead(sink);
    case State::kInvoke:
      return ReadInvoke(sink);
    case State::kJson:
      return ReadJson(sink);
    case State::kString:
      return ReadString(sink);
    case State::kOtherValue:
      return ReadOtherValue(sink);
  }
  return false;
}

void DsmlCallParser::Take(size_t bytes) {
  pending_.erase(0, bytes);
  searched_ = 0;
  is_quoted_ = false;
}

bool DsmlCallParser::Skip(std::string_view word) {
  if (!pending_.starts_with(word)) return false;
  Take(word.size());
  return true;
}

bool DsmlCallParser::ReadOutside(ToolCallSink& sink) {
  constexpr std::string_view kEmptyLine = "\n\n";
  const size_t at = std::min(pending_.find(kCalls), pending_.find(kInvoke));
  if (at != std::string::npos) {
    std::string_view before = std::string_view(pending_).substr(0, at);
    if (before.ends_with(kEmptyLine)) before.remove_suffix(kEmptyLine.size());
    if (!before.empty()) sink.PlainText(Spelled(before));
    sink.BeginCalls();
    Take(at);
    Skip(kCalls);
    is_text_between_ = false;
    state_ = State::kBetween;
    return true;
  }
  // The empty line before the tag belongs to it.
  static const std::array<std::string, 2> words = {std::string(kEmptyLine) + std::string(kCalls),
                                                   std::string(kEmptyLine) + std::string(kInvoke)};
  const size_t num_held = std::max({HeldBytes(pending_, kCalls), HeldBytes(pending_, kInvoke),
                                    HeldBytes(pending_, words[0]), HeldBytes(pending_, words[1])});
  const size_t num_certain = pending_.size() - num_held;
  if (num_certain > 0) sink.PlainText(Spelled(std::string_view(pending_).substr(0, num_certain)));
  Take(num_certain);
  return false;
}

bool DsmlCallParser::ReadBetween(ToolCallSink& sink) {
  if (!is_text_between_) Take(pending_.size() - StrippedFront(pending_).size());
  if (pending_.empty()) return false;
  if (Skip(kCallsEnd)) {
    state_ = State::kOutside;
    return true;
  }
  if (Skip(kInvoke)) {
    sink.BeginCalls();
    is_text_between_ = false;
    state_ = State::kInvokeHead;
    return true;
  }
  if (IsPrefixOfAny(pending_, {kCallsEnd, kInvoke})) return false;
  is_text_between_ = true;
  const size_t size = std::min(pending_.find('<', 1), pending_.size());
  sink.PlainText(Spelled(std::string_view(pending_).substr(0, size)));
  Take(size);
  return true;
}

// Up to the first > that stands in no quotes.
bool DsmlCallParser::ReadHead(ToolCallSink& sink) {
  for (; searched_ < pending_.size(); ++searched_) {
    if (pending_[searched_] == '"') is_quoted_ = !is_quoted_;
    if (pending_[searched_] != '>' || is_quoted_) continue;
    const std::string head = pending_.substr(0, searched_);
    Take(searched_ + 1);
    if (state_ == State::kInvokeHead) {
      BeginCall(head, sink);
    } else {
      BeginParameter(head, sink);
    }
    return true;
  }
  return false;
}

void DsmlCallParser::BeginCall(std::string_view head, ToolCallSink& sink) {
  has_parameters_ = false;
  state_ = State::kInvoke;
  sink.BeginCall("", Attribute(head, "name").value_or(""));
}

void DsmlCallParser::BeginParameter(std::string_view head, ToolCallSink& sink) {
  const bool is_string = Attribute(head, "string") == "true";
  std::string json = std::exchange(has_parameters_, true) ? ", \"" : "{\"";
  AppendJsonEscaped(Attribute(head, "name").value_or(""), json);
  json += is_string ? "\": \"" : "\": ";
  sink.Arguments(json);
  state_ = is_string ? State::kString : State::kOtherValue;
}

void DsmlCallParser::EndCall(ToolCallSink& sink) {
  if (state_ == State::kInvoke) sink.Arguments(has_parameters_ ? "}" : "{}");
  is_text_between_ = false;
  state_ = State::kBetween;
}

// What is no tag here is nobody's: it is left out.
bool DsmlCallParser::ReadInvoke(ToolCallSink& sink) {
  const size_t begin = pending_.find_first_of(has_parameters_ ? "<" : "<{");
  Take(std::min(begin, pending_.size()));
  if (pending_.empty()) return false;
  if (pending_.front() == '{') {
    state_ = State::kJson;
    return true;
  }
  if (Skip(kParameter)) {
    state_ = State::kParameterHead;
    return true;
  }
  if (Skip(kInvokeEnd)) {
    EndCall(sink);
    return true;
  }
  if (pending_.starts_with(kCallsEnd) || pending_.starts_with(kInvoke)) {
    EndCall(sink);
    return true;
  }
  if (IsPrefixOfAny(pending_, {kParameter, kInvokeEnd, kCallsEnd, kInvoke})) return false;
  Take(1);
  return true;
}

bool DsmlCallParser::ReadJson(ToolCallSink& sink) {
  const size_t end = std::min(pending_.find(kInvokeEnd), pending_.find(kCallsEnd));
  const bool is_complete = end != std::string::npos;
  const size_t size = is_complete ? end : pending_.size() - HeldEnd(pending_);
  sink.Arguments(Spelled(std::string_view(pending_).substr(0, size)));
  Take(size);
  if (!is_complete) return false;
  EndCall(sink);
  Skip(kInvokeEnd);
  return true;
}

bool DsmlCallParser::ReadString(ToolCallSink& sink) {
  const End end = FindEnd(pending_, 0);
  const bool is_complete = end.at != std::string::npos;
  const size_t size = is_complete ? end.at : pending_.size() - HeldEnd(pending_);
  std::string json;
  AppendJsonEscaped(Spelled(std::string_view(pending_).substr(0, size)), json);
  if (is_complete) json += '"';
  sink.Arguments(json);
  Take(size + (is_complete ? end.tag_bytes : 0));
  if (is_complete) state_ = State::kInvoke;
  return is_complete;
}

bool DsmlCallParser::ReadOtherValue(ToolCallSink& sink) {
  const End end = FindEnd(pending_, searched_);
  if (end.at == std::string::npos) {
    // Long values are searched once: an end may have begun, but not before.
    searched_ = pending_.size() - std::min(pending_.size(), kCallsEnd.size());
    return false;
  }
  EndOtherValue(std::string_view(pending_).substr(0, end.at), sink);
  Take(end.at + end.tag_bytes);
  state_ = State::kInvoke;
  return true;
}

void DsmlCallParser::EndOtherValue(std::string_view value, ToolCallSink& sink) {
  const std::string text = Spelled(value);
  const std::string_view stripped = Stripped(text);
  if (IsJson(stripped)) return sink.Arguments(stripped);
  std::string json = "\"";
  AppendJsonEscaped(text, json);
  sink.Arguments(json += '"');
}

void DsmlCallParser::Finish(ToolCallSink& sink) {
  std::string json;
  switch (state_) {
    case State::kOutside:
      if (!pending_.empty()) sink.PlainText(Spelled(pending_));
      break;
    case State::kString:
      AppendJsonEscaped(Spelled(pending_), json);
      sink.Arguments(json);
      break;
    case State::kJson:
    case State::kOtherValue:
      sink.Arguments(Spelled(pending_));
      break;
    default:
      break;  // a tag that never ended
  }
  Take(pending_.size());
  state_ = State::kOutside;
}

}  // namespace fathom
