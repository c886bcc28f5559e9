// POSIX shared memory that the ranks of one host map, and a sign of life of each of them.
//
// A rank claims a number of its own; the claim ends when the segment is closed or its process ends,
// in whatever way, and the others can see that. (It is a lock on one byte of the open file, which
// the kernel drops; unlike a process id it also works between containers.)
//
// Thread-safe once open.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace fathom {

class SharedSegment {
 public:
  // A new segment of zeros under a name nobody can guess, "/fathom-LABEL-…", readable by this user
  // only. Memory is reserved now: ResourceExhausted says how much is wanted and how much there is,
  // rather than a SIGBUS later.
  static absl::StatusOr<std::unique_ptr<SharedSegment>> Create(const std::string& label,
                                                               int64_t num_bytes);
  // Removes the names of segments whose creators died before they could. Create calls it.
  static void RemoveAbandoned(absl::Time now);

  // NotFound when there is no such segment; FailedPrecondition when it has another size.
  static absl::StatusOr<std::unique_ptr<SharedSegment>> Open(const std::string& name,
                                                             int64_t num_bytes);
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;
  ~SharedSegment();  // the creator also removes the name, if it is still there

  const std::string& name() const { return name_; }
  char* data() const { return data_; }  // page-aligned

  // Removes the name: the memory lives on until the last rank closes it. Only the creator.
  void RemoveName();

  // FailedPrecondition when another open segment has claimed the rank.
  absl::Status ClaimRank(int rank);
  // Whether another open segment, in this process or another, holds the claim.
  bool IsClaimedElsewhere(int rank) const;

 private:
  SharedSegment(std::string name, int descriptor, int64_t num_bytes)
      : name_(std::move(name)), descriptor_(descriptor), num_bytes_(num_bytes) {}
  absl::Status Map();

  const std::string name_;
  const int descriptor_;
  const int64_t num_bytes_;
  char* data_ = nullptr;
  bool owns_name_ = false;
};

}  // namespace fathom
