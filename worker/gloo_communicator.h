// Collectives between hosts: TCP connections of every rank with every other, through Gloo.
//
// Gloo only moves the bytes. Its ring algorithms take a hop per rank, each as slow as waking a
// process, and their sums depend on the ring; here every rank sends to all others at once, and sums
// are made in rank order: small tensors whole by every rank, large ones a slice by each.
//
// The connections are neither encrypted nor authenticated: they belong on a private network.
//
// Destroy a communicator only when all ranks are done with their last collective: closing discards
// what a peer has not read yet.
#pragma once

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "worker/blackboard.h"

namespace fathom {

struct GlooCommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  // Name or address of this host under which the other ranks reach it.
  std::string host = "127.0.0.1";
  // How long a rank waits for the others in a collective, as in ShmCommunicatorOptions.
  absl::Duration timeout = absl::Seconds(120);
};

// Errors of collectives besides those of Communicator: Unavailable when the connection with a rank
// broke.
std::unique_ptr<GroupCommunicator> MakeGlooCommunicator(const GlooCommunicatorOptions& options);

}  // namespace fathom
