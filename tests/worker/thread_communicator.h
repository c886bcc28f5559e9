// Ranks as threads of one process: the collectives of a test.
#pragma once

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "base/check.h"
#include "kernels/number_formats.h"
#include "worker/communicator.h"

namespace fathom {

// Where the ranks of one group meet. Outlives its communicators.
class ThreadGroup {
 public:
  explicit ThreadGroup(int world_size) : world_size_(world_size), bytes_(world_size) {}

  int world_size() const { return world_size_; }

  // Leaves `bytes` for the others and waits until all have; they stay readable until Leave.
  void Meet(int rank, const void* bytes) {
    bytes_[rank] = bytes;
    Wait();
  }
  const void* bytes_of(int rank) const { return bytes_[rank]; }
  void Leave() { Wait(); }

 private:
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++num_waiting_ == world_size_) {
      num_waiting_ = 0;
      ++round_;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

  const int world_size_;
  std::vector<const void*> bytes_;  // written before Wait, read after: the mutex orders them
  std::mutex mutex_;
  std::condition_variable all_here_;
  int num_waiting_ = 0;
  int round_ = 0;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(int rank, ThreadGroup& group) : rank_(rank), group_(group) {}

  int rank() const override { return rank_; }
  int world_size() const override { return group_.world_size(); }

  absl::Status AllReduceSum(const Tensor& tensor) override {
    CHECK(tensor.dense());
    if (tensor.dtype() == DType::kF32) {
      AllReduce<float>(tensor);
    } else {
      AllReduce<BFloat16>(tensor);
    }
    return absl::OkStatus();
  }

  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override {
    CHECK(part.dense());
    group_.Meet(rank_, part.raw());
    if (rank_ == 0) {
      CHECK(whole.dense());
      CHECK_EQ(whole.num_bytes(), world_size() * part.num_bytes());
      for (int rank = 0; rank < world_size(); ++rank) {
        std::memcpy(static_cast<char*>(whole.raw()) + rank * part.num_bytes(),
                    group_.bytes_of(rank), part.num_bytes());
      }
    }
    group_.Leave();
    return absl::OkStatus();
  }

  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override {
    group_.Meet(rank_, bytes);
    if (rank_ != 0) std::memcpy(bytes, group_.bytes_of(0), num_bytes);
    group_.Leave();
    return absl::OkStatus();
  }

  void Abort() override {}

 private:
  template <typename Element>
  void AllReduce(const Tensor& tensor) {
    group_.Meet(rank_, tensor.raw());
    std::vector<Element> sums(tensor.num_elements());
    for (int64_t i = 0; i < tensor.num_elements(); ++i) {
      float sum = 0.0f;
      for (int rank = 0; rank < world_size(); ++rank) {
        sum += ToFloat(static_cast<const Element*>(group_.bytes_of(rank))[i]);
      }
      StoreFloat(sum, &sums[i]);
    }
    group_.Leave();
    std::memcpy(tensor.raw(), sums.data(), tensor.num_bytes());
  }

  const int rank_;
  ThreadGroup& group_;
};

}  // namespace fathom
