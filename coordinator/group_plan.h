// What a group of workers can do together, decided from what each of them said of itself.
//
// Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/generate.pb.h"
#include "proto/worker.pb.h"

namespace fathom {

struct GroupPlan {
  v1::ModelInfo model;                 // max_model_len is the one in force
  std::vector<v1::MemoryPlan> memory;  // of each worker, by rank
  int block_size = 0;
  int num_kv_blocks = 0;
  int max_tokens_per_step = 0;
  int max_sequences = 0;                                                        // in one step
  v1::JoinRequest::Collectives collectives = v1::JoinRequest::COLLECTIVES_SHM;  // never auto

  int64_t kv_cache_tokens() const { return int64_t{num_kv_blocks} * block_size; }
};

struct GroupPlanOptions {
  std::string version;  // every worker must be of this one
  int block_size = 16;  // tokens per KV block
  int max_tokens_per_step = 2048;
  int max_sequences = 256;
  int max_model_len = 0;  // 0: the model's, or what the KV cache can hold if that is less
  // UNSPECIFIED, "auto": of one host peer for GPUs and shm for CPUs, of several nccl and gloo.
  v1::JoinRequest::Collectives collectives = v1::JoinRequest::COLLECTIVES_UNSPECIFIED;
};

// The machine that an address points to, as far as sharing memory goes.
std::string HostOf(const std::string& address);

// A worker as messages name it: "worker 3 (unix:/run/fathom/worker-3.sock)".
std::string WorkerName(int rank, const std::string& address);

// `descriptions` and `addresses` are by rank. FailedPrecondition, naming the worker and both
// values, when they differ in version, model, or numbers; when the model's length limit is
// exceeded; or when the KV cache could not hold one request of max_model_len tokens.
//
// The blocks are those of the worker with the least room, but never more than max_sequences
// sequences of max_model_len tokens could use.
absl::StatusOr<GroupPlan> PlanGroup(const GroupPlanOptions& options,
                                    const std::vector<v1::DescribeResponse>& descriptions,
                                    const std::vector<std::string>& addresses);

// Later than `last_epoch` and than any that a worker has heard of.
uint64_t NextEpoch(uint64_t last_epoch, const std::vector<v1::DescribeResponse>& descriptions);

// For the operator, a line each: memory, KV cache size, maximum concurrency.
std::vector<std::string> DescribePlan(const GroupPlan& plan,
                                      const std::vector<v1::DescribeResponse>& descriptions);

}  // namespace fathom
