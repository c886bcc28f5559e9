// How many tokens of waiting requests are begun in a second: the mean of the last half minute or
// so, so that a client can be told when it is worth trying again.
//
// Time is an argument. Not thread-safe; only Engine calls it.
#pragma once

#include <cmath>
#include <cstdint>

#include "absl/time/time.h"

namespace fathom {

class QueueRate {
 public:
  // `num_tokens`: that were begun so far, in all.
  void Note(absl::Duration now, int64_t num_tokens) {
    if (num_tokens < noted_) noted_ = num_tokens;  // it counts from 0 again
    const absl::Duration elapsed = now - noted_at_;
    if (elapsed < kInterval) return;
    const double seconds = absl::ToDoubleSeconds(elapsed);
    const double rate = static_cast<double>(num_tokens - noted_) / seconds;
    if (has_rate_) {
      rate_ += (1 - std::exp(-seconds / kMemorySeconds)) * (rate - rate_);
    } else if (has_begun_) {
      rate_ = rate;
      has_rate_ = true;
    }
    has_begun_ = true;
    noted_ = num_tokens;
    noted_at_ = now;
  }

  // 0: not known yet.
  double tokens_per_second() const { return rate_; }

 private:
  static constexpr absl::Duration kInterval = absl::Seconds(1);
  static constexpr double kMemorySeconds = 15;

  bool has_begun_ = false;
  bool has_rate_ = false;
  double rate_ = 0;
  int64_t noted_ = 0;
  absl::Duration noted_at_ = -absl::InfiniteDuration();
};

}  // namespace fathom
