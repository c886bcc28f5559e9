#include "deploy/launcher/memory_plan.h"

#include <simdjson.h>

#include <filesystem>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/human_bytes.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

absl::Status Read(const simdjson::dom::element& object, const char* key, std::string& value) {
  std::string_view text;
  if (object[key].get(text) != simdjson::SUCCESS) {
    return absl::InvalidArgumentError(absl::StrCat("the worker's plan has no text '", key, "'"));
  }
  value = text;
  return absl::OkStatus();
}

absl::Status Read(const simdjson::dom::element& object, const char* key, int64_t& value) {
  if (object[key].get(value) != simdjson::SUCCESS || value < 0) {
    return absl::InvalidArgumentError(absl::StrCat("the worker's plan has no number '", key, "'"));
  }
  return absl::OkStatus();
}

std::string DescribeBlockSize(const ServeOptions& options) {
  return absl::StrCat("Block size: ", BlockSizeOf(options), " tokens per KV block (",
                      options.block_size == 0
                          ? "the default: little is lost in a sequence's last block"
                          : "as --block-size asks; every size computes the same numbers",
                      ")");
}

}  // namespace

absl::StatusOr<MemoryPlan> ParseMemoryPlan(const std::string& json) {
  simdjson::dom::parser parser;
  simdjson::dom::element object;
  if (parser.parse(json).get(object) != simdjson::SUCCESS || !object.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the worker's plan is not a JSON object: ", json.substr(0, 200)));
  }
  MemoryPlan plan;
  RETURN_IF_ERROR(Read(object, "architecture", plan.architecture));
  RETURN_IF_ERROR(Read(object, "dtype", plan.dtype));
  RETURN_IF_ERROR(Read(object, "kv_cache_dtype", plan.kv_cache_dtype));
  RETURN_IF_ERROR(Read(object, "quantization", plan.quantization));
  RETURN_IF_ERROR(Read(object, "activation_quantization", plan.activation_quantization));
  RETURN_IF_ERROR(Read(object, "vocab_size", plan.vocab_size));
  RETURN_IF_ERROR(Read(object, "max_position_embeddings", plan.max_position_embeddings));
  RETURN_IF_ERROR(Read(object, "max_model_len", plan.max_model_len));
  RETURN_IF_ERROR(Read(object, "budget_bytes", plan.budget_bytes));
  RETURN_IF_ERROR(Read(object, "weight_bytes", plan.weight_bytes));
  RETURN_IF_ERROR(Read(object, "activation_bytes", plan.activation_bytes));
  RETURN_IF_ERROR(Read(object, "kv_block_bytes", plan.kv_block_bytes));
  RETURN_IF_ERROR(Read(object, "num_kv_blocks", plan.num_kv_blocks));
  if (plan.max_model_len == 0) {
    return absl::InvalidArgumentError("the worker's plan has max_model_len 0");
  }
  return plan;
}

std::vector<std::string> DescribeMemoryPlan(const MemoryPlan& plan, const ServeOptions& options) {
  const int64_t num_tokens = plan.num_kv_blocks * BlockSizeOf(options);
  const int64_t kv_bytes = plan.num_kv_blocks * plan.kv_block_bytes;
  std::vector<std::string> lines;
  lines.push_back(absl::StrCat("Model: ", plan.architecture, ", vocabulary ",
                               WithThousands(plan.vocab_size), ", activations ", plan.dtype,
                               ", quantization ", plan.quantization,
                               plan.activation_quantization == "fp8" ? " of activations too" : ""));
  if (options.load_format == "dummy") lines.push_back("Weights: random (--load-format dummy)");
  const std::string gpus =
      options.gpus.empty() ? "" : absl::StrCat(", GPUs ", absl::StrJoin(options.gpus, " "));
  const std::string groups =
      options.data_parallel_size == 1
          ? ""
          : absl::StrCat(" in ", options.data_parallel_size, " groups of ",
                         options.tensor_parallel_size, ", the figures below are each group's");
  lines.push_back(absl::StrCat("Workers: ", NumWorkers(options), " on ", options.device, gpus,
                               options.enable_expert_parallel ? ", expert parallel" : "", groups));
  if (options.quantization == "fp8" && IsFp8Checkpoint(options.model_dir)) {
    lines.push_back("--quantization fp8 changes nothing: the checkpoint is FP8 already");
  }
  if (options.device == "sim") {
    lines.push_back("Simulated: no weights, no KV cache; steps take the time that " +
                    options.sim_profile + " says, tokens are hashes of what stands before them");
  } else {
    lines.push_back(absl::StrCat("Memory of each worker: ", HumanBytes(plan.weight_bytes),
                                 " weights + ", HumanBytes(plan.activation_bytes),
                                 " activations + ", HumanBytes(kv_bytes), " KV cache (",
                                 plan.kv_cache_dtype, "), of ", HumanBytes(plan.budget_bytes)));
  }
  lines.push_back(DescribeBlockSize(options));
  lines.push_back(absl::StrCat("KV cache size: ", WithThousands(num_tokens), " tokens"));
  lines.push_back(absl::StrFormat("Maximum concurrency for %s tokens per request: %.2fx",
                                  WithThousands(plan.max_model_len),
                                  static_cast<double>(num_tokens) / plan.max_model_len));
  return lines;
}

absl::Status CheckModelFolder(const ServeOptions& options) {
  std::error_code error;
  if (!std::filesystem::is_directory(options.model_dir, error)) {
    return absl::NotFoundError(absl::StrCat(
        "'", options.model_dir, "' is no folder: expected one with config.json and *.safetensors; ",
        "models are not downloaded"));
  }
  if (!std::filesystem::is_regular_file(options.model_dir + "/config.json", error)) {
    return absl::NotFoundError(absl::StrCat("'", options.model_dir,
                                            "' has no config.json: expected a model folder as on "
                                            "Hugging Face"));
  }
  return absl::OkStatus();
}

bool IsFp8Checkpoint(const std::string& model_dir) {
  simdjson::dom::parser parser;
  simdjson::dom::element config;
  std::string_view method;
  return parser.load(model_dir + "/config.json").get(config) == simdjson::SUCCESS &&
         config["quantization_config"]["quant_method"].get(method) == simdjson::SUCCESS &&
         method == "fp8";
}

std::string WithThousands(int64_t number) {
  std::string text = absl::StrCat(number);
  for (int at = static_cast<int>(text.size()) - 3; at > 0; at -= 3) text.insert(at, 1, ',');
  return text;
}

}  // namespace fathom
