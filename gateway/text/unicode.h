// Unicode classes of characters, as regular expressions name them.
//
// Thread-safe. Source: Unicode 16.0.0 through make_unicode_tables.py, which says why that version.
#pragma once

#include <cstdint>

namespace fathom {

enum class CharacterClass : uint8_t {
  kOther,        // control, format, private use, unassigned
  kLetter,       // \p{L}
  kMark,         // \p{M}
  kNumber,       // \p{N}
  kPunctuation,  // \p{P}
  kSymbol,       // \p{S}
  kSpace         // \s
};

// The class of every code point, indexed by it; 0x110000 of them.
const CharacterClass* CharacterClasses();

inline CharacterClass ClassOf(char32_t code_point) { return CharacterClasses()[code_point]; }

}  // namespace fathom
