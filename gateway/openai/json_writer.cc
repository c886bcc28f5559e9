#include "gateway/openai/json_writer.h"

#include <charconv>
#include <cmath>

namespace fathom {
namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

bool IsContinuation(std::string_view text, size_t i, uint8_t low = 0x80, uint8_t high = 0xBF) {
  if (i >= text.size()) return false;
  const uint8_t byte = static_cast<uint8_t>(text[i]);
  return byte >= low && byte <= high;
}

// Bytes of the well-formed sequence at `i`, whose first byte is not ASCII; 0 when it is not
// well-formed (Unicode 15, table 3-7).
size_t SequenceBytes(std::string_view text, size_t i) {
  const uint8_t lead = static_cast<uint8_t>(text[i]);
  if (lead >= 0xC2 && lead <= 0xDF) return IsContinuation(text, i + 1) ? 2 : 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    const uint8_t low = lead == 0xE0 ? 0xA0 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : 0xBF;
    return IsContinuation(text, i + 1, low, high) && IsContinuation(text, i + 2) ? 3 : 0;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    const uint8_t low = lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xF4 ? 0x8F : 0xBF;
    return IsContinuation(text, i + 1, low, high) && IsContinuation(text, i + 2) &&
                   IsContinuation(text, i + 3)
               ? 4
               : 0;
  }
  return 0;
}

void AppendEscaped(char c, std::string& text) {
  constexpr char kHex[] = "0123456789abcdef";
  switch (c) {
    case '"':
      text += "\\\"";
      break;
    case '\\':
      text += "\\\\";
      break;
    case '\b':
      text += "\\b";
      break;
    case '\f':
      text += "\\f";
      break;
    case '\n':
      text += "\\n";
      break;
    case '\r':
      text += "\\r";
      break;
    case '\t':
      text += "\\t";
      break;
    default:
      text += "\\u00";
      text += kHex[c >> 4];
      text += kHex[c & 15];
  }
}

}  // namespace

JsonWriter::JsonWriter(std::string_view beginning) : needs_comma_(true) {
  text_.reserve(beginning.size() + 256);
  text_ = beginning;
}

void JsonWriter::Separate() {
  if (needs_comma_) text_ += ',';
  needs_comma_ = true;
}

void JsonWriter::AppendQuoted(std::string_view text) {
  text_ += '"';
  size_t plain_from = 0;  // what needs no change is copied in one go
  size_t i = 0;
  const auto flush = [&] { text_.append(text.substr(plain_from, i - plain_from)); };
  while (i < text.size()) {
    const uint8_t byte = static_cast<uint8_t>(text[i]);
    if (byte >= 0x80) {
      const size_t bytes = SequenceBytes(text, i);
      if (bytes > 0) {
        i += bytes;
        continue;
      }
      flush();
      text_ += kReplacementCharacter;
    } else if (byte < 0x20 || byte == '"' || byte == '\\') {
      flush();
      AppendEscaped(static_cast<char>(byte), text_);
    } else {
      ++i;
      continue;
    }
    plain_from = ++i;
  }
  flush();
  text_ += '"';
}

JsonWriter& JsonWriter::BeginObject() {
  Separate();
  text_ += '{';
  needs_comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::EndObject() {
  text_ += '}';
  needs_comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::BeginArray() {
  Separate();
  text_ += '[';
  needs_comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::EndArray() {
  text_ += ']';
  needs_comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::Key(std::string_view key) {
  Separate();
  AppendQuoted(key);
  text_ += ':';
  needs_comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::String(std::string_view text) {
  Separate();
  AppendQuoted(text);
  return *this;
}

JsonWriter& JsonWriter::Int(int64_t number) {
  Separate();
  char digits[24];
  text_.append(digits, std::to_chars(digits, digits + sizeof(digits), number).ptr);
  return *this;
}

JsonWriter& JsonWriter::Float(float number) {
  if (!std::isfinite(number)) return Null();
  Separate();
  char digits[32];
  const char* end = std::to_chars(digits, digits + sizeof(digits), number).ptr;
  const std::string_view shortest(digits, end - digits);
  text_ += shortest;
  // So that every reader takes it for a floating-point number.
  if (shortest.find_first_of(".e") == std::string_view::npos) text_ += ".0";
  return *this;
}

JsonWriter& JsonWriter::Bool(bool value) {
  Separate();
  text_ += value ? "true" : "false";
  return *this;
}

JsonWriter& JsonWriter::Raw(std::string_view json) {
  Separate();
  text_ += json;
  return *this;
}

JsonWriter& JsonWriter::Null() {
  Separate();
  text_ += "null";
  return *this;
}

}  // namespace fathom
