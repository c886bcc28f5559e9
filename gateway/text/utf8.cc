#include "gateway/text/utf8.h"

#include <cstdint>

namespace fathom {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

// What a first byte promises: the length, and the range of the second byte, which excludes
// overlong forms, surrogates and what lies beyond U+10FFFF.
struct FirstByte {
  int length;  // 0: cannot begin a character
  uint8_t second_low = 0x80;
  uint8_t second_high = 0xBF;
};

FirstByte ReadFirstByte(uint8_t byte) {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {0};
  if (byte < 0xE0) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

}  // namespace

Utf8Character ReadUtf8(std::string_view bytes) {
  const auto at = [bytes](int i) { return static_cast<uint8_t>(bytes[i]); };
  const FirstByte first = ReadFirstByte(at(0));
  if (first.length == 1) return {Utf8Status::kValid, 1, at(0)};
  if (first.length == 0) return {Utf8Status::kInvalid, 1, kReplacement};

  char32_t code_point = at(0) & (0x7F >> first.length);
  for (int i = 1; i < first.length; ++i) {
    if (static_cast<size_t>(i) == bytes.size()) return {Utf8Status::kIncomplete, i, kReplacement};
    const uint8_t low = i == 1 ? first.second_low : 0x80;
    const uint8_t high = i == 1 ? first.second_high : 0xBF;
    if (at(i) < low || at(i) > high) return {Utf8Status::kInvalid, i, kReplacement};
    code_point = code_point << 6 | (at(i) & 0x3F);
  }
  return {Utf8Status::kValid, first.length, code_point};
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  while (!text.empty()) {
    const Utf8Character character = ReadUtf8(text);
    valid.append(character.status == Utf8Status::kValid ? text.substr(0, character.bytes)
                                                        : kReplacementCharacter);
    text.remove_prefix(character.bytes);
  }
  return valid;
}

}  // namespace fathom
