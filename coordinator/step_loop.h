// The heartbeat: forms the worker group, makes steps as long as there is work, and starts again
// when a worker is lost.
//
// One thread owns the scheduler and the group. Everyone else talks to it through a bounded inbox,
// which it empties between steps; with nothing to do it sleeps on a condition variable. When the
// group breaks, every request ends with Unavailable, naming the worker and the cause, and the next
// group forms under the next epoch, for ever, with backoff. (Requests that survive come later.)
//
// Two steps are in flight while there is work: the next one is scheduled and sent while the workers
// compute, so that they never wait for the coordinator; only then the tokens of the step before go
// out to the clients. A sequence that ends with a stop token wastes its row of one step.
//
// Thread-safe, except that Start and Join are called once each, by the owner.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/metrics.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/status_board.h"
#include "coordinator/step_command.h"
#include "coordinator/throughput_log.h"
#include "coordinator/token_stream.h"
#include "coordinator/worker_group.h"

namespace fathom {

class StepLoop {
 public:
  struct Options {
    WorkerGroup::Options group;
    int max_prompt_logprob_rows_per_step = 256;
    int max_queued_requests = 1024;                    // that wait; beyond it requests are refused
    absl::Duration target_itl = absl::ZeroDuration();  // between tokens of a stream; 0: any
    bool enable_prefix_caching = true;
    int max_steps_in_flight = 2;  // with 1 the workers wait while a step is scheduled and sent
    absl::Duration min_backoff = absl::Milliseconds(50);  // between attempts to form a group
    absl::Duration max_backoff = absl::Seconds(5);
    absl::Duration log_interval = absl::Seconds(10);
  };

  // `board` and `metrics` outlive this.
  StepLoop(Options options, StatusBoard& board, Metrics& metrics);
  ~StepLoop();  // stops and joins

  void Start();

  // Queues a request; its tokens go to `stream`. ResourceExhausted when the queue is full,
  // Unavailable when no steps can be made. Requests are served in the order of the ids returned.
  absl::StatusOr<SequenceId> Submit(std::shared_ptr<const Request> request,
                                    std::shared_ptr<TokenStream> stream);

  // Forgets a request; its stream hears no more. Does nothing when it has ended. Its KV blocks are
  // free before the next step.
  void Cancel(SequenceId id);

  // From now on requests are refused; the thread ends when the running and waiting ones have.
  void Drain();

  // Ends the thread now; requests end with Unavailable.
  void Stop();

  // Waits until the thread has ended, after Drain or Stop.
  void Join();

 private:
  struct Submission {
    SequenceId id;
    std::shared_ptr<const Request> request;
    std::shared_ptr<TokenStream> stream;
  };
  struct Inbox {
    std::vector<Submission> submissions;
    std::vector<SequenceId> cancellations;
    bool empty() const { return submissions.empty() && cancellations.empty(); }
  };
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

  void Run();
  absl::StatusOr<std::unique_ptr<WorkerGroup>> FormGroup();
  void WaitBeforeFormingAgain(absl::Duration backoff);
  bool MustEnd();
  bool IsDrained();  // asked to drain, and nothing has come in

  // Makes steps until the group breaks (its cause) or there is no more to do (OK).
  absl::Status Serve(WorkerGroup& group);
  void BeginServing(const WorkerGroup& group);
  void StopServing(const absl::Status& cause);
  void EndAllRequests(const absl::Status& cause);

  bool IsIdle() const;
  // What has come in. Waits for it when there is nothing else to do.
  Inbox TakeInbox();
  void Apply(Inbox inbox);
  // Whether another one may follow: there was something to compute, and not as much is in flight
  // as may be.
  bool SendNextStep(WorkerGroup& group);
  absl::Status CommitOldestStep(WorkerGroup& group);
  Delivery MakeDelivery(const SequenceUpdate& update, StepAnswer& answer);
  void Deliver();
  void CountStep(const StepInFlight& made, const std::vector<SequenceUpdate>& updates,
                 double compute_seconds);
  void LogThroughput();
  void ReportLoad();
  ThroughputLog::Load LoadNow() const;

  const Options options_;
  StatusBoard& board_;
  Metrics& metrics_;
  std::jthread thread_;
  std::stop_source stop_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  Inbox inbox_;
  absl::Status refusal_;  // what new requests are told; OK while they are taken
  SequenceId last_id_ = 0;
  int num_waiting_in_scheduler_ = 0;
  bool is_serving_ = false;
  bool is_draining_ = false;
  bool is_group_broken_ = false;

  // Of the thread alone.
  uint64_t last_epoch_ = 0;
  uint32_t vocab_size_ = 0;
  bool has_made_steps_ = false;           // with the current group
  std::unique_ptr<Scheduler> scheduler_;  // of the current group
  std::unordered_map<SequenceId, std::shared_ptr<TokenStream>> streams_;
  std::deque<StepInFlight> in_flight_;
  absl::Duration last_committed_at_;
  std::vector<Delivery> deliveries_;  // of the last commit
  int64_t num_preemptions_counted_ = 0;
  Scheduler::PrefixFigures prefix_figures_counted_;
  ThroughputLog throughput_log_;
};

}  // namespace fathom
