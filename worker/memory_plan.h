// How a worker divides its memory, decided before anything is loaded.
//
// Thread-safe (pure functions).
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"

namespace fathom {

struct MemoryPlanOptions {
  // Share of the host's memory that all its workers together may take; of a GPU's, what this one
  // may.
  double gpu_memory_utilization = 0.9;
  // Bytes for KV blocks, whatever the share would leave. Absent: what the share leaves.
  std::optional<int64_t> kv_cache_memory_bytes = std::nullopt;
  // Most bytes for KV blocks when kv_cache_memory_bytes is absent. Host memory has other users, and
  // promised pages that are touched too late bring down a process that did nothing wrong.
  int64_t default_kv_cache_limit_bytes = int64_t{512} << 20;
};

// What is known of host and shard.
struct MemoryNeeds {
  int64_t host_bytes = 0;
  int64_t available_bytes = 0;  // of a GPU, when the worker started; 0: not asked
  int workers_on_this_host = 1;
  int64_t weight_bytes = 0;
  int64_t activation_bytes = 0;
  int64_t kv_block_bytes = 0;  // of one block, all layers
  int block_size = 16;         // tokens per KV block
  int max_model_len = 0;       // asked for; 0: the model's own, or what fits
  int max_position_embeddings = 0;
};

struct WorkerMemoryPlan {
  int64_t budget_bytes = 0;
  int64_t weight_bytes = 0;
  int64_t activation_bytes = 0;
  int64_t kv_block_bytes = 0;
  int kv_block_capacity = 0;  // at least one
  int max_model_len = 0;      // tokens of one sequence, which fits
};

// ResourceExhausted, with numbers and what to do, when weights and activations leave no room for KV
// blocks or a sequence of the length asked for does not fit; InvalidArgument when the model is
// shorter than that.
absl::StatusOr<WorkerMemoryPlan> PlanWorkerMemory(const MemoryPlanOptions& options,
                                                  const MemoryNeeds& needs);

// The memory of this host, or of this container if that is less.
int64_t HostMemoryBytes();

}  // namespace fathom
