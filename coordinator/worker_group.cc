#include "coordinator/worker_group.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/worker_group_calls.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr char kRunMethod[] = "/fathom.v1.Worker/Run";

// How long after a first failure a lost connection is waited for. Workers on this host see each
// other's absence within milliseconds, and so do we.
constexpr std::chrono::milliseconds kCauseGrace(50);

grpc::ByteBuffer Serialise(const v1::StepCommand& command) {
  grpc::ByteBuffer bytes;
  bool is_own_buffer;
  const grpc::Status status =
      grpc::SerializationTraits<v1::StepCommand>::Serialize(command, &bytes, &is_own_buffer);
  CHECK(status.ok()) << status.error_message();
  return bytes;
}

}  // namespace

// The Run stream to one worker. Bytes out, because all workers get the same; results in.
class WorkerGroup::Stream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, v1::StepResult> {
 public:
  Stream(WorkerGroup& group, const WorkerPeer& peer)
      : group_(group), peer_(peer), stub_(peer.channel) {}

  void Open() {
    stub_.PrepareBidiStreamingCall(&context_, kRunMethod, {}, this);
    AddHold();  // for writes, which start outside of reactions; until the first failed read
    StartRead(&result_);
    StartCall();
  }

  void Write(const grpc::ByteBuffer& bytes) {
    const std::lock_guard lock(mutex_);
    if (!is_open_) return;
    unsent_.push_back(bytes);  // shares the memory
    if (unsent_.size() == 1) StartWrite(&unsent_.front());
  }

  void Cancel() { context_.TryCancel(); }

  void WaitUntilDone() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return is_done_; });
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    unsent_.pop_front();
    if (ok && is_open_ && !unsent_.empty()) StartWrite(&unsent_.front());
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      group_.OnResult(peer_.rank, std::move(result_));
      result_.Clear();
      StartRead(&result_);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      is_open_ = false;
    }
    RemoveHold();
  }

  void OnDone(const grpc::Status& status) override {
    group_.OnStreamEnded(peer_.rank, FromGrpc(status));
    // Notifies with the lock held: the waiter may destroy this as soon as it can take it.
    const std::lock_guard lock(mutex_);
    is_done_ = true;
    done_.notify_all();
  }

 private:
  WorkerGroup& group_;
  const WorkerPeer& peer_;
  grpc::TemplatedGenericStub<grpc::ByteBuffer, v1::StepResult> stub_;
  grpc::ClientContext context_;
  v1::StepResult result_;  // of reactions only, which come one at a time

  std::mutex mutex_;
  std::condition_variable done_;
  // Guarded by mutex_.
  std::deque<grpc::ByteBuffer> unsent_;  // the front one is being written
  bool is_open_ = true;
  bool is_done_ = false;
};

absl::StatusOr<std::unique_ptr<WorkerGroup>> WorkerGroup::Form(
    Options options, uint64_t last_epoch, std::stop_token stop,
    const std::function<void(const std::string& line)>& report_progress,
    std::function<void()> on_broken) {
  CHECK(!options.addresses.empty());
  ASSIGN_OR_RETURN(std::vector<WorkerPeer> peers, DialAll(options));
  ASSIGN_OR_RETURN(const std::vector<v1::DescribeResponse> descriptions,
                   DescribeAll(options, peers, stop, report_progress));
  const GroupPlanOptions plan_options{.version = options.version,
                                      .block_size = options.block_size,
                                      .max_sequences = options.max_sequences,
                                      .max_model_len = options.max_model_len,
                                      .collectives = options.collectives};
  ASSIGN_OR_RETURN(GroupPlan plan, PlanGroup(plan_options, descriptions, options.addresses));
  const auto level = options.is_plan_known ? spdlog::level::debug : spdlog::level::info;
  for (const std::string& line : DescribePlan(plan, descriptions)) spdlog::log(level, "{}", line);

  for (const v1::DescribeResponse& description : descriptions) {
    last_epoch = std::max(last_epoch, description.last_epoch());
  }
  const uint64_t epoch = last_epoch + 1;
  const absl::Status joined = JoinAll(options, peers, epoch, plan, stop, report_progress);
  if (!joined.ok()) {
    AbortAll(options, peers, epoch);
    return joined;
  }
  // Not make_unique: the constructor is private.
  std::unique_ptr<WorkerGroup> group(new WorkerGroup(std::move(options), epoch, std::move(plan),
                                                     std::move(peers), std::move(on_broken)));
  group->OpenStreams();
  group->on_stop_ = std::make_unique<std::stop_callback<std::function<void()>>>(
      stop, [g = group.get()] { g->Break(absl::CancelledError("stopping")); });
  return group;
}

WorkerGroup::WorkerGroup(Options options, uint64_t epoch, GroupPlan plan,
                         std::vector<WorkerPeer> peers, std::function<void()> on_broken)
    : options_(std::move(options)),
      epoch_(epoch),
      plan_(std::move(plan)),
      on_broken_(std::move(on_broken)),
      peers_(std::move(peers)),
      last_step_answered_(peers_.size()) {}

WorkerGroup::~WorkerGroup() {
  on_stop_.reset();
  AbortAll(options_, peers_, epoch_);
  for (const auto& stream : streams_) stream->Cancel();
  for (const auto& stream : streams_) stream->WaitUntilDone();
}

void WorkerGroup::OpenStreams() {
  for (const WorkerPeer& peer : peers_) streams_.push_back(std::make_unique<Stream>(*this, peer));
  for (const auto& stream : streams_) stream->Open();
}

void WorkerGroup::Send(const v1::StepCommand& command) {
  const grpc::ByteBuffer bytes = Serialise(command);
  for (const auto& stream : streams_) stream->Write(bytes);
}

absl::StatusOr<v1::StepResult> WorkerGroup::Await(uint64_t step) {
  std::unique_lock lock(mutex_);
  const bool in_time = changed_.wait_for(lock, absl::ToChronoMilliseconds(options_.step_timeout),
                                         [&] { return !failures_.empty() || AllAnswered(step); });
  if (!in_time) {
    std::vector<std::string> silent;
    for (const WorkerPeer& peer : peers_) {
      if (last_step_answered_[peer.rank] < step) silent.push_back(peer.name);
    }
    lock.unlock();
    Break(absl::UnavailableError(absl::StrCat(absl::StrJoin(silent, ", "), " did not finish step ",
                                              step, " within ",
                                              absl::FormatDuration(options_.step_timeout))));
    return status();
  }
  if (!AllAnswered(step)) return failures_.front();
  CHECK(!results_.empty());
  CHECK_EQ(results_.front().step(), step);
  v1::StepResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

absl::Status WorkerGroup::status() const {
  const std::lock_guard lock(mutex_);
  return failures_.empty() ? absl::OkStatus() : failures_.front();
}

void WorkerGroup::Break(absl::Status cause) {
  bool is_first;
  {
    const std::lock_guard lock(mutex_);
    is_first = failures_.empty();
    failures_.push_back(std::move(cause));
    changed_.notify_all();
  }
  if (is_first) on_broken_();
}

absl::Status WorkerGroup::Cause() {
  std::unique_lock lock(mutex_);
  if (failures_.empty()) return absl::OkStatus();
  changed_.wait_for(lock, kCauseGrace, [this] { return IsAnyoneLost(); });
  const auto lost = std::find_if(failures_.begin(), failures_.end(), absl::IsUnavailable);
  return lost == failures_.end() ? failures_.front() : *lost;
}

bool WorkerGroup::IsAnyoneLost() const {
  return std::any_of(failures_.begin(), failures_.end(), absl::IsUnavailable);
}

bool WorkerGroup::AllAnswered(uint64_t step) const {
  return std::all_of(last_step_answered_.begin(), last_step_answered_.end(),
                     [step](uint64_t answered) { return answered >= step; });
}

void WorkerGroup::OnResult(int rank, v1::StepResult result) {
  {
    const std::lock_guard lock(mutex_);
    const uint64_t expected = last_step_answered_[rank] + 1;
    if (result.epoch() == epoch_ && result.step() == expected) {
      last_step_answered_[rank] = expected;
      if (rank == 0) results_.push_back(std::move(result));
      if (AllAnswered(expected)) changed_.notify_all();
      return;
    }
  }
  Break(absl::InternalError(absl::StrCat(peers_[rank].name, " answered step ", result.step(),
                                         " of epoch ", result.epoch(), " out of turn")));
}

void WorkerGroup::OnStreamEnded(int rank, const absl::Status& status) {
  // While the group is being destroyed this is what was asked for; then nobody looks.
  const std::string& name = peers_[rank].name;
  if (absl::IsUnavailable(status)) {
    return Break(absl::UnavailableError(absl::StrCat(name, " was lost: ", status.message())));
  }
  if (!status.ok()) {
    return Break(absl::Status(status.code(), absl::StrCat(name, " failed: ", status.message())));
  }
  Break(absl::UnavailableError(absl::StrCat(name, " left the group")));
}

}  // namespace fathom
