// Engine with a thread, a clock and gRPC: one worker group, kept alive and busy.
//
// The thread forms groups and advances the engine; with nothing to do it sleeps until the inbox or
// the workers have something. A server with several groups has as many of these.
//
// Thread-safe, except that Start and Join are called once each, by the owner.
#pragma once

#include <memory>
#include <stop_token>
#include <thread>

#include "absl/status/statusor.h"
#include "coordinator/doorbell.h"
#include "coordinator/engine.h"
#include "coordinator/group_formation.h"
#include "coordinator/inbox.h"
#include "coordinator/live_request.h"
#include "coordinator/metrics.h"
#include "coordinator/status_board.h"

namespace fathom {

class StepLoop {
 public:
  struct Options {
    GroupOptions group;
    Engine::Options engine;
    int max_queued_requests = 1024;  // that wait; beyond it requests are refused
  };

  // `board` and `metrics` outlive this. `on_lost` gets the unfinished requests when the workers are
  // lost, on the thread of this, which it must not hold up.
  StepLoop(Options options, StatusBoard& board, Metrics& metrics,
           Engine::OnLost on_lost = Engine::EndLost);
  ~StepLoop();  // stops and joins

  void Start();

  // Queues a new request; its tokens go to its stream. ResourceExhausted when the queue is full,
  // Unavailable when no steps can be made. Requests are served in the order of the ids returned.
  absl::StatusOr<SequenceId> Submit(LiveRequest live);

  // Queues one that was let in elsewhere: the queue is never full for it.
  absl::StatusOr<SequenceId> Resume(LiveRequest live);

  // Forgets a request; its stream hears no more. Does nothing when it has ended or was lost. Its KV
  // blocks are free before the next step.
  void Cancel(SequenceId id);

  // From now on requests are refused; the thread ends when the running and waiting ones have.
  void Drain();

  // Ends the thread now; requests end with Unavailable.
  void Stop();

  // Waits until the thread has ended, after Drain or Stop.
  void Join();

 private:
  void Run();
  absl::StatusOr<std::unique_ptr<WorkerGroup>> Form();

  const GroupOptions group_options_;
  StatusBoard& board_;
  Doorbell doorbell_;  // rung by the inbox and by the group
  Inbox inbox_;
  Engine engine_;  // of the thread alone
  std::stop_source stop_;
  std::jthread thread_;
};

}  // namespace fathom
