// How long to wait before a process that ended is started again.
#pragma once

#include <algorithm>
#include <chrono>

namespace fathom {

// Doubles from first_delay to longest_delay while the process keeps dying young. Pure state.
class RestartBackoff {
 public:
  using Milliseconds = std::chrono::milliseconds;
  struct Options {
    Milliseconds first_delay{100};
    Milliseconds longest_delay{5000};
    Milliseconds healthy_after{30'000};  // an uptime that clears the record
  };

  explicit RestartBackoff(Options options) : options_(options), next_(options.first_delay) {}

  // The process ended after `uptime`.
  Milliseconds NextDelay(Milliseconds uptime) {
    if (uptime >= options_.healthy_after) next_ = options_.first_delay;
    const Milliseconds delay = next_;
    next_ = std::min(next_ * 2, options_.longest_delay);
    return delay;
  }

 private:
  const Options options_;
  Milliseconds next_;
};

}  // namespace fathom
