#include "kernels/cpu/thread_pool.h"

#include <algorithm>

#include "base/check.h"

namespace fathom {

ThreadPool::ThreadPool(int num_threads) {
  CHECK_GE(num_threads, 1);
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { RunThread(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  started_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::ParallelFor(int64_t count, int64_t smallest_range, const Body& body) {
  if (count <= 0) return;
  const int64_t most_ranges = std::max<int64_t>(1, count / std::max<int64_t>(1, smallest_range));
  const int num_ranges = static_cast<int>(std::min<int64_t>(num_threads(), most_ranges));
  if (num_ranges == 1) {
    body(0, 0, count);
    return;
  }

  {
    const std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    count_ = count;
    num_ranges_ = num_ranges;
    num_running_ = num_ranges - 1;
    ++loop_index_;
  }
  started_.notify_all();
  body(0, 0, count / num_ranges);

  std::unique_lock<std::mutex> lock(mutex_);
  ended_.wait(lock, [this] { return num_running_ == 0; });
}

void ThreadPool::RunThread(int thread_index) {
  uint64_t last_loop_index = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    started_.wait(lock, [&] { return stopping_ || loop_index_ != last_loop_index; });
    if (stopping_) return;
    last_loop_index = loop_index_;
    // A loop of few ranges may have ended before this thread woke: its range is not among them.
    if (thread_index >= num_ranges_) continue;
    const int64_t begin = count_ * thread_index / num_ranges_;
    const int64_t end = count_ * (thread_index + 1) / num_ranges_;
    const Body& body = *body_;

    lock.unlock();
    body(thread_index, begin, end);
    lock.lock();
    if (--num_running_ == 0) ended_.notify_one();
  }
}

}  // namespace fathom
