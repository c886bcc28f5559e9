// Collectives between processes of one host, through shared memory.
//
// Each rank has two windows of shared memory that it uses in turn. To sum, every rank copies its
// part into its window, all meet, each sums one slice of the elements over all windows in rank
// order, all meet again and copy the result; small tensors are summed by every rank for itself and
// need one meeting. Tensors larger than a window go in chunks. Two windows suffice: who writes one
// again has met all others since they last read it.
//
// A rank that dies or leaves while others wait for it is noticed within some 20 ms.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/time/time.h"
#include "worker/blackboard.h"

namespace fathom {

struct ShmCommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  uint64_t epoch = 0;
  int64_t window_bytes = 1 << 20;  // multiple of 64
  // How long a rank waits for the others in a collective. A last resort: who waits too long is
  // usually aborted by the coordinator first.
  absl::Duration timeout = absl::Seconds(120);
};

// Bytes of /dev/shm that the group will take, all ranks together.
int64_t ShmBytesNeeded(const ShmCommunicatorOptions& options);

// Errors of collectives besides those of Communicator: Unavailable when a rank's process ended,
// Aborted when a rank left, Internal when ranks disagree on what they are doing.
std::unique_ptr<GroupCommunicator> MakeShmCommunicator(const ShmCommunicatorOptions& options);

}  // namespace fathom
