// All chance in a simulation, of one seed: the same numbers on every machine.
//
// Source: SplitMix64; Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace fathom {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  // In [low, high].
  int Between(int low, int high) {
    return low + static_cast<int>(Next() % (static_cast<uint64_t>(high - low) + 1));
  }
  absl::Duration Between(absl::Duration low, absl::Duration high) {
    const auto range = static_cast<uint64_t>(absl::ToInt64Microseconds(high - low)) + 1;
    return low + absl::Microseconds(static_cast<int64_t>(Next() % range));
  }
  bool OneIn(int n) { return Next() % static_cast<uint64_t>(n) == 0; }
  // With that probability; for rates that are zero in some runs.
  bool Chance(double probability) {
    return static_cast<double>(Next() >> 11) * 0x1p-53 < probability;
  }

 private:
  uint64_t state_;
};

}  // namespace fathom
