// N workers as one callable with a deadline: all of them answer, or the group is dead.
//
// A step goes to all workers at once; its result is rank 0's, once everyone has answered. When a
// stream ends, with or without a step in flight, when an answer is of another step or epoch than
// is due, or does not come in time, the group is broken for good: it is destroyed, and another one
// forms under the next epoch (group_formation). The group knows no sequences.
//
// It has no clock, no threads and no wire: it is told the time (`now`, monotonic, from any origin)
// and reaches the workers through a Transport.
//
// Thread-safe, for those who report from the transport. Everything else, destruction included, is
// for one thread: Engine's.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "coordinator/group_plan.h"
#include "proto/worker.pb.h"

namespace fathom {

class WorkerGroup {
 public:
  // The way to the workers, of one epoch.
  class Transport {
   public:
    // Tells all workers to leave the epoch; afterwards nothing is reported to the group any more.
    virtual ~Transport() = default;

    // Sends a step to all workers; does not wait. Who is gone does not get it.
    virtual void Send(const v1::StepCommand& command) = 0;
  };

  struct Options {
    uint64_t epoch = 0;
    GroupPlan plan;
    std::vector<std::string> worker_names;  // by rank
    absl::Duration step_timeout = absl::Seconds(30);
  };

  // `on_event` is called, from whichever thread reports, when all have answered a step, when
  // something is wrong, and when SilentWorkers changes. It must not call the group.
  WorkerGroup(Options options, std::function<void()> on_event);
  ~WorkerGroup();

  // Once, before the first step. The transport may report from now on.
  void Connect(std::unique_ptr<Transport> transport);

  uint64_t epoch() const { return options_.epoch; }
  const GroupPlan& plan() const { return options_.plan; }
  const std::string& worker_name(int rank) const { return options_.worker_names[rank]; }

  // Sends the next step. A broken group swallows it.
  void Send(const v1::StepCommand& command, absl::Duration now);

  // The result of the oldest step that was sent and not taken yet, once all workers have answered
  // it; also when the group has broken since.
  std::optional<v1::StepResult> TakeResult(absl::Duration now);

  // OK while the group is whole. Breaks it when the oldest step has taken longer than step_timeout
  // since it was sent, or since the one before it was taken if that was later.
  absl::Status Check(absl::Duration now);

  // Declares the group broken: a worker said something that cannot be.
  void Break(absl::Status cause);

  // Why the group broke, naming the worker. When one dies the others fail too, of its absence; so
  // this is absent for a moment after Check found it broken, until a lost connection is seen.
  std::optional<absl::Status> Cause(absl::Duration now);

  // The workers that do not answer at the moment, by name; "" when all do. Nothing breaks by it.
  std::string SilentWorkers() const;

  // When to call again if nothing is reported until then: Check, or Cause once it is broken.
  absl::Duration deadline() const;

  // For the transport.
  void OnResult(int rank, v1::StepResult result);
  void OnStreamEnded(int rank, const absl::Status& status);
  void OnSilence(int rank, bool is_silent);

 private:
  bool AllAnswered(uint64_t step) const;  // requires mutex_

  const Options options_;
  const std::function<void()> on_event_;
  std::unique_ptr<Transport> transport_;

  // Of Engine's thread.
  uint64_t last_step_taken_ = 0;
  absl::Duration step_deadline_ = absl::InfiniteDuration();   // of the oldest step in flight
  absl::Duration cause_deadline_ = absl::InfiniteDuration();  // set by Check when it is broken

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  uint64_t last_step_sent_ = 0;
  std::vector<uint64_t> last_step_answered_;  // by rank
  std::deque<v1::StepResult> results_;        // of rank 0, oldest first
  std::vector<bool> is_silent_;               // by rank
  std::vector<absl::Status> failures_;  // in the order seen; the group is whole while it is empty
};

}  // namespace fathom
