// Joins pieces of text. (Where absl::string_view is a type of its own, absl::StrCat does not take
// the standard's.)
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

namespace fathom {

inline void Append(std::string& text, std::initializer_list<std::string_view> pieces) {
  for (const std::string_view piece : pieces) text += piece;
}

inline std::string Concat(std::initializer_list<std::string_view> pieces) {
  std::string text;
  Append(text, pieces);
  return text;
}

}  // namespace fathom
