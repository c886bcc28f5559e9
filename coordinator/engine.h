// The heartbeat: serves requests with one worker group after another.
//
// At each heartbeat it takes in what the workers answered and what others want of it (Inbox),
// schedules and sends the next steps, and only then gives tokens to the clients. Two steps are in
// flight while there is work, so that the workers never wait for the coordinator; a sequence that
// ends with a stop token wastes its row of one step. When the group breaks, its unfinished requests
// are handed to whoever owns them (OnLost), and the next group forms under the next epoch, for
// ever, with backoff.
//
// It has no threads, no clock and no wire. A driver calls Advance whenever something has happened,
// tells it the time (`now`, monotonic, from any origin), and forms groups for it: StepLoop with a
// thread and gRPC, tests/simulation with neither.
//
// Not thread-safe; the driver alone calls it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/inbox.h"
#include "coordinator/metrics.h"
#include "coordinator/queue_rate.h"
#include "coordinator/request_times.h"
#include "coordinator/scheduler.h"
#include "coordinator/status_board.h"
#include "coordinator/step_command.h"
#include "coordinator/throughput_log.h"
#include "coordinator/worker_group.h"

namespace fathom {

class Engine {
 public:
  struct Options {
    int max_prompt_logprob_rows_per_step = 256;
    absl::Duration target_itl = absl::ZeroDuration();  // between tokens of a stream; 0: any
    SchedulingPolicy policy = SchedulingPolicy::kFirstComeFirstServed;
    bool enable_prefix_caching = true;
    int max_steps_in_flight = 2;  // with 1 the workers wait while a step is scheduled and sent
    absl::Duration min_backoff = absl::Milliseconds(50);  // between attempts to form a group
    absl::Duration max_backoff = absl::Seconds(5);
    absl::Duration log_interval = absl::Seconds(10);
  };

  // Takes over the requests that a broken group has left unfinished, in order of arrival. Their ids
  // mean nothing to this engine any more; to cancel one is up to its new owner.
  using OnLost = std::function<void(std::vector<Inbox::Submission> unfinished)>;

  // Ends them with Unavailable.
  static void EndLost(const std::vector<Inbox::Submission>& unfinished);

  // All outlive this.
  Engine(Options options, Inbox& inbox, StatusBoard& board, Metrics& metrics, OnLost on_lost);

  // What the driver must do next.
  struct Next {
    enum class Kind {
      kWait,       // call Advance at `until`, or as soon as the inbox or the group has something
      kFormGroup,  // form one with an epoch later than last_epoch(), and call TakeGroup
      kEnd,        // it was told to stop, or has drained: the last request has ended
    };
    Kind kind = Kind::kWait;
    absl::Duration until = absl::InfiniteDuration();
  };

  Next Advance(absl::Duration now);

  // The group that was asked for, or why there is none. Call Advance afterwards.
  void TakeGroup(absl::StatusOr<std::unique_ptr<WorkerGroup>> group, absl::Duration now);

  uint64_t last_epoch() const { return last_epoch_; }

 private:
  struct StepInFlight {
    Step step;
    absl::Duration sent_at;
  };
  struct Delivery {
    SequenceId id;
    std::shared_ptr<TokenStream> stream;
    v1::GenerateResponse response;
    std::optional<absl::Status> end;
  };

  // Who waits for a sequence.
  struct Client {
    std::shared_ptr<TokenStream> stream;
    int num_groups_lost = 0;
  };

  Next AdvanceWithoutGroup(absl::Duration now);
  Next AdvanceWithBrokenGroup(const absl::Status& failure, absl::Duration now);
  void BeginServing(absl::Duration now);
  // Says that no steps can be made while a worker is silent.
  void LookForSilence();
  void StopServing(const absl::Status& cause);
  void LoseGroup(const absl::Status& cause, absl::Duration now);
  std::vector<Inbox::Submission> TakeUnfinished(absl::Duration now);
  Next End(absl::Duration now);

  bool IsIdle() const;
  absl::Status CommitAnsweredSteps(absl::Duration now);
  absl::Status Commit(const StepInFlight& made, v1::StepResult result, absl::Duration now);
  void Apply(Inbox::Content content, absl::Duration now);
  // Ends those that have waited for longer than they were to.
  void ExpireWaiting(absl::Duration now);
  // Whether another one may follow: there was something to compute, and not as much is in flight
  // as may be.
  bool SendNextStep(absl::Duration now);
  Delivery MakeDelivery(const SequenceUpdate& update, StepAnswer& answer);
  void Deliver();
  void CountStep(const StepInFlight& made, const std::vector<SequenceUpdate>& updates,
                 double compute_seconds, absl::Duration now);
  void LogThroughput(absl::Duration now);
  void ReportLoad(absl::Duration now);
  ThroughputLog::Load LoadNow() const;

  const Options options_;
  Inbox& inbox_;
  StatusBoard& board_;
  Metrics& metrics_;
  const OnLost on_lost_;

  uint64_t last_epoch_ = 0;
  absl::Duration backoff_;
  absl::Duration form_at_ = -absl::InfiniteDuration();  // the next group

  std::unique_ptr<WorkerGroup> group_;
  bool is_serving_ = false;      // the group was whole when last looked at
  std::string silent_workers_;   // of it, when last looked at
  bool has_made_steps_ = false;  // with it
  std::unique_ptr<Scheduler> scheduler_;
  std::unordered_map<SequenceId, Client> clients_;
  // When those that must be begun by some time are no longer wanted. May name some that have ended.
  std::set<std::pair<absl::Duration, SequenceId>> begin_by_;
  RequestTimes request_times_;
  std::deque<StepInFlight> in_flight_;
  absl::Duration last_committed_at_;
  std::vector<Delivery> deliveries_;  // of the last commits

  int64_t num_preemptions_counted_ = 0;
  Scheduler::PrefixFigures prefix_figures_counted_;
  double prefill_us_counted_ = 0;
  QueueRate queue_rate_;
  ThroughputLog throughput_log_;
};

}  // namespace fathom
