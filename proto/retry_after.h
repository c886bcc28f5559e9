// When it is worth trying again: a number of whole seconds that goes with a status, through gRPC as
// its details (proto/status.h). Thread-safe (pure functions).
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace fathom {

inline constexpr char kRetryAfter[] = "fathom/retry-after";  // the name of a status's payload

// Does nothing to a status that is OK.
inline void SetRetryAfter(absl::Status& status, int seconds) {
  status.SetPayload(kRetryAfter, absl::Cord(absl::StrCat(seconds)));
}

inline std::optional<int> RetryAfterOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfter);
  int seconds = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &seconds)) return {};
  return seconds > 0 ? std::optional(seconds) : std::nullopt;
}

}  // namespace fathom
