// Collectives that devices of one host make among themselves, through each other's memory. They
// take their turn among the device's operations, need no host in between, and can be recorded.
//
// Not thread-safe, but Abort and fault may be called from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/tensor.h"

namespace fathom {

struct PeerMemoryOptions {
  int rank = 0;
  int world_size = 2;  // 2 to kMostPeerRanks
  // How long a collective waits for the other ranks.
  absl::Duration timeout = absl::Seconds(120);
};

inline constexpr int kMostPeerRanks = 8;

// Why collectives give no results any more.
struct PeerFault {
  enum class Kind { kNone, kAborted, kTimedOut };
  Kind kind = Kind::kNone;
  int silent_rank = -1;  // kTimedOut: one that was waited for in vain
};

class PeerMemory {
 public:
  // Aborts, and waits until none of this rank's collectives is running.
  virtual ~PeerMemory() = default;

  // What another rank needs to reach this one's memory. Who gives it away has no collective of an
  // earlier group under way any more.
  virtual std::string handle() const = 0;

  // Reaches all others and makes this rank's memory ready for them. After it, and before the first
  // collective, all ranks must have met. FailedPrecondition names a rank whose memory cannot be
  // reached. REQUIRES: called once; handles of all ranks, in their order.
  virtual absl::Status Connect(const std::vector<std::string>& handles) = 0;

  // As in Communicator; queued. After a fault they do nothing.
  virtual void AllReduceSum(const Tensor& tensor) = 0;
  virtual void GatherToRank0(const Tensor& part, const Tensor& whole) = 0;
  // Whether it can, which shapes decide. As Communicator::AllReduceAddRmsNorm, with the two parts
  // of `quantized`.
  virtual bool AllReduceAddRmsNorm(const Tensor& partial, const Tensor& residual,
                                   const Tensor& weight, float eps, const Tensor& normed,
                                   const Tensor& values, const Tensor& scales) = 0;

  // Ends all waiting, now and later.
  virtual void Abort() = 0;
  // What is known by now; all that was queued, once the device was waited for.
  virtual PeerFault fault() const = 0;
};

}  // namespace fathom
