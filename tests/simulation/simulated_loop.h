// What StepLoop is to the real server: drives one Engine and its group of workers, in simulated
// time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/group_loop.h"
#include "coordinator/inbox.h"
#include "coordinator/metrics.h"
#include "coordinator/status_board.h"
#include "coordinator/step_loop.h"
#include "tests/simulation/simulated_cluster.h"
#include "tests/simulation/world.h"

namespace fathom {

class SimulatedLoop final : public GroupLoop {
 public:
  // What the run is told, at once.
  struct Listener {
    SimulatedCluster::Listener cluster;
    std::function<void(SequenceId id, const LiveRequest& live)> on_queued;
    std::function<void(const std::vector<Inbox::Submission>& unfinished)> on_lost;
    std::function<void()> on_heartbeat;
  };

  // All references outlive this.
  SimulatedLoop(const StepLoop::Options& options, SimulatedCluster::Options cluster, World& world,
                StatusBoard& board, Metrics& metrics, Engine::OnLost on_lost, Listener listener);

  void Start() override { Wake(); }
  // Takes its time, and sometimes fails.
  absl::Status Prepare(const v1::Grammar& grammar,
                       std::function<void(const absl::Status& status)> done) override;
  absl::StatusOr<SequenceId> Submit(LiveRequest live) override;
  absl::StatusOr<SequenceId> Resume(LiveRequest live) override;
  void Cancel(SequenceId id) override { inbox_.Cancel(id); }
  void Drain() override;
  void Stop() override;
  void Join() override {}

  const StatusBoard& board() const { return board_; }
  SimulatedCluster& cluster() { return cluster_; }
  bool is_serving() const;
  bool has_ended() const { return has_ended_; }

 private:
  // Soon, as a thread that was woken.
  void Wake();
  void Advance();
  void Form();

  World& world_;
  StatusBoard& board_;
  const Listener listener_;
  Inbox inbox_;
  SimulatedCluster cluster_;
  Engine engine_;
  bool is_woken_ = false;
  bool is_forming_ = false;
  bool has_ended_ = false;
  uint64_t num_waits_ = 0;  // tells timers of earlier waits apart
};

}  // namespace fathom
