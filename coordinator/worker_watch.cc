#include "coordinator/worker_watch.h"

#include <chrono>
#include <optional>
#include <utility>

#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"

namespace fathom {
namespace {

// Together less than a second.
constexpr std::chrono::milliseconds kInterval{250};
constexpr std::chrono::milliseconds kPatience{650};

// Any answer will do, a refusal too.
constexpr char kMethod[] = "/grpc.health.v1.Health/Check";

bool IsAnswer(const grpc::Status& status) {
  return status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED &&
         status.error_code() != grpc::StatusCode::UNAVAILABLE;
}

}  // namespace

struct WorkerWatch::Worker {
  explicit Worker(const WorkerPeer& peer) : rank(peer.rank), stub(peer.channel) {}

  const int rank;
  grpc::GenericStub stub;
  const grpc::ByteBuffer request{nullptr, 0};  // of an empty message
  grpc::ByteBuffer response;
  std::optional<grpc::ClientContext> context;  // guarded by mutex_; absent: not asked
  bool is_silent = false;
};

WorkerWatch::WorkerWatch(const std::vector<WorkerPeer>& peers,
                         std::function<void(int rank, bool is_silent)> on_change)
    : on_change_(std::move(on_change)) {
  for (const WorkerPeer& peer : peers) workers_.push_back(std::make_unique<Worker>(peer));
  thread_ = std::jthread([this](const std::stop_token& stop) { Run(stop); });
}

WorkerWatch::~WorkerWatch() {
  thread_.request_stop();
  thread_.join();
  std::unique_lock lock(mutex_);
  for (const auto& worker : workers_) {
    if (worker->context.has_value()) worker->context->TryCancel();
  }
  changed_.wait(lock, [this] { return num_asked_ == 0; });
}

void WorkerWatch::Run(const std::stop_token& stop) {
  // One after the other: all at once would hold up a step.
  const auto pause = std::chrono::microseconds(kInterval) / workers_.size();
  for (size_t next = 0; !stop.stop_requested(); next = (next + 1) % workers_.size()) {
    Ask(*workers_[next]);
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, stop, pause, [] { return false; });
  }
}

void WorkerWatch::Ask(Worker& worker) {
  {
    const std::lock_guard lock(mutex_);
    if (worker.context.has_value()) return;
    worker.context.emplace();
    ++num_asked_;
  }
  worker.context->set_deadline(std::chrono::system_clock::now() + kPatience);
  const auto on_done = [this, &worker](const grpc::Status& status) {
    const bool is_silent = !IsAnswer(status);
    if (std::exchange(worker.is_silent, is_silent) != is_silent) on_change_(worker.rank, is_silent);
    // Notifies with the lock held: the waiter may destroy this as soon as it can take it.
    const std::lock_guard lock(mutex_);
    worker.context.reset();
    --num_asked_;
    changed_.notify_all();
  };
  worker.stub.UnaryCall(&*worker.context, kMethod, {}, &worker.request, &worker.response, on_done);
}

}  // namespace fathom
