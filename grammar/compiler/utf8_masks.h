// Which tokens may follow where a character has been begun, so that what is written stays UTF-8.
//
// xgrammar thinks in characters, but its ranges let through the bytes of surrogates and, here and
// there, overlong forms. Nobody can read those. Immutable, thread-safe. Source: the Unicode
// standard, table 3-7.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace fathom {

class Utf8Masks {
 public:
  // What is still to come of a character: 0, nothing.
  using State = uint8_t;
  static constexpr int kNumStates = 8;

  explicit Utf8Masks(const std::vector<std::string>& bytes_of_id);

  // The state after the token's bytes. Whatever cannot follow counts as nothing, and a token
  // without text ends what was begun: thoughts may break off within a character.
  State After(State state, int32_t token_id) const;

  // Clears the bits of tokens that cannot follow.
  void Restrict(State state, absl::Span<uint32_t> mask) const;

 private:
  const std::vector<std::string> bytes_of_id_;
  std::array<std::vector<uint32_t>, kNumStates> may_follow_;  // a bit for each token
};

}  // namespace fathom
