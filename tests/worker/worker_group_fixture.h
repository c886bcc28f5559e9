// Workers in this process, on unix sockets, and a little coordinator that commands them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/client_context.h"
#include "grpcpp/server.h"
#include "proto/worker.grpc.pb.h"
#include "worker/shard_keeper.h"
#include "worker/worker_service.h"

namespace fathom {

using StepClientStream = grpc::ClientReaderWriter<v1::StepCommand, v1::StepResult>;

// One worker as main.cc sets it up, on a socket in a folder of its own.
class TestWorker {
 public:
  TestWorker(const std::string& model_directory, const WorkerServiceOptions& options);
  ~TestWorker();  // as on SIGTERM

  const std::string& address() const { return address_; }
  v1::Worker::Stub& stub() { return *stub_; }

 private:
  std::string folder_;
  std::string address_;
  std::unique_ptr<ShardKeeper> keeper_;
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::Worker::Stub> stub_;
};

// A Join call to its end: its status and what it reported.
struct JoinOutcome {
  grpc::Status status;
  std::vector<v1::JoinProgress> progress;
};
JoinOutcome CallJoin(v1::Worker::Stub& stub, const v1::JoinRequest& request);

class TestGroup {
 public:
  explicit TestGroup(int world_size, const std::string& model = "v3_tiny",
                     const WorkerServiceOptions& options = {.version = "test"});

  int world_size() const { return static_cast<int>(workers_.size()); }
  TestWorker& worker(int rank) { return *workers_[rank]; }
  void Kill(int rank) { workers_[rank].reset(); }

  v1::ShardSpec Shard(int rank) const;
  v1::JoinRequest JoinOf(int rank, uint64_t epoch) const;
  // All ranks at once.
  std::vector<JoinOutcome> Join(uint64_t epoch);
  // Join, which must succeed, and a Run stream to each.
  void Form(uint64_t epoch);

  // Sends one step of the current epoch to all; rank 0's result, or the first error.
  absl::StatusOr<v1::StepResult> Step(v1::StepCommand command);
  // Sends one step, as it is, to one rank.
  void Send(int rank, const v1::StepCommand& command);
  // The status with which a stream ended. REQUIRES: nothing more to read but the end.
  grpc::Status Finish(int rank);
  // Reads what there is until the stream ends.
  grpc::Status Drain(int rank);
  // Breaks all streams, as a coordinator that dies.
  void CancelStreams();

  // Generates greedily in one slot; `chunk` prompt tokens per step.
  std::vector<int32_t> Greedy(const std::vector<int32_t>& prompt, int count, int chunk);

  uint64_t epoch = 0;
  uint64_t step = 0;
  v1::JoinRequest::Collectives collectives = v1::JoinRequest::COLLECTIVES_SHM;
  int timeout_ms = 10000;

 private:
  struct Stream {
    std::unique_ptr<grpc::ClientContext> context;
    std::unique_ptr<StepClientStream> stream;
  };

  std::vector<std::unique_ptr<TestWorker>> workers_;
  std::vector<Stream> streams_;
};

// Words for commands.
v1::SequenceAdmission& AddAdmission(v1::StepCommand& command, uint32_t slot,
                                    const std::vector<int32_t>& token_ids);
void AddScheduled(v1::StepCommand& command, uint32_t slot, int num_tokens,
                  const std::vector<uint32_t>& new_blocks);

}  // namespace fathom
