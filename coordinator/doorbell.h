// Wakes the one thread that waits for something to happen. Thread-safe.
#pragma once

#include <condition_variable>
#include <mutex>
#include <utility>

#include "absl/time/time.h"

namespace fathom {

class Doorbell {
 public:
  void Ring() {
    const std::lock_guard lock(mutex_);
    has_rung_ = true;
    rung_.notify_one();
  }

  // Returns when it has rung since it last returned, or after `timeout`, which may be infinite.
  void Wait(absl::Duration timeout) {
    std::unique_lock lock(mutex_);
    const auto has_rung = [this] { return std::exchange(has_rung_, false); };
    if (timeout == absl::InfiniteDuration()) {
      rung_.wait(lock, has_rung);
    } else {
      rung_.wait_for(lock, absl::ToChronoNanoseconds(timeout), has_rung);
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable rung_;
  bool has_rung_ = false;  // guarded by mutex_
};

}  // namespace fathom
