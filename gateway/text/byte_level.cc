#include "gateway/text/byte_level.h"

#include <array>

#include "gateway/text/utf8.h"

namespace fathom {
namespace {

constexpr bool IsPrintable(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// Printable Latin-1 spells itself; the other 68 bytes are U+0100 and up, in order.
constexpr int kNumSpellings = 0x100 + 68;

struct Spellings {
  std::array<char32_t, 256> of_byte{};
  std::array<int, kNumSpellings> byte_of{};
};

constexpr Spellings MakeSpellings() {
  Spellings spellings;
  for (int& byte : spellings.byte_of) byte = -1;
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const char32_t spelling = IsPrintable(byte) ? static_cast<char32_t>(byte) : next++;
    spellings.of_byte[byte] = spelling;
    spellings.byte_of[spelling] = byte;
  }
  return spellings;
}

constexpr Spellings kSpellings = MakeSpellings();

}  // namespace

std::optional<std::string> BytesFromSpelling(std::string_view spelled) {
  std::string bytes;
  while (!spelled.empty()) {
    const Utf8Character character = ReadUtf8(spelled);
    if (character.code_point >= kNumSpellings) return std::nullopt;
    const int byte = kSpellings.byte_of[character.code_point];
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
    spelled.remove_prefix(character.bytes);
  }
  return bytes;
}

std::string SpellByte(uint8_t byte) {
  const char32_t spelling = kSpellings.of_byte[byte];  // below U+0800: at most two bytes
  if (spelling < 0x80) return std::string(1, static_cast<char>(spelling));
  return {static_cast<char>(0xC0 | spelling >> 6), static_cast<char>(0x80 | (spelling & 0x3F))};
}

}  // namespace fathom
