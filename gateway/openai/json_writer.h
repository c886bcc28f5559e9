// Writes JSON into a string, compactly, in the order it is told. Keys and values alternate by the
// caller's care; commas are this class's. Not thread-safe.
//
// Strings must be UTF-8; bytes that are not become U+FFFD. Numbers are the shortest that read back
// as the same value; JSON has no NaN and no infinity, so they become null.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fathom {

class JsonWriter {
 public:
  JsonWriter() = default;
  // Goes on with an object that has members already, where `beginning` breaks off.
  explicit JsonWriter(std::string_view beginning);

  JsonWriter& BeginObject();
  JsonWriter& EndObject();
  JsonWriter& BeginArray();
  JsonWriter& EndArray();

  JsonWriter& Key(std::string_view key);

  JsonWriter& String(std::string_view text);
  JsonWriter& Int(int64_t number);
  JsonWriter& Float(float number);
  JsonWriter& Bool(bool value);
  JsonWriter& Null();
  // JSON as it is.
  JsonWriter& Raw(std::string_view json);

  // What was written so far.
  const std::string& text() const { return text_; }
  std::string Take() { return std::move(text_); }

 private:
  // Before a key, or a value of an array: a comma, unless it is the first.
  void Separate();
  void AppendQuoted(std::string_view text);

  std::string text_;
  bool needs_comma_ = false;
};

}  // namespace fathom
