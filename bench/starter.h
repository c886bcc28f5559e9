// Starts what is to begin later, on a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <queue>
#include <thread>
#include <utility>
#include <vector>

namespace fathom {

class Starter {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // `start` is called with `mutex` held, which is the caller's for what it touches.
  Starter(std::mutex& mutex, std::function<void(int)> start)
      : mutex_(mutex), start_(std::move(start)), thread_([this] { Run(); }) {}
  // What is not due yet is not started.
  ~Starter() {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Starter(const Starter&) = delete;
  Starter& operator=(const Starter&) = delete;

  // Requires `mutex`.
  void StartAt(TimePoint when, int index) {
    due_.emplace(when, index);
    changed_.notify_one();
  }

 private:
  using Due = std::pair<TimePoint, int>;

  void Run() {
    std::unique_lock lock(mutex_);
    while (!is_over_) {
      if (due_.empty()) {
        changed_.wait(lock);
      } else if (const auto [when, index] = due_.top(); std::chrono::steady_clock::now() < when) {
        changed_.wait_until(lock, when);
      } else {
        due_.pop();
        start_(index);
      }
    }
  }

  std::mutex& mutex_;
  const std::function<void(int)> start_;
  // Guarded by mutex_.
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  bool is_over_ = false;
  std::condition_variable changed_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace fathom
