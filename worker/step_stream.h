// One Run stream: reads commands as they come, makes their steps one by one in a thread of its own,
// and writes the results in the same order. A step does not wait for the result of the one before
// it to be written.
//
// The stream ends when the client closes or cancels it, with the error of the first step that
// fails, or when it is told to stop. It destroys itself once gRPC is done with it.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/support/server_callback.h"
#include "proto/worker.pb.h"
#include "worker/shard_host.h"

namespace fathom {

class StepStream final : public grpc::ServerBidiReactor<v1::StepCommand, v1::StepResult> {
 public:
  // `on_ended` is called once, from the stream's thread, when no step runs any more and the runner
  // is released; the stream must not be touched after that.
  // `context` is the call's.
  StepStream(grpc::CallbackServerContext* context, std::shared_ptr<StepMaker> runner,
             std::function<void(StepStream*)> on_ended);

  // Ends the stream with `reason`, soon, and the running step with it. From any thread; does not
  // wait. REQUIRES: before on_ended has returned.
  void Stop(const absl::Status& reason);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // Commands that wait while a step runs. The coordinator has two steps in flight at most.
  static constexpr size_t kMaxQueued = 4;

  struct Queued {
    v1::StepCommand command;
    absl::Time arrived;
  };

  void MakeSteps();
  // The next command; absent when there will be none.
  std::unique_ptr<Queued> NextCommand();
  void StartToWrite(v1::StepResult result);
  // Until the last write has ended; OK when it could.
  absl::Status AwaitWrite();

  grpc::CallbackServerContext* const context_;
  const std::function<void(StepStream*)> on_ended_;
  v1::StepCommand incoming_;  // of the read under way
  v1::StepResult outgoing_;   // of the write under way

  absl::Mutex mutex_;
  std::shared_ptr<StepMaker> runner_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::unique_ptr<Queued>> queue_ ABSL_GUARDED_BY(mutex_);
  bool is_reading_ ABSL_GUARDED_BY(mutex_) = true;
  bool no_more_commands_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status stop_reason_ ABSL_GUARDED_BY(mutex_);  // not OK: stop
  bool is_written_ ABSL_GUARDED_BY(mutex_) = true;    // no write is under way
  bool write_ok_ ABSL_GUARDED_BY(mutex_) = true;      // of the last one

  std::thread thread_;
};

}  // namespace fathom
