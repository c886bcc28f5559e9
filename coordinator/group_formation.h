// How a worker group comes into being: dial and Describe everyone, agree on a plan, Join everyone
// at once under a fresh epoch, open the streams for steps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/worker_group.h"
#include "proto/endpoint.h"
#include "proto/worker.pb.h"

namespace fathom {

struct GroupOptions {
  std::vector<std::string> addresses;  // of the workers, by rank
  TlsOptions tls;
  std::string version;  // of the coordinator; every worker's must be equal
  // UNSPECIFIED: as GroupPlanOptions says.
  v1::JoinRequest::Collectives collectives = v1::JoinRequest::COLLECTIVES_UNSPECIFIED;
  bool enable_expert_parallel = false;
  int block_size = 16;  // tokens per KV block
  int max_tokens_per_step = 2048;
  int max_sequences = 256;
  int max_logit_rows = 512;    // per step
  int max_model_len = 0;       // 0: the model's own, or what the KV cache can hold
  bool is_plan_known = false;  // to the operator: it is then logged for debugging only
  absl::Duration describe_timeout = absl::Seconds(30);  // of one attempt; they go on forever
  absl::Duration join_timeout = absl::Seconds(60);      // for finding each other, after loading
  absl::Duration join_silence_timeout = absl::Seconds(180);  // between two reports of progress
  absl::Duration step_timeout = absl::Seconds(30);
  absl::Duration abort_timeout = absl::Seconds(1);
};

// Waits as long as it takes for every worker to answer, then loads and connects them, under an
// epoch later than `last_epoch` and than any that a worker has heard of (perhaps of a coordinator
// before this one).
// `report_progress` gets a line now and then, from the calling thread. `on_event` is WorkerGroup's.
//
// Errors name the worker: FailedPrecondition when the workers do not fit together or the plan is
// impossible, Cancelled after `stop`, else what that worker said.
absl::StatusOr<std::unique_ptr<WorkerGroup>> FormGroup(
    const GroupOptions& options, uint64_t last_epoch, std::stop_token stop,
    const std::function<void(const std::string& line)>& report_progress,
    std::function<void()> on_event);

}  // namespace fathom
