// What StepLoop is to the real server: drives one Engine and its group of workers, in simulated
// time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "coordinator/engine.h"
#include "coordinator/inbox.h"
#include "coordinator/metrics.h"
#include "coordinator/status_board.h"
#include "tests/simulation/simulated_cluster.h"
#include "tests/simulation/world.h"

namespace fathom {

class SimulatedLoop {
 public:
  struct Options {
    Engine::Options engine;
    int max_queued_requests = 16;
    SimulatedCluster::Options cluster;
  };

  // `on_heartbeat` is called after each. `world` and `metrics` outlive this.
  SimulatedLoop(Options options, World& world, Metrics& metrics,
                SimulatedCluster::Listener listener, Engine::OnLost on_lost,
                std::function<void()> on_heartbeat);

  Inbox& inbox() { return inbox_; }
  const StatusBoard& board() const { return board_; }
  SimulatedCluster& cluster() { return cluster_; }
  bool is_serving() const;
  bool has_ended() const { return has_ended_; }

  void Start() { Wake(); }
  void Drain();
  void Stop();

 private:
  // Soon, as a thread that was woken.
  void Wake();
  void Advance();
  void Form();

  World& world_;
  StatusBoard board_;
  Inbox inbox_;
  SimulatedCluster cluster_;
  Engine engine_;
  const std::function<void()> on_heartbeat_;
  bool is_woken_ = false;
  bool is_forming_ = false;
  bool has_ended_ = false;
  uint64_t num_waits_ = 0;  // tells timers of earlier waits apart
};

}  // namespace fathom
