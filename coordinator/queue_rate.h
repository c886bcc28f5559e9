// How many tokens of waiting requests are begun in a second: the mean of the last half minute or
// so in which some waited, so that a client can be told when it is worth trying again.
//
// Time is an argument. Not thread-safe; only Engine calls it.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/time/time.h"

namespace fathom {

class QueueRate {
 public:
  // `num_tokens`: that were begun so far, in all. `some_wait`: from now on, until the next note.
  void Note(absl::Duration now, int64_t num_tokens, bool some_wait) {
    if (num_tokens < noted_) noted_ = num_tokens;  // it counts from 0 again
    const absl::Duration elapsed = now - noted_at_;
    const bool some_waited = std::exchange(some_wait_, some_wait);
    if (some_waited && elapsed < kInterval) return;
    if (some_waited) {
      const double seconds = absl::ToDoubleSeconds(elapsed);
      const double rate = static_cast<double>(num_tokens - noted_) / seconds;
      const double weight = has_rate_ ? 1 - std::exp(-seconds / kMemorySeconds) : 1;
      rate_ += weight * (rate - rate_);
      has_rate_ = true;
    }
    noted_ = num_tokens;
    noted_at_ = now;
  }

  // 0: not known yet.
  double tokens_per_second() const { return rate_; }

 private:
  static constexpr absl::Duration kInterval = absl::Seconds(1);
  static constexpr double kMemorySeconds = 15;

  bool some_wait_ = false;
  bool has_rate_ = false;
  double rate_ = 0;
  int64_t noted_ = 0;
  absl::Duration noted_at_ = absl::ZeroDuration();
};

}  // namespace fathom
