// N workers as one callable with a deadline: all of them answer, or the group is dead.
//
// The life of a group: dial and Describe everyone, agree on a plan, Join everyone at once under a
// fresh epoch, then Run one stream to each. A step is serialised once and the same bytes go to all.
// When a stream ends, with or without a step in flight, or an answer does not come in time, the
// group is broken for good: it is destroyed (which sends Abort(epoch) to all and cancels the
// streams) and another one forms under the next epoch. The group knows no sequences.
//
// Form, Send, Await and the destructor belong to one thread. status() may be called from any.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/group_plan.h"
#include "proto/endpoint.h"
#include "proto/worker.pb.h"

namespace fathom {

struct WorkerPeer;

class WorkerGroup {
 public:
  struct Options {
    std::vector<std::string> addresses;  // by rank
    TlsOptions tls;
    std::string version;  // of the coordinator; every worker's must be equal
    // UNSPECIFIED: as GroupPlanOptions says.
    v1::JoinRequest::Collectives collectives = v1::JoinRequest::COLLECTIVES_UNSPECIFIED;
    bool enable_expert_parallel = false;
    int block_size = 16;  // tokens per KV block
    int max_tokens_per_step = 2048;
    int max_sequences = 256;
    int max_logit_rows = 512;    // per step
    int max_model_len = 0;       // 0: the model's own, or what the KV cache can hold
    bool is_plan_known = false;  // to the operator: it is then logged for debugging only
    absl::Duration describe_timeout = absl::Seconds(30);  // of one attempt; they go on forever
    absl::Duration join_timeout = absl::Seconds(60);      // for finding each other, after loading
    absl::Duration join_silence_timeout = absl::Seconds(180);  // between two reports of progress
    absl::Duration step_timeout = absl::Seconds(30);
    absl::Duration abort_timeout = absl::Seconds(1);
  };

  // Waits as long as it takes for every worker to answer, then loads and connects them, under an
  // epoch later than `last_epoch` and than any that a worker has heard of (perhaps of a coordinator
  // before this one).
  // `report_progress` gets a line now and then, from the calling thread. `on_broken` is called
  // once, from another thread, as soon as the group is found broken; it must not call the group.
  //
  // Errors name the worker: FailedPrecondition when the workers do not fit together or the plan is
  // impossible, Cancelled after `stop`, else what that worker said.
  static absl::StatusOr<std::unique_ptr<WorkerGroup>> Form(
      Options options, uint64_t last_epoch, std::stop_token stop,
      const std::function<void(const std::string& line)>& report_progress,
      std::function<void()> on_broken);

  // Tells all workers to leave the epoch and gives them abort_timeout for it.
  ~WorkerGroup();

  uint64_t epoch() const { return epoch_; }
  const GroupPlan& plan() const { return plan_; }

  // Sends a step to all workers; does not wait. A broken group swallows it.
  void Send(const v1::StepCommand& command);

  // Rank 0's result of `step`, once all workers have answered it. Steps are awaited in the order in
  // which they were sent. Unavailable, naming the worker, when the group is or becomes broken, or
  // does not answer within step_timeout from now. After `stop`: Cancelled.
  absl::StatusOr<v1::StepResult> Await(uint64_t step);

  // OK while the group is whole.
  absl::Status status() const;

  // Declares the group broken: a worker said something that cannot be.
  void Break(absl::Status cause);

  // Why the group broke. When a worker dies the others fail too, of its absence; so this waits a
  // moment for a lost connection to be seen and names that worker first.
  absl::Status Cause();

 private:
  class Stream;

  WorkerGroup(Options options, uint64_t epoch, GroupPlan plan, std::vector<WorkerPeer> peers,
              std::function<void()> on_broken);
  void OpenStreams();

  // Called by the streams, from gRPC's threads.
  void OnResult(int rank, v1::StepResult result);
  void OnStreamEnded(int rank, const absl::Status& status);

  bool AllAnswered(uint64_t step) const;  // requires mutex_
  bool IsAnyoneLost() const;              // requires mutex_

  const Options options_;
  const uint64_t epoch_;
  const GroupPlan plan_;
  const std::function<void()> on_broken_;
  std::vector<WorkerPeer> peers_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::unique_ptr<std::stop_callback<std::function<void()>>> on_stop_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::vector<uint64_t> last_step_answered_;  // by rank
  std::deque<v1::StepResult> results_;        // of rank 0, oldest first
  std::vector<absl::Status> failures_;  // in the order seen; the group is whole while it is empty
};

}  // namespace fathom
