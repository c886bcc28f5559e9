// The simulated clock: what happens when, and nothing else moves time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace fathom {

class EventQueue {
 public:
  absl::Duration now() const { return now_; }

  // Events of the same time happen in the order in which they were planned.
  void At(absl::Duration time, std::function<void()> action) {
    events_.push(
        {.time = std::max(time, now_), .number = ++last_number_, .action = std::move(action)});
  }
  void After(absl::Duration delay, std::function<void()> action) {
    At(now_ + delay, std::move(action));
  }

  // Lets the next event happen. False when there is none.
  bool RunNext() {
    if (events_.empty()) return false;
    const Event event = std::move(const_cast<Event&>(events_.top()));  // popped at once
    events_.pop();
    now_ = event.time;
    event.action();
    return true;
  }

 private:
  struct Event {
    absl::Duration time;
    uint64_t number;
    std::function<void()> action;
    bool operator<(const Event& other) const {  // the queue's top is the greatest
      return time != other.time ? time > other.time : number > other.number;
    }
  };

  absl::Duration now_;
  uint64_t last_number_ = 0;
  std::priority_queue<Event> events_;
};

}  // namespace fathom
