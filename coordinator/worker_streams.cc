#include "coordinator/worker_streams.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/status.h"

namespace fathom {
namespace {

constexpr char kRunMethod[] = "/fathom.v1.Worker/Run";

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
class WorkerStreams::Stream final
    : public grpc::ClientBidiReactor<grpc::ByteBuffer, v1::StepResult> {
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

WorkerStreams::WorkerStreams(WorkerGroup& group, std::vector<WorkerPeer> peers,
                             absl::Duration abort_timeout)
    : epoch_(group.epoch()), abort_timeout_(abort_timeout), peers_(std::move(peers)) {
  for (const WorkerPeer& peer : peers_) streams_.push_back(std::make_unique<Stream>(group, peer));
  for (const auto& stream : streams_) stream->Open();
  watch_.emplace(peers_, [&group](int rank, bool is_silent) { group.OnSilence(rank, is_silent); });
}

WorkerStreams::~WorkerStreams() {
  watch_.reset();
  AbortAll(peers_, epoch_, abort_timeout_);
  for (const auto& stream : streams_) stream->Cancel();
  for (const auto& stream : streams_) stream->WaitUntilDone();
}

void WorkerStreams::Send(const v1::StepCommand& command) {
  const grpc::ByteBuffer bytes = Serialise(command);
  for (const auto& stream : streams_) stream->Write(bytes);
}

}  // namespace fathom
