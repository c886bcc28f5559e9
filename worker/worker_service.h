// The Worker service: the life of a worker among the groups it joins, over gRPC.
//
// A worker is in one epoch at a time. Join makes it a member of a new epoch, after leaving the old
// one; Run carries that epoch's steps, which one thread makes in order; when the stream ends, for
// whatever reason, or Abort comes, it leaves the epoch and keeps its weights. A step that cannot be
// made to end within a second ends the process: whoever started the worker starts it again.
//
// Describe, Publish and Lookup answer at any time.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/endpoint.h"
#include "proto/worker.grpc.pb.h"
#include "worker/blackboard.h"
#include "worker/shard_host.h"

namespace fathom {

class StepStream;

struct WorkerServiceOptions {
  std::string version;
  TlsOptions tls = {};  // for reaching rank 0
  absl::Duration collective_timeout = absl::Seconds(120);
  absl::Duration abort_timeout = absl::Seconds(1);
  // Called when a step does not end within abort_timeout. Must not return; exits by default.
  std::function<void()> on_stuck = nullptr;
};

class WorkerService final : public v1::Worker::WithCallbackMethod_Run<v1::Worker::Service> {
 public:
  // `host` must outlive the service.
  WorkerService(const WorkerServiceOptions& options, ShardHost& host);
  ~WorkerService() override;  // REQUIRES: the server is shut down

  grpc::Status Describe(grpc::ServerContext* context, const v1::DescribeRequest* request,
                        v1::DescribeResponse* response) override;
  grpc::Status Join(grpc::ServerContext* context, const v1::JoinRequest* request,
                    grpc::ServerWriter<v1::JoinProgress>* writer) override;
  grpc::ServerBidiReactor<v1::StepCommand, v1::StepResult>* Run(
      grpc::CallbackServerContext* context) override;
  grpc::Status Abort(grpc::ServerContext* context, const v1::AbortRequest* request,
                     v1::AbortResponse* response) override;
  grpc::Status Publish(grpc::ServerContext* context, const v1::PublishRequest* request,
                       v1::PublishResponse* response) override;
  grpc::Status PrepareGrammar(grpc::ServerContext* context,
                              const v1::PrepareGrammarRequest* request,
                              v1::PrepareGrammarResponse* response) override;
  grpc::Status Lookup(grpc::ServerContext* context, const v1::LookupRequest* request,
                      v1::LookupResponse* response) override;

  // Waits until no Run stream is open, at most until `deadline`; whether there is none. This is how
  // a worker drains.
  bool WaitUntilIdle(absl::Time deadline);
  // Makes every call end soon: for shutting down.
  void Close();

 private:
  class Joining;  // one Join call under way
  friend class StepStream;

  absl::Status BeginJoin(Joining& joining);
  // Waits for an earlier Join, which may still be loading. OK: it is this one's turn to load.
  absl::Status AwaitTurn(Joining& joining);
  absl::StatusOr<std::shared_ptr<StepMaker>> MakeRunner(Joining& joining);
  // Rank 0's, as this rank reaches it.
  absl::StatusOr<std::unique_ptr<Blackboard>> OpenBlackboard(const Joining& joining);
  // Loading takes as long as it takes, and longer on one rank than on another: only when all have
  // loaded does the time for connecting begin.
  static absl::Status AwaitAllLoaded(Joining& joining, Blackboard& blackboard);
  absl::Status AwaitOthers(Joining& joining);
  absl::StatusOr<std::unique_ptr<Communicator>> Connect(Joining& joining, Device& device);
  // The kind that was asked for, not connected yet.
  absl::StatusOr<std::unique_ptr<GroupCommunicator>> MakeCommunicator(const Joining& joining,
                                                                      Device& device);
  absl::Status FinishJoin(Joining& joining, std::shared_ptr<StepMaker> runner);
  // Ends the current epoch's stream and waits until its last step is over.
  void LeaveEpoch(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnStreamEnded(StepStream* stream);

  const WorkerServiceOptions options_;
  ShardHost& host_;
  BlackboardKeeper blackboard_;

  absl::Mutex mutex_;
  uint64_t last_epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  Joining* joining_ ABSL_GUARDED_BY(mutex_) = nullptr;         // the latest, while it is wanted
  bool is_loading_ ABSL_GUARDED_BY(mutex_) = false;            // some Join's turn
  std::shared_ptr<StepMaker> runner_ ABSL_GUARDED_BY(mutex_);  // of last_epoch_, once joined
  StepStream* stream_ ABSL_GUARDED_BY(mutex_) = nullptr;       // of runner_, while it is open
};

}  // namespace fathom
