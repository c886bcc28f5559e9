#include "gateway/text/unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

namespace fathom {
namespace {

constexpr char32_t kNumCodePoints = 0x110000;

struct Run {
  char32_t first;
  CharacterClass character_class;
};

using enum CharacterClass;
constexpr Run kRuns[] = {
#include "gateway/text/unicode_tables.inc"
};

// One byte per code point: text touches only the pages of the scripts it is written in.
std::vector<CharacterClass> ExpandRuns() {
  std::vector<CharacterClass> classes(kNumCodePoints);
  for (size_t i = 0; i < std::size(kRuns); ++i) {
    const char32_t end = i + 1 < std::size(kRuns) ? kRuns[i + 1].first : kNumCodePoints;
    std::fill(classes.begin() + kRuns[i].first, classes.begin() + end, kRuns[i].character_class);
  }
  return classes;
}

}  // namespace

const CharacterClass* CharacterClasses() {
  static const auto& classes = *new std::vector<CharacterClass>(ExpandRuns());
  return classes.data();
}

}  // namespace fathom
