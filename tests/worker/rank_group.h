// A group of ranks for tests: each in a thread of this process, or each in a process of its own.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/blackboard.h"

namespace fathom {

using RankBody = std::function<absl::Status(GroupCommunicator& communicator)>;
using MakeCommunicator =
    std::function<std::unique_ptr<GroupCommunicator>(int rank, int world_size)>;

// Connects all ranks and runs `body` in one thread per rank. The communicators live until all
// bodies have returned. Gives each rank's status.
std::vector<absl::Status> RunInThreads(int world_size, const MakeCommunicator& make,
                                       const RankBody& body);

// The same in one process per rank, which meet through files. A body may end its process; its
// status is then Unknown. No other thread may run in this process.
std::vector<absl::Status> RunInProcesses(int world_size, const MakeCommunicator& make,
                                         const RankBody& body);

}  // namespace fathom
