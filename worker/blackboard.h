// Where the ranks of one epoch leave each other the addresses of their collectives: rank 0 keeps
// the values, the others reach them through the Publish and Lookup calls of worker.proto.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "worker/communicator.h"

namespace fathom {

// One epoch's blackboard as a rank sees it. Thread-safe.
class Blackboard {
 public:
  virtual ~Blackboard() = default;

  // AlreadyExists when the key was published with another value.
  virtual absl::Status Publish(const std::string& key, const std::string& value) = 0;
  // Waits until the key is published. DeadlineExceeded names the key.
  virtual absl::StatusOr<std::string> Lookup(const std::string& key, absl::Time deadline) = 0;
};

// A communicator that first has to find the other ranks.
class GroupCommunicator : public Communicator {
 public:
  // Succeeds at all ranks or at none. DeadlineExceeded names a rank that did not come; Aborted
  // after Abort(). REQUIRES: called once, before any collective.
  virtual absl::Status Connect(Blackboard& blackboard, absl::Time deadline) = 0;
};

// What rank 0 keeps, for the current epoch and later ones: a quick rank may publish before rank 0
// has heard of the epoch. Thread-safe.
class BlackboardKeeper {
 public:
  // Forgets older epochs; who still waits for them gets FailedPrecondition. Does nothing when a
  // later one has begun.
  void BeginEpoch(uint64_t epoch);
  // Ends all waiting, now and later, with Unavailable.
  void Close();

  // FailedPrecondition for an epoch that is over; ResourceExhausted beyond kMaxEntries or
  // kMaxValueBytes; else as in Blackboard.
  absl::Status Publish(uint64_t epoch, const std::string& key, const std::string& value);
  absl::StatusOr<std::string> Lookup(uint64_t epoch, const std::string& key, absl::Time deadline);

  static constexpr size_t kMaxEntries = 4096;
  static constexpr size_t kMaxValueBytes = 64 << 10;  // of key and value together

 private:
  absl::Status CheckEpoch(uint64_t epoch) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  uint64_t epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::pair<uint64_t, std::string>, std::string> values_ ABSL_GUARDED_BY(mutex_);
};

// Rank 0's own view of what it keeps. `keeper` must outlive it.
class LocalBlackboard final : public Blackboard {
 public:
  LocalBlackboard(BlackboardKeeper& keeper, uint64_t epoch) : keeper_(keeper), epoch_(epoch) {}

  absl::Status Publish(const std::string& key, const std::string& value) override {
    return keeper_.Publish(epoch_, key, value);
  }
  absl::StatusOr<std::string> Lookup(const std::string& key, absl::Time deadline) override {
    return keeper_.Lookup(epoch_, key, deadline);
  }

 private:
  BlackboardKeeper& keeper_;
  const uint64_t epoch_;
};

}  // namespace fathom
