// Time that nobody sets, from an origin of its own: for what is measured within a process.
#pragma once

#include <chrono>

#include "absl/time/time.h"

namespace fathom {

inline absl::Duration MonotonicNow() {
  return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

}  // namespace fathom
