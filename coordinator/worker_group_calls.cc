#include "coordinator/worker_group_calls.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/monotonic_time.h"
#include "base/status_macros.h"
#include "coordinator/load_progress.h"
#include "grpcpp/client_context.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr std::chrono::seconds kReportInterval(2);

std::chrono::system_clock::time_point DeadlineIn(absl::Duration timeout) {
  return std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout);
}

// Calls in flight, and one thread that waits for all of them.
class OpenCalls {
 public:
  explicit OpenCalls(size_t num_calls) : num_open_(num_calls) {}

  // Notifies with the lock held: the waiter may destroy this as soon as it can take it.
  void OnDone() {
    const std::lock_guard lock(mutex_);
    --num_open_;
    changed_.notify_all();
  }

  // Returns when all are done; calls `tick` every few seconds until then.
  void Wait(const std::function<void()>& tick) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kReportInterval, [this] { return num_open_ == 0; })) {
      lock.unlock();
      tick();
      lock.lock();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t num_open_;  // guarded by mutex_
};

v1::ShardSpec ShardOf(const GroupOptions& options, int rank) {
  const std::string host = HostOf(options.addresses[rank]);
  v1::ShardSpec shard;
  shard.set_rank(rank);
  shard.set_world_size(static_cast<uint32_t>(options.addresses.size()));
  shard.set_enable_expert_parallel(options.enable_expert_parallel);
  shard.set_block_size(options.block_size);
  shard.set_max_tokens_per_step(options.max_tokens_per_step);
  shard.set_max_sequences(options.max_sequences);
  shard.set_max_model_len(options.max_model_len);
  shard.set_max_logit_rows(options.max_logit_rows);
  shard.set_workers_on_this_host(static_cast<uint32_t>(
      std::count_if(options.addresses.begin(), options.addresses.end(),
                    [&](const std::string& other) { return HostOf(other) == host; })));
  return shard;
}

bool IsAbsence(const grpc::Status& status) {
  return status.error_code() == grpc::StatusCode::UNAVAILABLE ||
         status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ||
         status.error_code() == grpc::StatusCode::CANCELLED;
}

struct DescribeCall {
  const WorkerPeer* peer = nullptr;
  grpc::ClientContext context;
  v1::DescribeRequest request;
  v1::DescribeResponse response;
  grpc::Status status;
};

// One attempt with the workers that have not answered yet.
absl::Status DescribeMissing(const GroupOptions& options, const std::vector<WorkerPeer>& peers,
                             std::stop_token stop, const ReportProgress& report_progress,
                             std::vector<std::optional<v1::DescribeResponse>>& responses) {
  std::deque<DescribeCall> calls;
  for (const WorkerPeer& peer : peers) {
    if (responses[peer.rank].has_value()) continue;
    DescribeCall& call = calls.emplace_back();
    call.peer = &peer;
    *call.request.mutable_shard() = ShardOf(options, peer.rank);
    call.context.set_wait_for_ready(true);
    call.context.set_deadline(DeadlineIn(options.describe_timeout));
  }
  const auto cancel_all = [&calls] {
    for (DescribeCall& call : calls) call.context.TryCancel();
  };
  std::mutex mutex;
  std::vector<std::string> missing;  // guarded by mutex
  for (const DescribeCall& call : calls) missing.push_back(call.peer->name);
  OpenCalls open_calls(calls.size());
  const std::stop_callback on_stop(stop, cancel_all);
  for (DescribeCall& call : calls) {
    call.peer->stub->async()->Describe(&call.context, &call.request, &call.response,
                                       [&](grpc::Status status) {
                                         {
                                           const std::lock_guard lock(mutex);
                                           if (status.ok()) std::erase(missing, call.peer->name);
                                         }
                                         const bool refused = !status.ok() && !IsAbsence(status);
                                         call.status = std::move(status);
                                         if (refused) cancel_all();
                                         open_calls.OnDone();
                                       });
  }
  open_calls.Wait([&] {
    const std::lock_guard lock(mutex);
    report_progress(absl::StrCat("waiting for ", missing.size(), " of ", peers.size(),
                                 " workers: ", absl::StrJoin(missing, ", ")));
  });

  if (stop.stop_requested()) return absl::CancelledError("stopping");
  for (DescribeCall& call : calls) {
    if (call.status.ok()) {
      responses[call.peer->rank] = std::move(call.response);
    } else if (!IsAbsence(call.status)) {
      return FromWorker(call.peer->name, call.status);
    }
  }
  return absl::OkStatus();
}

// The Join of all workers: one reactor each, and what they share.
class Joining {
 public:
  Joining(const GroupOptions& options, const std::vector<WorkerPeer>& peers, uint64_t epoch,
          const GroupPlan& plan)
      : options_(options),
        progress_(static_cast<int>(peers.size()), MonotonicNow()),
        open_calls_(peers.size()) {
    for (const WorkerPeer& peer : peers) {
      v1::JoinRequest request;
      request.set_epoch(epoch);
      *request.mutable_shard() = ShardOf(options, peer.rank);
      request.set_num_kv_blocks(plan.num_kv_blocks);
      request.set_collectives(plan.collectives);
      request.set_rank0_address(options.addresses[0]);
      request.set_timeout_ms(
          static_cast<uint32_t>(absl::ToInt64Milliseconds(options.join_timeout)));
      calls_.emplace_back(*this, peer, std::move(request));
    }
  }

  absl::Status Run(std::stop_token stop, const ReportProgress& report_progress) {
    const std::stop_callback on_stop(stop, [this] { Fail(absl::CancelledError("stopping")); });
    for (Call& call : calls_) call.Start();
    open_calls_.Wait([&] {
      std::string line;
      {
        const std::lock_guard lock(mutex_);
        line = progress_.Line(MonotonicNow());
      }
      report_progress(line);
      FailTheSilent();
    });
    const std::lock_guard lock(mutex_);
    return failure_;
  }

 private:
  class Call final : public grpc::ClientReadReactor<v1::JoinProgress> {
   public:
    Call(Joining& joining, const WorkerPeer& peer, v1::JoinRequest request)
        : joining_(joining), peer_(peer), request_(std::move(request)) {}

    void Start() {
      peer_.stub->async()->Join(&context_, &request_, this);
      StartRead(&message_);
      StartCall();
    }
    void Cancel() { context_.TryCancel(); }
    const std::string& name() const { return peer_.name; }

    void OnReadDone(bool ok) override {
      if (!ok) return;
      {
        const std::lock_guard lock(joining_.mutex_);
        joining_.progress_.Report(peer_.rank, message_);
        last_heard = MonotonicNow();
        is_ready = message_.phase() == v1::JoinProgress::PHASE_READY;
      }
      StartRead(&message_);
    }

    void OnDone(const grpc::Status& status) override { joining_.OnCallDone(*this, status); }

    // Guarded by joining_.mutex_.
    absl::Duration last_heard = MonotonicNow();
    bool is_ready = false;
    bool is_done = false;

   private:
    Joining& joining_;
    const WorkerPeer& peer_;
    const v1::JoinRequest request_;
    grpc::ClientContext context_;
    v1::JoinProgress message_;
  };

  void OnCallDone(Call& call, const grpc::Status& status) {
    bool is_ready;
    {
      const std::lock_guard lock(mutex_);
      call.is_done = true;
      is_ready = call.is_ready;
    }
    if (!status.ok()) {
      Fail(FromWorker(call.name(), status));
    } else if (!is_ready) {
      Fail(absl::InternalError(absl::StrCat(call.name(), " stopped joining before it was ready")));
    }
    open_calls_.OnDone();  // `this` may be gone after it
  }

  // The first failure counts; the others then only follow from it.
  void Fail(absl::Status status) {
    {
      const std::lock_guard lock(mutex_);
      if (!failure_.ok()) return;
      failure_ = std::move(status);
    }
    for (Call& call : calls_) call.Cancel();
  }

  void FailTheSilent() {
    std::string silent;
    {
      const std::lock_guard lock(mutex_);
      for (const Call& call : calls_) {
        if (call.is_done || MonotonicNow() - call.last_heard < options_.join_silence_timeout) {
          continue;
        }
        silent = call.name();
      }
    }
    if (silent.empty()) return;
    Fail(absl::DeadlineExceededError(
        absl::StrCat(silent, " reported no progress for ",
                     absl::FormatDuration(options_.join_silence_timeout), " while joining")));
  }

  const GroupOptions& options_;
  std::deque<Call> calls_;
  std::mutex mutex_;
  LoadProgress progress_;  // guarded by mutex_
  absl::Status failure_;   // guarded by mutex_
  OpenCalls open_calls_;
};

struct AbortCall {
  grpc::ClientContext context;
  v1::AbortRequest request;
  v1::AbortResponse response;
  grpc::Status status;
};

}  // namespace

absl::Status FromWorker(const std::string& name, const grpc::Status& status) {
  const absl::Status same = FromGrpc(status);
  return absl::Status(same.code(), absl::StrCat(name, ": ", same.message()));
}

absl::StatusOr<std::vector<WorkerPeer>> DialAll(const GroupOptions& options) {
  std::vector<WorkerPeer> peers;
  for (const std::string& address : options.addresses) {
    const int rank = static_cast<int>(peers.size());
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, ConnectTo(address, options.tls));
    std::unique_ptr<v1::Worker::Stub> stub = v1::Worker::NewStub(channel);
    peers.push_back({.rank = rank,
                     .address = address,
                     .name = WorkerName(rank, address),
                     .channel = std::move(channel),
                     .stub = std::move(stub)});
  }
  return peers;
}

absl::StatusOr<std::vector<v1::DescribeResponse>> DescribeAll(
    const GroupOptions& options, const std::vector<WorkerPeer>& peers, std::stop_token stop,
    const ReportProgress& report_progress) {
  std::vector<std::optional<v1::DescribeResponse>> responses(peers.size());
  const auto is_missing = [](const auto& response) { return !response.has_value(); };
  while (std::any_of(responses.begin(), responses.end(), is_missing)) {
    RETURN_IF_ERROR(DescribeMissing(options, peers, stop, report_progress, responses));
  }
  std::vector<v1::DescribeResponse> descriptions;
  for (auto& response : responses) descriptions.push_back(*std::move(response));
  return descriptions;
}

absl::Status JoinAll(const GroupOptions& options, const std::vector<WorkerPeer>& peers,
                     uint64_t epoch, const GroupPlan& plan, std::stop_token stop,
                     const ReportProgress& report_progress) {
  return Joining(options, peers, epoch, plan).Run(stop, report_progress);
}

void AbortAll(const std::vector<WorkerPeer>& peers, uint64_t epoch, absl::Duration abort_timeout) {
  std::deque<AbortCall> calls(peers.size());
  OpenCalls open_calls(peers.size());
  for (const WorkerPeer& peer : peers) {
    AbortCall& call = calls[peer.rank];
    call.request.set_epoch(epoch);
    call.context.set_deadline(DeadlineIn(abort_timeout));
    peer.stub->async()->Abort(&call.context, &call.request, &call.response,
                              [&call, &open_calls](grpc::Status status) {
                                call.status = std::move(status);
                                open_calls.OnDone();
                              });
  }
  open_calls.Wait([] {});
  for (const WorkerPeer& peer : peers) {
    const grpc::Status& status = calls[peer.rank].status;
    if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) continue;
    spdlog::warn("{} did not leave epoch {} within {}", peer.name, epoch,
                 absl::FormatDuration(abort_timeout));
  }
}

}  // namespace fathom
