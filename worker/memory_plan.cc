#include "worker/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/human_bytes.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

std::string WhatIsTaken(const MemoryNeeds& needs, int64_t budget_bytes) {
  return absl::StrCat("The budget of this worker is ", HumanBytes(budget_bytes), " (", budget_bytes,
                      " bytes), of which the weights take ", HumanBytes(needs.weight_bytes),
                      " and the activations ", HumanBytes(needs.activation_bytes), ".");
}

// What others hold of a GPU is not to be had, whatever the share says.
absl::Status CheckAvailable(const MemoryPlanOptions& options, const MemoryNeeds& needs,
                            int64_t budget_bytes) {
  if (needs.available_bytes == 0 || budget_bytes <= needs.available_bytes) {
    return absl::OkStatus();
  }
  const std::string there_is = absl::StrCat(
      "of the GPU's ", HumanBytes(needs.host_bytes), " only ", HumanBytes(needs.available_bytes),
      " (", needs.available_bytes, " bytes) were free when this worker started, but ");
  if (options.kv_cache_memory_bytes.has_value()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(there_is, "weights, activations and --kv-cache-memory-bytes add up to ",
                     HumanBytes(budget_bytes), ". Try decreasing --kv-cache-memory-bytes by ",
                     budget_bytes - needs.available_bytes, ", or end what else uses the GPU"));
  }
  const double share =
      static_cast<double>(needs.available_bytes) / static_cast<double>(needs.host_bytes);
  return absl::ResourceExhaustedError(
      absl::StrCat(there_is, "--gpu-memory-utilization ", options.gpu_memory_utilization,
                   " asks for ", HumanBytes(budget_bytes), ". Try decreasing it to at most ",
                   std::floor(share * 100) / 100, ", or end what else uses the GPU"));
}

// Bytes that are left for KV blocks; budget_bytes is out.
absl::StatusOr<int64_t> KvBytes(const MemoryPlanOptions& options, const MemoryNeeds& needs,
                                int64_t& budget_bytes) {
  const int64_t fixed_bytes = needs.weight_bytes + needs.activation_bytes;
  const int64_t share_bytes = needs.host_bytes / needs.workers_on_this_host;
  if (options.kv_cache_memory_bytes.has_value()) {
    budget_bytes = fixed_bytes + *options.kv_cache_memory_bytes;
    if (budget_bytes <= share_bytes) return *options.kv_cache_memory_bytes;
    return absl::ResourceExhaustedError(absl::StrCat(
        "weights, activations and --kv-cache-memory-bytes add up to ", HumanBytes(budget_bytes),
        " (", budget_bytes, " bytes) per worker, but ", needs.workers_on_this_host,
        needs.workers_on_this_host == 1 ? " worker has a host of " : " workers share a host of ",
        HumanBytes(needs.host_bytes), ". Try decreasing ", "--kv-cache-memory-bytes to at most ",
        std::max<int64_t>(0, share_bytes - fixed_bytes)));
  }
  budget_bytes =
      static_cast<int64_t>(options.gpu_memory_utilization * static_cast<double>(share_bytes));
  return std::min(budget_bytes - fixed_bytes, options.default_kv_cache_limit_bytes);
}

}  // namespace

absl::StatusOr<WorkerMemoryPlan> PlanWorkerMemory(const MemoryPlanOptions& options,
                                                  const MemoryNeeds& needs) {
  CHECK(needs.workers_on_this_host > 0 && needs.kv_block_bytes > 0 && needs.block_size > 0);
  if (needs.max_model_len > needs.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--max-model-len is ", needs.max_model_len,
                                                   ", but max_position_embeddings of the model is ",
                                                   needs.max_position_embeddings));
  }
  WorkerMemoryPlan plan;
  plan.weight_bytes = needs.weight_bytes;
  plan.activation_bytes = needs.activation_bytes;
  plan.kv_block_bytes = needs.kv_block_bytes;
  ASSIGN_OR_RETURN(const int64_t kv_bytes, KvBytes(options, needs, plan.budget_bytes));
  RETURN_IF_ERROR(CheckAvailable(options, needs, plan.budget_bytes));
  // Places within the cache are 32 bits.
  const int64_t most_blocks = std::numeric_limits<int32_t>::max() / needs.block_size;
  const int64_t capacity = std::min(kv_bytes / needs.kv_block_bytes, most_blocks);
  if (capacity < 1) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "No available memory for the cache blocks. ", WhatIsTaken(needs, plan.budget_bytes),
        " One block takes ", needs.kv_block_bytes, " bytes. Try increasing ",
        "--gpu-memory-utilization or --kv-cache-memory-bytes, or more workers"));
  }
  plan.kv_block_capacity = static_cast<int>(capacity);

  const int64_t kv_tokens = capacity * needs.block_size;
  if (needs.max_model_len > kv_tokens) {
    const int64_t blocks = (needs.max_model_len + needs.block_size - 1) / needs.block_size;
    return absl::ResourceExhaustedError(absl::StrCat(
        "To serve at least one request with the model's max seq len (", needs.max_model_len, "), ",
        HumanBytes(blocks * needs.kv_block_bytes), " KV cache is needed, which is larger than the ",
        "available KV cache memory (", HumanBytes(kv_bytes), "). ",
        WhatIsTaken(needs, plan.budget_bytes),
        " Based on the available memory, the estimated maximum model length is ", kv_tokens,
        ". Try increasing --kv-cache-memory-bytes (without it a CPU worker takes at most ",
        HumanBytes(options.default_kv_cache_limit_bytes),
        ") or --gpu-memory-utilization, or decreasing ", "--max-model-len"));
  }
  plan.max_model_len =
      needs.max_model_len > 0
          ? needs.max_model_len
          : static_cast<int>(std::min<int64_t>(needs.max_position_embeddings, kv_tokens));
  return plan;
}

int64_t HostMemoryBytes() {
  int64_t bytes = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  std::string word;
  for (int64_t kilobytes = 0; meminfo >> word;) {
    if (word == "MemTotal:" && meminfo >> kilobytes) bytes = kilobytes * 1024;
  }
  // Of the control group, version 2 and 1. "max" is no number.
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream file(path);
    if (int64_t limit = 0; file >> limit) bytes = std::min(bytes, limit);
  }
  return bytes;
}

}  // namespace fathom
