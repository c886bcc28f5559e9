#include "coordinator/group_plan.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/human_bytes.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

std::string EosText(const v1::DescribeResponse& description) {
  std::string text;
  for (const uint32_t id : description.eos_token_ids()) absl::StrAppend(&text, id, " ");
  return text;
}

// Everything that must be the same everywhere, as (what, value).
std::vector<std::pair<std::string, std::string>> Traits(const v1::DescribeResponse& description) {
  return {{"model fingerprint", description.model_fingerprint()},
          {"architecture", description.architecture()},
          {"vocab_size", absl::StrCat(description.vocab_size())},
          {"max_position_embeddings", absl::StrCat(description.max_position_embeddings())},
          {"end-of-sequence tokens", EosText(description)},
          {"--dtype", description.dtype()},
          {"--kv-cache-dtype", description.kv_cache_dtype()},
          {"--quantization", description.quantization()},
          {"--activation-quantization", description.activation_quantization()}};
}

absl::Status CheckSame(const GroupPlanOptions& options,
                       const std::vector<v1::DescribeResponse>& descriptions,
                       const std::vector<std::string>& addresses) {
  const auto expected = Traits(descriptions[0]);
  for (size_t rank = 0; rank < descriptions.size(); ++rank) {
    const std::string name = WorkerName(static_cast<int>(rank), addresses[rank]);
    if (descriptions[rank].version() != options.version) {
      return absl::FailedPreconditionError(
          absl::StrCat(name, " is of version '", descriptions[rank].version(),
                       "', expected the coordinator's '", options.version, "'"));
    }
    const auto traits = Traits(descriptions[rank]);
    for (size_t i = 0; i < traits.size(); ++i) {
      if (traits[i].second == expected[i].second) continue;
      return absl::FailedPreconditionError(
          absl::StrCat(name, " has ", traits[i].first, " '", traits[i].second, "', ",
                       WorkerName(0, addresses[0]), " has '", expected[i].second,
                       "': start every worker with the same --model and the same flags"));
    }
  }
  return absl::OkStatus();
}

v1::JoinRequest::Collectives ChooseCollectives(
    const GroupPlanOptions& options, const std::vector<v1::DescribeResponse>& descriptions,
    const std::vector<std::string>& addresses) {
  if (options.collectives != v1::JoinRequest::COLLECTIVES_UNSPECIFIED) return options.collectives;
  // As many as eight GPUs reach each other's memory within a host.
  constexpr size_t kMostPeers = 8;
  const bool on_one_host = std::all_of(
      addresses.begin(), addresses.end(),
      [&](const std::string& address) { return HostOf(address) == HostOf(addresses[0]); });
  const bool on_gpus =
      std::all_of(descriptions.begin(), descriptions.end(),
                  [](const auto& description) { return description.device() == "cuda"; });
  if (!on_gpus) {
    return on_one_host ? v1::JoinRequest::COLLECTIVES_SHM : v1::JoinRequest::COLLECTIVES_GLOO;
  }
  return on_one_host && addresses.size() <= kMostPeers ? v1::JoinRequest::COLLECTIVES_PEER
                                                       : v1::JoinRequest::COLLECTIVES_NCCL;
}

int64_t BlocksFor(int64_t num_tokens, int block_size) {
  return (num_tokens + block_size - 1) / block_size;
}

absl::StatusOr<int64_t> ChooseMaxModelLen(const GroupPlanOptions& options,
                                          const v1::DescribeResponse& description,
                                          int64_t kv_cache_tokens) {
  const int64_t model_limit = description.max_position_embeddings();
  if (options.max_model_len == 0) return std::min(model_limit, kv_cache_tokens);
  if (options.max_model_len > model_limit) {
    return absl::FailedPreconditionError(
        absl::StrCat("--max-model-len is ", options.max_model_len,
                     ", but max_position_embeddings of the model is ", model_limit));
  }
  if (options.max_model_len > kv_cache_tokens) {
    return absl::FailedPreconditionError(absl::StrCat(
        "To serve at least one request with the model's max seq len (", options.max_model_len,
        "), ", BlocksFor(options.max_model_len, options.block_size),
        " KV blocks are needed, which is more than the available ",
        kv_cache_tokens / options.block_size, ". Try increasing --kv-cache-memory-bytes or ",
        "decreasing --max-model-len to at most ", kv_cache_tokens));
  }
  return options.max_model_len;
}

}  // namespace

std::string HostOf(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return "localhost";
  const std::string host = address.substr(0, address.rfind(':'));
  const bool is_loopback = host == "[::1]" || absl::StartsWith(host, "127.");
  return is_loopback ? "localhost" : host;
}

std::string WorkerName(int rank, const std::string& address) {
  return absl::StrCat("worker ", rank, " (", address, ")");
}

absl::StatusOr<GroupPlan> PlanGroup(const GroupPlanOptions& options,
                                    const std::vector<v1::DescribeResponse>& descriptions,
                                    const std::vector<std::string>& addresses) {
  CHECK(!descriptions.empty());
  CHECK_EQ(descriptions.size(), addresses.size());
  RETURN_IF_ERROR(CheckSame(options, descriptions, addresses));
  const auto scarcest =
      std::min_element(descriptions.begin(), descriptions.end(), [](const auto& a, const auto& b) {
        return a.plan().kv_block_capacity() < b.plan().kv_block_capacity();
      });
  const int64_t capacity = scarcest->plan().kv_block_capacity();
  if (capacity == 0) {
    const int rank = static_cast<int>(scarcest - descriptions.begin());
    return absl::FailedPreconditionError(absl::StrCat(
        WorkerName(rank, addresses[rank]), " has no memory for KV blocks: its budget is ",
        scarcest->plan().budget_bytes(), " bytes, of which the weights take ",
        scarcest->plan().weight_bytes(), " and activations ", scarcest->plan().activation_bytes(),
        ". Try increasing --kv-cache-memory-bytes or --gpu-memory-utilization"));
  }

  const v1::DescribeResponse& any = descriptions[0];
  ASSIGN_OR_RETURN(const int64_t max_model_len,
                   ChooseMaxModelLen(options, any, capacity * options.block_size));
  if (any.vocab_size() == 0 || max_model_len == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        WorkerName(0, addresses[0]), " describes a model with vocab_size ", any.vocab_size(),
        " and max_position_embeddings ", any.max_position_embeddings()));
  }

  GroupPlan plan;
  for (const auto& description : descriptions) plan.memory.push_back(description.plan());
  plan.block_size = options.block_size;
  plan.max_tokens_per_step = options.max_tokens_per_step;
  plan.max_sequences = options.max_sequences;
  plan.collectives = ChooseCollectives(options, descriptions, addresses);
  plan.num_kv_blocks = static_cast<int>(
      std::min(capacity, options.max_sequences * BlocksFor(max_model_len, options.block_size)));
  plan.model.set_architecture(any.architecture());
  plan.model.set_vocab_size(any.vocab_size());
  plan.model.set_max_model_len(static_cast<uint32_t>(max_model_len));
  *plan.model.mutable_eos_token_ids() = any.eos_token_ids();
  plan.model.set_dtype(any.dtype());
  plan.model.set_kv_cache_dtype(any.kv_cache_dtype());
  plan.model.set_quantization(any.quantization());
  return plan;
}

uint64_t NextEpoch(uint64_t last_epoch, const std::vector<v1::DescribeResponse>& descriptions) {
  for (const v1::DescribeResponse& description : descriptions) {
    last_epoch = std::max(last_epoch, description.last_epoch());
  }
  return last_epoch + 1;
}

std::vector<std::string> DescribePlan(const GroupPlan& plan,
                                      const std::vector<v1::DescribeResponse>& descriptions) {
  const v1::MemoryPlan& memory = descriptions[0].plan();
  std::vector<std::string> lines;
  lines.push_back(absl::StrCat(
      "Memory of each worker: ", HumanBytes(memory.weight_bytes()), " weights + ",
      HumanBytes(memory.activation_bytes()), " activations + ",
      HumanBytes(memory.kv_block_bytes() * plan.num_kv_blocks), " KV cache (", plan.num_kv_blocks,
      " blocks of ", plan.block_size, " tokens), of ", HumanBytes(memory.budget_bytes())));
  lines.push_back(absl::StrFormat("KV cache size: %d tokens", plan.kv_cache_tokens()));
  lines.push_back(absl::StrFormat(
      "Maximum concurrency for %d tokens per request: %.2fx", plan.model.max_model_len(),
      static_cast<double>(plan.kv_cache_tokens()) / plan.model.max_model_len()));
  return lines;
}

}  // namespace fathom
