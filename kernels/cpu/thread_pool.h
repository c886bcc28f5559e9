// A fixed set of threads that share one loop at a time. With one thread there is no thread at all:
// the caller runs the loop.
//
// Threads sleep between loops; nothing spins, because several workers usually share the machine's
// cores. Not thread-safe: one thread, always the same, calls ParallelFor.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fathom {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // REQUIRES: ≥ 1; the caller counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // body(range, begin, end): no two bodies that run at a time have the same range, which is less
  // than num_threads().
  using Body = std::function<void(int range, int64_t begin, int64_t end)>;

  // Cuts [0, count) into at most num_threads() ranges of nearly equal length, the same ones each
  // time, and calls body once for each; returns when all have ended. Ranges are no shorter than
  // `smallest_range`, so that little loops stay on the caller's thread.
  void ParallelFor(int64_t count, int64_t smallest_range, const Body& body);

 private:
  void RunThread(int thread_index);

  std::mutex mutex_;
  // Guarded by mutex_:
  std::condition_variable started_;
  std::condition_variable ended_;
  const Body* body_ = nullptr;
  int64_t count_ = 0;
  int num_ranges_ = 0;
  int num_running_ = 0;
  uint64_t loop_index_ = 0;  // grows by one with each loop handed out
  bool stopping_ = false;

  std::vector<std::thread> threads_;
};

}  // namespace fathom
