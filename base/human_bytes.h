// Sizes as people read them.
#pragma once

#include <array>
#include <cstddef>
#include <string>

#include "absl/strings/str_format.h"

namespace fathom {

// "13.9 GiB", "312 MiB", "1.5 KiB", "7 B".
inline std::string HumanBytes(double bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  if (bytes < 100 && unit > 0) return absl::StrFormat("%.1f %s", bytes, kUnits[unit]);
  return absl::StrFormat("%.0f %s", bytes, kUnits[unit]);
}

}  // namespace fathom
