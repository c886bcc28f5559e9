#include "tests/simulation/simulated_loop.h"

#include <utility>

namespace fathom {

SimulatedLoop::SimulatedLoop(const StepLoop::Options& options, SimulatedCluster::Options cluster,
                             World& world, StatusBoard& board, Metrics& metrics,
                             Engine::OnLost on_lost, Listener listener)
    : world_(world),
      board_(board),
      listener_(std::move(listener)),
      inbox_({.max_requests = options.max_queued_requests, .max_tokens = options.max_queued_tokens},
             [this] { Wake(); }),
      cluster_(std::move(cluster), world, listener_.cluster),
      engine_(options.engine, inbox_, board_, metrics,
              [this, on_lost = std::move(on_lost)](std::vector<Inbox::Submission> unfinished) {
                listener_.on_lost(unfinished);
                on_lost(std::move(unfinished));
              }) {}

absl::Status SimulatedLoop::Prepare(const v1::Grammar&,
                                    std::function<void(const absl::Status& status)> done) {
  const absl::Duration time = world_.random.Between(absl::ZeroDuration(), absl::Milliseconds(20));
  const absl::Status status =
      world_.random.OneIn(10) ? absl::UnavailableError("made up") : absl::OkStatus();
  world_.clock.After(time, [this, status, done = std::move(done)] {
    ++world_.tally.prepared;
    done(status);
  });
  return absl::OkStatus();
}

absl::StatusOr<SequenceId> SimulatedLoop::Submit(LiveRequest live) {
  const LiveRequest queued = live;
  const absl::StatusOr<SequenceId> id = inbox_.Submit(std::move(live));
  if (id.ok()) listener_.on_queued(*id, queued);
  return id;
}

absl::StatusOr<SequenceId> SimulatedLoop::Resume(LiveRequest live) {
  const LiveRequest queued = live;
  const absl::StatusOr<SequenceId> id = inbox_.Resume(std::move(live));
  if (id.ok()) {
    ++world_.tally.resumed;
    listener_.on_queued(*id, queued);
  }
  return id;
}

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
  listener_.on_heartbeat();
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
