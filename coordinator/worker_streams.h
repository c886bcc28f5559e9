// The Run streams to the workers of a group: steps out, as the same bytes to all; results in; and
// whether they are there.
//
// Only group_formation makes one; the group owns it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/time/time.h"
#include "coordinator/worker_group.h"
#include "coordinator/worker_group_calls.h"
#include "coordinator/worker_watch.h"

namespace fathom {

class WorkerStreams final : public WorkerGroup::Transport {
 public:
  // Opens the streams; reports to `group`, which outlives this, from gRPC's threads.
  WorkerStreams(WorkerGroup& group, std::vector<WorkerPeer> peers, absl::Duration abort_timeout);

  // Sends Abort(epoch) to all, gives them abort_timeout for it, and cancels the streams.
  ~WorkerStreams() override;

  void Send(const v1::StepCommand& command) override;

 private:
  class Stream;

  const uint64_t epoch_;
  const absl::Duration abort_timeout_;
  const std::vector<WorkerPeer> peers_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::optional<WorkerWatch> watch_;
};

}  // namespace fathom
