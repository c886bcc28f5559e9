// Collectives between GPUs, of one host or several, through NVIDIA's library NCCL, which is loaded
// when it is first wanted. Bytes of the host go through a communicator of the host.
//
// NCCL sums in an order of its own and rounds to the tensor's type on the way: the same bits on all
// ranks and, for the same shapes, in every run, but not those of rank order.
//
// Sums and gathering are queued on the device and return at once, as in peer_communicator.h. A
// thread watches: an error that NCCL finds later, a collective that is not over `timeout` after it
// was queued, or Abort end all that runs and waits (ncclCommAbort is that thread's alone).
// Collectives that are replayed from a recording are not timed: the coordinator's limit on steps,
// which aborts, is theirs.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/device.h"
#include "worker/blackboard.h"

namespace fathom {

struct NcclCommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  absl::Duration timeout = absl::Seconds(120);
};

// `host`, of the same rank and size, is not connected yet. `device`, a GPU, must outlive the
// communicator. Unavailable when the library is not there, or was not when this was built
// (nccl_unavailable.cc).
//
// Errors of Connect besides those of `host`: Unavailable with what NCCL says.
absl::StatusOr<std::unique_ptr<GroupCommunicator>> MakeNcclCommunicator(
    const NcclCommunicatorOptions& options, Device& device,
    std::unique_ptr<GroupCommunicator> host);

}  // namespace fathom
