// Engine with a thread, a clock and gRPC: one worker group, kept alive and busy.
//
// The thread forms groups and advances the engine; with nothing to do it sleeps until the inbox or
// the workers have something. A server with several groups has as many of these.
#pragma once

#include <cstdint>
#include <memory>
#include <stop_token>
#include <thread>

#include "absl/status/statusor.h"
#include "coordinator/doorbell.h"
#include "coordinator/engine.h"
#include "coordinator/grammar_gate.h"
#include "coordinator/group_formation.h"
#include "coordinator/group_loop.h"
#include "coordinator/inbox.h"
#include "coordinator/live_request.h"
#include "coordinator/metrics.h"
#include "coordinator/status_board.h"

namespace fathom {

class StepLoop final : public GroupLoop {
 public:
  struct Options {
    GroupOptions group;
    Engine::Options engine;
    int max_queued_requests = 1024;  // that wait; beyond it requests are refused
    int64_t max_queued_tokens = 0;   // of their prompts, unless one waits alone; 0: any
  };

  // `board` and `metrics` outlive this. `on_lost` gets the unfinished requests when the workers are
  // lost, on the thread of this, which it must not hold up.
  StepLoop(Options options, StatusBoard& board, Metrics& metrics,
           Engine::OnLost on_lost = Engine::EndLost);
  ~StepLoop() override;  // stops and joins

  void Start() override;
  absl::Status Prepare(const v1::Grammar& grammar, GrammarGate::Done done) override;
  absl::StatusOr<SequenceId> Submit(LiveRequest live) override;
  absl::StatusOr<SequenceId> Resume(LiveRequest live) override;
  void Cancel(SequenceId id) override;
  void Drain() override;
  void Stop() override;
  void Join() override;

 private:
  void Run();
  absl::StatusOr<std::unique_ptr<WorkerGroup>> Form();

  const GroupOptions group_options_;
  GrammarGate grammar_gate_;
  StatusBoard& board_;
  Doorbell doorbell_;  // rung by the inbox and by the group
  Inbox inbox_;
  Engine engine_;  // of the thread alone
  std::stop_source stop_;
  std::jthread thread_;
};

}  // namespace fathom
