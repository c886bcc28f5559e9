// How byte-level tokenizers spell bytes: each byte as one printable character ("Ġ" is a space).
//
// Thread-safe (pure functions). Source: openai/gpt-2 encoder.py, bytes_to_unicode.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace fathom {

// The bytes that `spelled` (valid UTF-8) stands for; nullopt when it has a character that spells
// no byte, as the text of special tokens often has.
std::optional<std::string> BytesFromSpelling(std::string_view spelled);

// How `byte` is spelled, in UTF-8.
std::string SpellByte(uint8_t byte);

}  // namespace fathom
