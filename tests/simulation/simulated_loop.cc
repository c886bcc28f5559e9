#include "tests/simulation/simulated_loop.h"

#include <utility>

namespace fathom {

SimulatedLoop::SimulatedLoop(Options options, World& world, Metrics& metrics,
                             SimulatedCluster::Listener listener, Engine::OnLost on_lost,
                             std::function<void()> on_heartbeat)
    : world_(world),
      board_({}, nullptr),
      inbox_(options.max_queued_requests, [this] { Wake(); }),
      cluster_(std::move(options.cluster), world, std::move(listener)),
      engine_(options.engine, inbox_, board_, metrics, std::move(on_lost)),
      on_heartbeat_(std::move(on_heartbeat)) {}

bool SimulatedLoop::is_serving() const {
  return board_.server_info().state() == v1::ServerInfo::STATE_SERVING;
}

void SimulatedLoop::Wake() {
  if (is_woken_ || is_forming_ || has_ended_) return;
  is_woken_ = true;
  const absl::Duration latency =
      world_.random.Between(absl::ZeroDuration(), absl::Microseconds(200));
  world_.clock.After(latency, [this] {
    is_woken_ = false;
    Advance();
  });
}

void SimulatedLoop::Advance() {
  if (is_forming_ || has_ended_) return;
  const Engine::Next next = engine_.Advance(world_.clock.now());
  ++num_waits_;
  on_heartbeat_();
  switch (next.kind) {
    case Engine::Next::Kind::kWait:
      if (next.until == absl::InfiniteDuration()) return;
      world_.clock.At(next.until, [this, wait = num_waits_] {
        if (wait == num_waits_) Advance();
      });
      return;
    case Engine::Next::Kind::kFormGroup:
      return Form();
    case Engine::Next::Kind::kEnd:
      world_.Log("loop ended");
      has_ended_ = true;
      return;
  }
}

void SimulatedLoop::Form() {
  is_forming_ = true;
  cluster_.Form(
      engine_.last_epoch(), [this] { Wake(); },
      [this](absl::StatusOr<std::unique_ptr<WorkerGroup>> group) {
        is_forming_ = false;
        engine_.TakeGroup(std::move(group), world_.clock.now());
        Wake();
      });
}

void SimulatedLoop::Drain() {
  world_.Log("drain");
  board_.SetState(v1::ServerInfo::STATE_DRAINING, "");
  if (!inbox_.Give(Inbox::Order::kDrain)) cluster_.CancelForming();
}

void SimulatedLoop::Stop() {
  world_.Log("stop");
  board_.SetState(v1::ServerInfo::STATE_DRAINING, "");
  inbox_.Give(Inbox::Order::kStop);
  cluster_.CancelForming();
}

}  // namespace fathom
