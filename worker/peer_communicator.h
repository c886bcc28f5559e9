// Collectives between the GPUs of one host, through each other's memory: sums are kernels that meet
// each other (kernels/peer_memory.h), bytes of the host go through a communicator of the host.
//
// Sums and gathering are queued on the device and return at once: that a rank is lost shows in
// status(), in BroadcastFromRank0 and in every later call, once the device has come so far. A rank
// that is told to stop ends its own waiting within a millisecond; the others find out from the
// coordinator, or at the end of their timeout.
#pragma once

#include <memory>

#include "absl/time/time.h"
#include "kernels/device.h"
#include "worker/blackboard.h"

namespace fathom {

struct PeerCommunicatorOptions {
  int rank = 0;
  int world_size = 2;  // at most kMostPeerRanks
  // How long a kernel waits for other ranks. A last resort, as in ShmCommunicatorOptions.
  absl::Duration timeout = absl::Seconds(120);
};

// `host`, of the same rank and size, is not connected yet. `device` must outlive the communicator.
//
// Errors of Connect besides those of `host`: FailedPrecondition when GPUs cannot reach each other's
// memory, InvalidArgument beyond kMostPeerRanks, Unimplemented for devices that have none to share.
std::unique_ptr<GroupCommunicator> MakePeerCommunicator(const PeerCommunicatorOptions& options,
                                                        Device& device,
                                                        std::unique_ptr<GroupCommunicator> host);

}  // namespace fathom
