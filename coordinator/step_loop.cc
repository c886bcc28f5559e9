#include "coordinator/step_loop.h"

#include <string>
#include <utility>

#include "base/monotonic_time.h"
#include "spdlog/spdlog.h"

namespace fathom {

StepLoop::StepLoop(Options options, StatusBoard& board, Metrics& metrics, Engine::OnLost on_lost)
    : group_options_(std::move(options.group)),
      grammar_gate_({.address = group_options_.addresses.front(), .tls = group_options_.tls}),
      board_(board),
      inbox_({.max_requests = options.max_queued_requests, .max_tokens = options.max_queued_tokens},
             [this] { doorbell_.Ring(); }),
      engine_(options.engine, inbox_, board, metrics, std::move(on_lost)) {}

StepLoop::~StepLoop() {
  Stop();
  Join();
}

void StepLoop::Start() {
  thread_ = std::jthread([this] { Run(); });
}

absl::Status StepLoop::Prepare(const v1::Grammar& grammar, GrammarGate::Done done) {
  return grammar_gate_.Prepare(grammar, std::move(done));
}

absl::StatusOr<SequenceId> StepLoop::Submit(LiveRequest live) {
  return inbox_.Submit(std::move(live));
}

absl::StatusOr<SequenceId> StepLoop::Resume(LiveRequest live) {
  return inbox_.Resume(std::move(live));
}

void StepLoop::Cancel(SequenceId id) { inbox_.Cancel(id); }

void StepLoop::Drain() {
  const bool was_open = inbox_.Give(Inbox::Order::kDrain);
  board_.SetState(v1::ServerInfo::STATE_DRAINING, "running requests finish, new are refused");
  if (!was_open) stop_.request_stop();  // nothing runs, and a group may never form
}

void StepLoop::Stop() {
  inbox_.Give(Inbox::Order::kStop);
  board_.SetState(v1::ServerInfo::STATE_DRAINING, "stopping");
  stop_.request_stop();
  grammar_gate_.Close();
}

void StepLoop::Join() {
  if (thread_.joinable()) thread_.join();
  // After a drain too: what was still to be prepared would have nowhere to go.
  grammar_gate_.Close();
  grammar_gate_.Join();
}

void StepLoop::Run() {
  while (true) {
    const absl::Duration now = MonotonicNow();
    const Engine::Next next = engine_.Advance(now);
    switch (next.kind) {
      case Engine::Next::Kind::kWait:
        doorbell_.Wait(next.until - now);
        break;
      case Engine::Next::Kind::kFormGroup:
        engine_.TakeGroup(Form(), MonotonicNow());
        break;
      case Engine::Next::Kind::kEnd:
        return;
    }
  }
}

absl::StatusOr<std::unique_ptr<WorkerGroup>> StepLoop::Form() {
  spdlog::info("forming a group of {} workers", group_options_.addresses.size());
  const auto report_progress = [this](const std::string& line) {
    spdlog::info("{}", line);
    board_.SetState(v1::ServerInfo::STATE_STARTING, line);
  };
  return FormGroup(group_options_, engine_.last_epoch(), stop_.get_token(), report_progress,
                   [this] { doorbell_.Ring(); });
}

}  // namespace fathom
