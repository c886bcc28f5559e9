// One worker group as GroupRouter sees it: it takes requests while it serves, and hands them back
// (Engine::OnLost) when its workers are lost. StepLoop, or in tests/simulation one without threads.
//
// Thread-safe, except that Start and Join are called once each, by the owner.
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/live_request.h"
#include "proto/sampling.pb.h"

namespace fathom {

class GroupLoop {
 public:
  virtual ~GroupLoop() = default;

  virtual void Start() = 0;

  // Asks whether the workers can obey a grammar, and makes them ready to; a request that wants it
  // is queued after that. Errors and what `done` gets: GrammarGate::Prepare.
  virtual absl::Status Prepare(const v1::Grammar& grammar,
                               std::function<void(const absl::Status& status)> done) = 0;

  // Queues a new request; its tokens go to its stream. ResourceExhausted when the queue is full,
  // Unavailable when no steps can be made. Requests are served in the order of the ids returned.
  virtual absl::StatusOr<SequenceId> Submit(LiveRequest live) = 0;

  // Queues one that was let in elsewhere: the queue is never full for it.
  virtual absl::StatusOr<SequenceId> Resume(LiveRequest live) = 0;

  // Forgets a request; its stream hears no more. Does nothing when it has ended or was lost. Its KV
  // blocks are free before the next step.
  virtual void Cancel(SequenceId id) = 0;

  // From now on requests are refused; it ends when the running and waiting ones have.
  virtual void Drain() = 0;

  // Ends now; requests end with Unavailable.
  virtual void Stop() = 0;

  // Waits until it has ended, after Drain or Stop.
  virtual void Join() = 0;
};

}  // namespace fathom
