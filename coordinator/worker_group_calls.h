// The calls by which a group forms and dissolves, made to all workers at once.
//
// Used by group_formation and worker_streams alone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/group_formation.h"
#include "coordinator/group_plan.h"
#include "grpcpp/channel.h"
#include "proto/worker.grpc.pb.h"

namespace fathom {

struct WorkerPeer {
  int rank;
  std::string address;
  std::string name;  // for messages
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Worker::Stub> stub;
};

using ReportProgress = std::function<void(const std::string& line)>;

// InvalidArgument when an address is malformed; nothing is sent yet.
absl::StatusOr<std::vector<WorkerPeer>> DialAll(const GroupOptions& options);

// Asks until every worker has answered, reporting who is missing. An answer that is an error of the
// worker's own (not just its absence) ends it.
absl::StatusOr<std::vector<v1::DescribeResponse>> DescribeAll(
    const GroupOptions& options, const std::vector<WorkerPeer>& peers, std::stop_token stop,
    const ReportProgress& report_progress);

// Returns when all are ready, or as soon as one fails; then the others are cancelled.
absl::Status JoinAll(const GroupOptions& options, const std::vector<WorkerPeer>& peers,
                     uint64_t epoch, const GroupPlan& plan, std::stop_token stop,
                     const ReportProgress& report_progress);

// Gives every worker abort_timeout to leave the epoch. Logs who did not answer.
void AbortAll(const std::vector<WorkerPeer>& peers, uint64_t epoch, absl::Duration abort_timeout);

// The status of a call to a worker, with the worker's name in front.
absl::Status FromWorker(const std::string& name, const grpc::Status& status);

}  // namespace fathom
