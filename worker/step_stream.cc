#include "worker/step_stream.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "grpcpp/server_context.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

// How long a stopping stream waits for its last result to be read.
constexpr absl::Duration kUnreadTime = absl::Milliseconds(100);

}  // namespace

StepStream::StepStream(grpc::CallbackServerContext* context, std::shared_ptr<StepMaker> runner,
                       std::function<void(StepStream*)> on_ended)
    : context_(context), on_ended_(std::move(on_ended)), runner_(std::move(runner)) {
  StartRead(&incoming_);
  thread_ = std::thread([this] { MakeSteps(); });
}

void StepStream::Stop(const absl::Status& reason) {
  absl::MutexLock lock(&mutex_);
  if (stop_reason_.ok()) stop_reason_ = reason;
  if (runner_ != nullptr) runner_->Abort();
}

void StepStream::OnReadDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  if (!ok) {
    is_reading_ = false;
    no_more_commands_ = true;
    return;
  }
  queue_.push_back(std::make_unique<Queued>(Queued{std::move(incoming_), absl::Now()}));
  incoming_.Clear();
  is_reading_ = queue_.size() < kMaxQueued;
  if (is_reading_) StartRead(&incoming_);
}

void StepStream::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  is_written_ = true;
  write_ok_ = ok;
}

void StepStream::OnCancel() { Stop(absl::CancelledError("the coordinator went away")); }

void StepStream::OnDone() {
  thread_.join();  // it called Finish last
  delete this;
}

void StepStream::MakeSteps() {
  std::shared_ptr<StepMaker> runner;
  {
    absl::MutexLock lock(&mutex_);
    runner = runner_;
  }
  absl::Status status;
  bool is_asked_to_leave = false;
  while (status.ok()) {
    const std::unique_ptr<Queued> next = NextCommand();
    if (next == nullptr) break;
    absl::StatusOr<v1::StepResult> result = runner->Run(next->command, next->arrived);
    status = result.status();
    const absl::Status written = AwaitWrite();
    if (status.ok()) status = written;
    if (status.ok()) StartToWrite(*std::move(result));
  }
  runner->Abort();  // the other ranks notice
  const absl::Status written = AwaitWrite();
  if (status.ok()) status = written;
  const uint64_t epoch = runner->epoch();
  {
    absl::MutexLock lock(&mutex_);
    // A coordinator that vanished cancels the stream; whoever else stops it means to.
    is_asked_to_leave = !stop_reason_.ok() && !absl::IsCancelled(stop_reason_);
    if (!stop_reason_.ok()) status = stop_reason_;
    runner_.reset();
  }
  runner.reset();
  if (status.ok()) {
    spdlog::info("left epoch {}: the coordinator closed the stream", epoch);
  } else if (is_asked_to_leave) {
    spdlog::info("left epoch {}: {}", epoch, std::string(status.message()));
  } else {
    spdlog::warn("left epoch {}: {}", epoch, std::string(status.message()));
  }
  on_ended_(this);
  Finish(ToGrpc(status));
}

std::unique_ptr<StepStream::Queued> StepStream::NextCommand() {
  absl::MutexLock lock(&mutex_);
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !queue_.empty() || no_more_commands_ || !stop_reason_.ok();
  };
  mutex_.Await(absl::Condition(&settled));
  if (queue_.empty() || !stop_reason_.ok()) return nullptr;
  std::unique_ptr<Queued> next = std::move(queue_.front());
  queue_.pop_front();
  if (!is_reading_ && !no_more_commands_) {
    is_reading_ = true;
    StartRead(&incoming_);
  }
  return next;
}

void StepStream::StartToWrite(v1::StepResult result) {
  outgoing_ = std::move(result);
  {
    absl::MutexLock lock(&mutex_);
    is_written_ = false;
  }
  StartWrite(&outgoing_);
}

absl::Status StepStream::AwaitWrite() {
  absl::MutexLock lock(&mutex_);
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return is_written_ || !stop_reason_.ok();
  };
  mutex_.Await(absl::Condition(&settled));
  if (!mutex_.AwaitWithTimeout(absl::Condition(&is_written_), kUnreadTime)) {
    context_->TryCancel();  // nobody reads
    mutex_.Await(absl::Condition(&is_written_));
  }
  return write_ok_ ? absl::OkStatus() : absl::CancelledError("the coordinator went away");
}

}  // namespace fathom
