// One character at a time out of bytes that may not be UTF-8.
//
// Thread-safe (pure functions). Source: Unicode 15 §3.9, table 3-7 and "maximal subpart".
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fathom {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Status {
  kValid,
  kInvalid,    // `bytes` is the length of the longest start of a character here, at least 1
  kIncomplete  // the bytes end within a character that is well-formed so far
};

struct Utf8Character {
  Utf8Status status;
  int bytes;            // how many belong together
  char32_t code_point;  // U+FFFD unless kValid
};

// Reads the character that `bytes` (not empty) begins with.
Utf8Character ReadUtf8(std::string_view bytes);

// `text` with every invalid or incomplete sequence replaced by one U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view text);

}  // namespace fathom
