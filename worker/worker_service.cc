#include "worker/worker_service.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"
#include "worker/gloo_communicator.h"
#include "worker/nccl_communicator.h"
#include "worker/peer_communicator.h"
#include "worker/remote_blackboard.h"
#include "worker/shm_communicator.h"
#include "worker/staged_communicator.h"
#include "worker/step_stream.h"

namespace fathom {
namespace {

constexpr absl::Duration kProgressInterval = absl::Milliseconds(250);
constexpr absl::Duration kLongestLookup = absl::Minutes(1);

// A call that is over at once.
class RefusedStream final : public grpc::ServerBidiReactor<v1::StepCommand, v1::StepResult> {
 public:
  explicit RefusedStream(const absl::Status& reason) { Finish(ToGrpc(reason)); }
  void OnDone() override { delete this; }
};

double Mebibytes(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

// Says how far loading is, and how fast it goes.
class LoadLog {
 public:
  void Report(int64_t bytes_done, int64_t bytes_total) {
    bytes_done_ = bytes_done;
    if (absl::Now() < next_report_) return;
    next_report_ = absl::Now() + kInterval;
    spdlog::info("read {:.1f} of {:.1f} GB of weights, {:.2f} GB/s", GB(bytes_done),
                 GB(bytes_total), Rate());
  }
  void Finish() const {
    spdlog::info("weights are there after {:.2f} s: {:.2f} GB read, {:.2f} GB/s", Seconds(),
                 GB(bytes_done_), Rate());
  }

 private:
  static constexpr absl::Duration kInterval = absl::Seconds(5);

  static double GB(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }
  double Seconds() const { return absl::ToDoubleSeconds(absl::Now() - start_); }
  double Rate() const { return GB(bytes_done_) / Seconds(); }

  const absl::Time start_ = absl::Now();
  absl::Time next_report_ = start_ + kInterval;
  int64_t bytes_done_ = 0;
};

void ExitStuck() {
  spdlog::critical("a step did not end in time after an abort; exiting");
  spdlog::shutdown();
  _exit(EXIT_FAILURE);
}

}  // namespace

// One Join call: what it asks, its stream of progress, and whether it is still wanted.
class WorkerService::Joining {
 public:
  Joining(const v1::JoinRequest& request, grpc::ServerContext& context,
          grpc::ServerWriter<v1::JoinProgress>& writer)
      : request_(request), context_(context), writer_(writer) {}

  const v1::JoinRequest& request() const { return request_; }
  const v1::ShardSpec& shard() const { return request_.shard(); }
  uint64_t epoch() const { return request_.epoch(); }
  absl::Duration timeout() const { return absl::Milliseconds(request_.timeout_ms()); }

  // From any thread.
  void Cancel() {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;
    if (communicator_ != nullptr) communicator_->Abort();
  }
  // While this joining connects; null when it is done.
  void SetCommunicator(Communicator* communicator) {
    absl::MutexLock lock(&mutex_);
    communicator_ = communicator;
    if (cancelled_ && communicator_ != nullptr) communicator_->Abort();
  }

  // Aborted when the call was cancelled, by its client or for a later epoch.
  absl::Status CheckWanted() {
    absl::MutexLock lock(&mutex_);
    if (!cancelled_ && !context_.IsCancelled()) return absl::OkStatus();
    return absl::AbortedError(absl::StrCat("joining epoch ", epoch(), " was given up"));
  }

  // Tells the client, at most every kProgressInterval unless the phase is new.
  void Report(v1::JoinProgress::Phase phase, int64_t bytes_done = 0, int64_t bytes_total = 0) {
    const absl::Time now = absl::Now();
    const bool is_complete = bytes_total > 0 && bytes_done >= bytes_total;
    if (phase == phase_ && !is_complete && now < next_report_) return;
    phase_ = phase;
    next_report_ = now + kProgressInterval;
    v1::JoinProgress progress;
    progress.set_phase(phase);
    progress.set_bytes_done(bytes_done);
    progress.set_bytes_total(bytes_total);
    writer_.Write(progress);  // a client that is gone shows in CheckWanted
  }

 private:
  const v1::JoinRequest& request_;
  grpc::ServerContext& context_;
  grpc::ServerWriter<v1::JoinProgress>& writer_;
  v1::JoinProgress::Phase phase_ = v1::JoinProgress::PHASE_UNSPECIFIED;
  absl::Time next_report_;

  absl::Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  Communicator* communicator_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

WorkerService::WorkerService(const WorkerServiceOptions& options, ShardHost& host)
    : options_(options), host_(host) {}

WorkerService::~WorkerService() {
  absl::MutexLock lock(&mutex_);
  CHECK(stream_ == nullptr && joining_ == nullptr) << "the server still runs";
}

grpc::Status WorkerService::Describe(grpc::ServerContext*, const v1::DescribeRequest* request,
                                     v1::DescribeResponse* response) {
  const absl::StatusOr<WorkerMemoryPlan> plan = host_.Plan(request->shard());
  if (!plan.ok()) {
    spdlog::error("cannot be this shard: {}", std::string(plan.status().message()));
    return ToGrpc(plan.status());
  }
  response->set_version(options_.version);
  host_.Describe(*response);
  v1::MemoryPlan& memory = *response->mutable_plan();
  memory.set_budget_bytes(plan->budget_bytes);
  memory.set_weight_bytes(plan->weight_bytes);
  memory.set_activation_bytes(plan->activation_bytes);
  memory.set_kv_block_bytes(plan->kv_block_bytes);
  memory.set_kv_block_capacity(plan->kv_block_capacity);
  absl::MutexLock lock(&mutex_);
  response->set_last_epoch(last_epoch_);
  return grpc::Status::OK;
}

grpc::Status WorkerService::Join(grpc::ServerContext* context, const v1::JoinRequest* request,
                                 grpc::ServerWriter<v1::JoinProgress>* writer) {
  Joining joining(*request, *context, *writer);
  absl::Status status = BeginJoin(joining);
  if (!status.ok()) return ToGrpc(status);
  status = AwaitTurn(joining);
  const bool has_turn = status.ok();
  if (has_turn) {
    absl::StatusOr<std::shared_ptr<StepMaker>> runner = MakeRunner(joining);
    status = runner.ok() ? FinishJoin(joining, *std::move(runner)) : runner.status();
  }
  {
    absl::MutexLock lock(&mutex_);
    if (joining_ == &joining) joining_ = nullptr;
    if (has_turn) is_loading_ = false;
  }
  if (!status.ok()) {
    spdlog::warn("did not join epoch {}: {}", joining.epoch(), std::string(status.message()));
    return ToGrpc(status);
  }
  spdlog::info("joined epoch {} as rank {} of {}", joining.epoch(), joining.shard().rank(),
               joining.shard().world_size());
  joining.Report(v1::JoinProgress::PHASE_READY);
  return grpc::Status::OK;
}

absl::Status WorkerService::BeginJoin(Joining& joining) {
  absl::MutexLock lock(&mutex_);
  if (closed_) return absl::UnavailableError("this worker is shutting down");
  if (joining.epoch() <= last_epoch_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "epoch ", joining.epoch(), " is not newer than ", last_epoch_, ", the last one here"));
  }
  if (joining_ != nullptr) joining_->Cancel();
  joining_ = &joining;
  last_epoch_ = joining.epoch();
  LeaveEpoch(absl::AbortedError(absl::StrCat("epoch ", joining.epoch(), " begins")));
  blackboard_.BeginEpoch(joining.epoch());
  return absl::OkStatus();
}

absl::Status WorkerService::AwaitTurn(Joining& joining) {
  while (true) {
    RETURN_IF_ERROR(joining.CheckWanted());
    joining.Report(v1::JoinProgress::PHASE_LOADING_WEIGHTS);
    absl::MutexLock lock(&mutex_);
    const auto is_free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !is_loading_; };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&is_free), kProgressInterval)) continue;
    is_loading_ = true;
    return absl::OkStatus();
  }
}

absl::StatusOr<std::shared_ptr<StepMaker>> WorkerService::MakeRunner(Joining& joining) {
  const v1::ShardSpec& shard = joining.shard();
  RETURN_IF_ERROR(joining.CheckWanted());
  ASSIGN_OR_RETURN(const WorkerMemoryPlan plan, host_.Plan(shard));
  const uint32_t num_kv_blocks = joining.request().num_kv_blocks();
  if (num_kv_blocks < 1 || num_kv_blocks > static_cast<uint32_t>(plan.kv_block_capacity)) {
    return absl::InvalidArgumentError(absl::StrCat("num_kv_blocks is ", num_kv_blocks,
                                                   ", expected 1 to ", plan.kv_block_capacity));
  }
  spdlog::info(
      "epoch {}: rank {} of {} takes {:.1f} MiB for weights, {:.1f} for activations, {:.1f} for {} "
      "KV blocks of {} tokens; budget {:.1f} MiB",
      joining.epoch(), shard.rank(), shard.world_size(), Mebibytes(plan.weight_bytes),
      Mebibytes(plan.activation_bytes), Mebibytes(plan.kv_block_bytes * num_kv_blocks),
      num_kv_blocks, shard.block_size(), Mebibytes(plan.budget_bytes));
  LoadLog log;
  return host_.Join({.epoch = joining.epoch(),
                     .shard = shard,
                     .num_kv_blocks = static_cast<int>(num_kv_blocks),
                     .on_loading =
                         [&](int64_t bytes_done, int64_t bytes_total) {
                           joining.Report(v1::JoinProgress::PHASE_LOADING_WEIGHTS, bytes_done,
                                          bytes_total);
                           log.Report(bytes_done, bytes_total);
                         },
                     .on_loaded =
                         [&] {
                           log.Finish();
                           joining.Report(v1::JoinProgress::PHASE_ALLOCATING_KV);
                         },
                     .connect = [&](Device& device) { return Connect(joining, device); },
                     .await_others = [&] { return AwaitOthers(joining); }});
}

absl::StatusOr<std::unique_ptr<Blackboard>> WorkerService::OpenBlackboard(const Joining& joining) {
  if (joining.shard().rank() == 0) {
    return std::make_unique<LocalBlackboard>(blackboard_, joining.epoch());
  }
  return ConnectToBlackboard(joining.request().rank0_address(), options_.tls, joining.epoch(),
                             absl::Now() + joining.timeout());
}

absl::StatusOr<std::unique_ptr<Communicator>> WorkerService::Connect(Joining& joining,
                                                                     Device& device) {
  if (joining.shard().world_size() == 1) return MakeLonelyCommunicator();
  joining.Report(v1::JoinProgress::PHASE_CONNECTING);
  ASSIGN_OR_RETURN(const std::unique_ptr<Blackboard> blackboard, OpenBlackboard(joining));
  ASSIGN_OR_RETURN(std::unique_ptr<GroupCommunicator> communicator,
                   MakeCommunicator(joining, device));
  RETURN_IF_ERROR(AwaitAllLoaded(joining, *blackboard));
  joining.SetCommunicator(communicator.get());
  const absl::Status status = communicator->Connect(*blackboard, absl::Now() + joining.timeout());
  joining.SetCommunicator(nullptr);
  RETURN_IF_ERROR(status);
  const v1::JoinRequest::Collectives kind = joining.request().collectives();
  const bool is_of_host =
      kind == v1::JoinRequest::COLLECTIVES_SHM || kind == v1::JoinRequest::COLLECTIVES_GLOO;
  if (is_of_host && !device.shares_host_memory()) {
    return MakeStagedCommunicator(device, std::move(communicator));
  }
  return communicator;
}

absl::StatusOr<std::unique_ptr<GroupCommunicator>> WorkerService::MakeCommunicator(
    const Joining& joining, Device& device) {
  const v1::ShardSpec& shard = joining.shard();
  const auto rank = static_cast<int>(shard.rank());
  const auto world_size = static_cast<int>(shard.world_size());
  const absl::Duration timeout = options_.collective_timeout;
  const auto shm = [&] {
    return MakeShmCommunicator(
        {.rank = rank, .world_size = world_size, .epoch = joining.epoch(), .timeout = timeout});
  };
  const auto gloo = [&]() -> absl::StatusOr<std::unique_ptr<GroupCommunicator>> {
    ASSIGN_OR_RETURN(const std::string host, LocalHostTowards(joining.request().rank0_address()));
    return MakeGlooCommunicator(
        {.rank = rank, .world_size = world_size, .host = host, .timeout = timeout});
  };
  switch (joining.request().collectives()) {
    case v1::JoinRequest::COLLECTIVES_SHM:
      return shm();
    case v1::JoinRequest::COLLECTIVES_GLOO:
      return gloo();
    case v1::JoinRequest::COLLECTIVES_PEER:
      return MakePeerCommunicator({.rank = rank, .world_size = world_size, .timeout = timeout},
                                  device, shm());
    case v1::JoinRequest::COLLECTIVES_NCCL: {
      std::unique_ptr<GroupCommunicator> host;
      if (shard.workers_on_this_host() == shard.world_size()) {
        host = shm();
      } else {
        ASSIGN_OR_RETURN(host, gloo());
      }
      return MakeNcclCommunicator({.rank = rank, .world_size = world_size, .timeout = timeout},
                                  device, std::move(host));
    }
    default:
      return absl::InvalidArgumentError("collectives are none of shm, gloo, peer and nccl");
  }
}

absl::Status WorkerService::AwaitOthers(Joining& joining) {
  if (joining.shard().world_size() == 1) return absl::OkStatus();
  joining.Report(v1::JoinProgress::PHASE_CONNECTING);
  ASSIGN_OR_RETURN(const std::unique_ptr<Blackboard> blackboard, OpenBlackboard(joining));
  return AwaitAllLoaded(joining, *blackboard);
}

absl::Status WorkerService::AwaitAllLoaded(Joining& joining, Blackboard& blackboard) {
  const auto await = [&](const std::string& key) -> absl::Status {
    while (true) {
      RETURN_IF_ERROR(joining.CheckWanted());
      joining.Report(v1::JoinProgress::PHASE_CONNECTING);
      const absl::Status status = blackboard.Lookup(key, absl::Now() + kProgressInterval).status();
      if (!absl::IsDeadlineExceeded(status)) return status;
    }
  };
  const v1::ShardSpec& shard = joining.shard();
  if (shard.rank() != 0) {
    RETURN_IF_ERROR(blackboard.Publish(absl::StrCat("loaded ", shard.rank()), "yes"));
    return await("all loaded");
  }
  for (uint32_t rank = 1; rank < shard.world_size(); ++rank) {
    RETURN_IF_ERROR(await(absl::StrCat("loaded ", rank)));
  }
  return blackboard.Publish("all loaded", "yes");
}

absl::Status WorkerService::FinishJoin(Joining& joining, std::shared_ptr<StepMaker> runner) {
  RETURN_IF_ERROR(joining.CheckWanted());
  absl::MutexLock lock(&mutex_);
  if (joining_ != &joining || closed_) {
    return absl::AbortedError(absl::StrCat("epoch ", joining.epoch(), " is over already"));
  }
  CHECK(runner_ == nullptr);
  runner_ = std::move(runner);
  return absl::OkStatus();
}

grpc::ServerBidiReactor<v1::StepCommand, v1::StepResult>* WorkerService::Run(
    grpc::CallbackServerContext* context) {
  absl::MutexLock lock(&mutex_);
  if (runner_ == nullptr) {
    return new RefusedStream(absl::FailedPreconditionError("this worker is in no epoch: Join"));
  }
  if (stream_ != nullptr) {
    return new RefusedStream(absl::FailedPreconditionError(
        absl::StrCat("epoch ", runner_->epoch(), " has a Run stream already")));
  }
  stream_ = new StepStream(context, runner_, [this](StepStream* stream) { OnStreamEnded(stream); });
  return stream_;
}

void WorkerService::OnStreamEnded(StepStream* stream) {
  absl::MutexLock lock(&mutex_);
  CHECK(stream_ == stream);
  stream_ = nullptr;
  runner_.reset();
}

void WorkerService::LeaveEpoch(const absl::Status& reason) {
  if (stream_ == nullptr) {
    runner_.reset();
    return;
  }
  StepStream* const leaving = stream_;
  leaving->Stop(reason);
  const auto has_left = [this, leaving]()
                            ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stream_ != leaving; };
  if (mutex_.AwaitWithTimeout(absl::Condition(&has_left), options_.abort_timeout)) return;
  (options_.on_stuck ? options_.on_stuck : ExitStuck)();
}

grpc::Status WorkerService::Abort(grpc::ServerContext*, const v1::AbortRequest* request,
                                  v1::AbortResponse*) {
  absl::MutexLock lock(&mutex_);
  // No step of an older epoch can be running: its successor's Join saw to that.
  if (request->epoch() < last_epoch_) return grpc::Status::OK;
  last_epoch_ = request->epoch();  // a Join of that epoch that is still on its way comes too late
  if (joining_ != nullptr) {
    joining_->Cancel();
    joining_ = nullptr;
  }
  LeaveEpoch(absl::AbortedError(absl::StrCat("the coordinator ended epoch ", request->epoch())));
  return grpc::Status::OK;
}

grpc::Status WorkerService::Publish(grpc::ServerContext*, const v1::PublishRequest* request,
                                    v1::PublishResponse*) {
  return ToGrpc(blackboard_.Publish(request->epoch(), request->key(), request->value()));
}

grpc::Status WorkerService::Lookup(grpc::ServerContext* context, const v1::LookupRequest* request,
                                   v1::LookupResponse* response) {
  const absl::Time deadline =
      std::min(absl::FromChrono(context->deadline()), absl::Now() + kLongestLookup);
  absl::StatusOr<std::string> value =
      blackboard_.Lookup(request->epoch(), request->key(), deadline);
  if (value.ok()) response->set_value(*std::move(value));
  return ToGrpc(value.status());
}

grpc::Status WorkerService::PrepareGrammar(grpc::ServerContext*,
                                           const v1::PrepareGrammarRequest* request,
                                           v1::PrepareGrammarResponse*) {
  const absl::StatusOr<Grammar> grammar = ParseGrammar(request->grammar());
  const absl::Status status = grammar.ok() ? host_.PrepareGrammar(*grammar) : grammar.status();
  // Unavailable is what gRPC says when there is no worker.
  return ToGrpc(absl::IsUnavailable(status) ? absl::AbortedError(status.message()) : status);
}

bool WorkerService::WaitUntilIdle(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  const auto is_idle = [this]()
                           ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stream_ == nullptr; };
  return mutex_.AwaitWithDeadline(absl::Condition(&is_idle), deadline);
}

void WorkerService::Close() {
  blackboard_.Close();
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  if (joining_ != nullptr) joining_->Cancel();
  LeaveEpoch(absl::UnavailableError("this worker is shutting down"));
}

}  // namespace fathom
