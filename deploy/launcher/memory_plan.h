// What `fathom-worker --check` found out about the model, and how it is told to the operator.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "deploy/launcher/serve_options.h"

namespace fathom {

// Of one worker; the workers' shards have the same size.
struct MemoryPlan {
  std::string architecture;
  std::string dtype;
  std::string kv_cache_dtype;
  std::string quantization;
  std::string activation_quantization;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  int64_t max_model_len = 0;
  int64_t budget_bytes = 0;
  int64_t weight_bytes = 0;
  int64_t activation_bytes = 0;
  int64_t kv_block_bytes = 0;
  int64_t num_kv_blocks = 0;
};

// The one line of JSON that --check prints. InvalidArgument when it is something else.
absl::StatusOr<MemoryPlan> ParseMemoryPlan(const std::string& json);

// The lines operators know, and those that say which values are in force and why.
std::vector<std::string> DescribeMemoryPlan(const MemoryPlan& plan, const ServeOptions& options);

// NotFound with what was looked for when `options.model_dir` is no model folder.
absl::Status CheckModelFolder(const ServeOptions& options);

// Whether the checkpoint's weights are FP8 already, as its config.json says.
bool IsFp8Checkpoint(const std::string& model_dir);

// 1149440 -> "1,149,440".
std::string WithThousands(int64_t number);

}  // namespace fathom
