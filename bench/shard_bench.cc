// How long the steps of one rank of DeepSeek-V3 on eight GPUs take: all 61 layers with random
// weights of the exact shapes, through the forward pass that serves.
//
//   shard_bench [--json] [--model bench/models/DeepSeek-V3] [--world-size 8] [--kv-cache-dtype
//   bfloat16]
//
// One GPU has no peers: where the ranks would add up their parts, a stand-in reads as many bytes of
// this rank's own part, and nothing is gathered. So the times are WITHOUT collectives between GPUs
// (bench/projection adds published ones). Everything else of a step is there: its vectors are sent
// to the device, all layers run, rank 0 has its logits. Wall time from the call to the end of the
// work, median.
//
// GB and the floor follow from the shapes: weights read once (of the routed experts as many as
// uniform routing hits on average), the KV cache read once; matrix products at 1.0 PFLOP/s in FP8
// and 0.66 in BF16, what good kernels reach on this chip; memory at the speed of a copy in the same
// run.

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/flag_parser.h"
#include "kernels/device.h"
#include "worker/communicator.h"
#include "worker/kv_cache.h"
#include "worker/model_config.h"
#include "worker/model_shard.h"
#include "worker/weight_source.h"

namespace fathom {
namespace {

constexpr int kBlockSize = 64;
constexpr double kFp8Flops = 1.0e15, kBf16Flops = 0.66e15;

struct Flags {
  bool json = false;
  std::string model = "bench/models/DeepSeek-V3";
  std::string kv_cache_dtype = "bfloat16";
  int world_size = 8;
  int repeats = 15;
  bool is_short = false;
};

// Stands for the other ranks: the sum is this rank's own part.
class StandInCommunicator final : public Communicator {
 public:
  explicit StandInCommunicator(int world_size) : world_size_(world_size) {}
  int rank() const override { return 0; }
  int world_size() const override { return world_size_; }
  absl::Status AllReduceSum(const Tensor&) override { return absl::OkStatus(); }
  absl::Status GatherToRank0(const Tensor&, const Tensor&) override { return absl::OkStatus(); }
  absl::Status BroadcastFromRank0(void*, int64_t) override { return absl::OkStatus(); }
  bool is_recordable() const override { return true; }
  void Abort() override {}

 private:
  const int world_size_;
};

struct Step {
  int sequences = 1;
  int tokens_each = 1;  // computed in this step
  int context = 0;      // of each sequence, these tokens included
  int tokens() const { return sequences * tokens_each; }
};

// What a step must move and compute at least. Letters as in kernels/ops.h.
class Roofline {
 public:
  Roofline(const ModelConfig& config, const ShardLayout& layout, int64_t kv_token_bytes)
      : config_(config), layout_(layout), kv_token_bytes_(kv_token_bytes) {}

  double Bytes(const Step& step) const { return WeightBytes(step) + KvBytes(step); }

  double FloorMs(const Step& step, double bytes_per_s) const {
    const double tokens = step.tokens(), heads = layout_.heads().size();
    const double layers = config_.num_hidden_layers;
    const double active = DenseWeights() + ExpertWeights() * config_.routing.num_experts_per_tok;
    const double linear_s = 2.0 * (tokens * active + step.sequences * HeadWeights()) / kFp8Flops;
    // Keys and values per head when a prompt is computed, latents when decoding.
    const bool decodes = step.tokens_each == 1;
    const double width = decodes ? 2.0 * config_.kv_lora_rank + config_.qk_rope_head_dim
                                 : config_.qk_head_dim() + config_.v_head_dim;
    const double seen = step.context - 0.5 * (step.tokens_each - 1);  // by the average token
    const double attention_s = 2.0 * tokens * heads * seen * width * layers / kBf16Flops;
    return 1e3 * (std::max(WeightBytes(step) / bytes_per_s, linear_s) +
                  std::max(KvBytes(step) / bytes_per_s, attention_s));
  }

 private:
  double MoeLayers() const {
    double count = 0;
    for (int i = 0; i < config_.num_hidden_layers; ++i) count += config_.IsMoeLayer(i) ? 1 : 0;
    return count;
  }
  // Of this rank, in all layers.
  double DenseWeights() const {
    const double hidden = config_.hidden_size, heads = layout_.heads().size();
    const double attention =
        hidden * (config_.q_lora_rank + config_.kv_dim()) +
        heads * (config_.q_lora_rank * config_.qk_head_dim() +
                 config_.kv_lora_rank * (config_.qk_nope_head_dim + config_.v_head_dim) +
                 hidden * config_.v_head_dim);
    const double dense_layers = config_.num_hidden_layers - MoeLayers();
    return config_.num_hidden_layers * attention +
           3.0 * hidden *
               (dense_layers * layout_.intermediate().size() +
                MoeLayers() * layout_.shared_intermediate().size());
  }
  // Of one routed expert, in all layers.
  double ExpertWeights() const {
    return MoeLayers() * 3.0 * config_.hidden_size * layout_.expert_intermediate().size();
  }
  double HeadWeights() const { return 1.0 * config_.hidden_size * layout_.vocabulary().size(); }
  double WeightBytes(const Step& step) const {
    const double experts = config_.n_routed_experts;
    const double hit =
        experts *
        (1.0 - std::pow(1.0 - config_.routing.num_experts_per_tok / experts, step.tokens()));
    const double router = 2.0 * MoeLayers() * experts * config_.hidden_size;
    return (DenseWeights() + hit * ExpertWeights()) * (1.0 + 4.0 / (kFp8Block * kFp8Block)) +
           router + 2.0 * HeadWeights();
  }
  double KvBytes(const Step& step) const {
    return 1.0 * step.sequences * step.context * kv_token_bytes_;
  }

  const ModelConfig& config_;
  const ShardLayout& layout_;
  const int64_t kv_token_bytes_;
};

template <typename T>
T Must(absl::StatusOr<T> result) {
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", std::string(result.status().message()).c_str());
    std::exit(1);
  }
  return *std::move(result);
}

double SecondsOf(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Bench {
 public:
  Bench(const Flags& flags, Device& device)
      : flags_(flags),
        device_(device),
        config_(Must(ReadModelConfig(flags.model))),
        layout_(Must(ShardLayout::Create({.rank = 0, .world_size = flags.world_size}, config_))),
        kv_dtype_(flags.kv_cache_dtype == "fp8" ? DType::kF8E4M3 : DType::kBF16),
        kv_token_bytes_(
            KvCache::BlockBytes({.dtype = kv_dtype_, .block_size = 1, .num_blocks = 1}, config_)),
        roofline_(config_, layout_, kv_token_bytes_),
        communicator_(flags.world_size) {}

  void MeasureCopy();
  void Load(int max_tokens, int max_context, int64_t kv_tokens);
  void Run(const Step& step);

 private:
  void Synchronize();
  StepBatch BatchOf(const Step& step);

  const Flags& flags_;
  Device& device_;
  const ModelConfig config_;
  const ShardLayout layout_;
  const DType kv_dtype_;
  const int64_t kv_token_bytes_;
  const Roofline roofline_;
  StandInCommunicator communicator_;
  double copy_bytes_per_s_ = 0.0;
  std::unique_ptr<ModelShard> shard_;
  std::unique_ptr<KvCache> kv_cache_;
  std::mt19937 random_{20261123};
};

void Bench::Synchronize() {
  const Tensor cache = kv_cache_->layer(0);
  uint32_t word = 0;
  device_.CopyToHost(Tensor(cache.raw(), DType::kI32, {1}), &word);
}

void Bench::MeasureCopy() {
  const int64_t bytes = int64_t{2} << 30;
  const Buffer memory = Must(device_.Allocate(2 * bytes));
  const Tensor from(memory.data(), DType::kI32, {bytes / 4});
  const Tensor to(static_cast<char*>(memory.data()) + bytes, DType::kI32, {bytes / 4});
  device_.ops().FillRandom(Tensor(from.raw(), DType::kF32, {bytes / 4}), 1.0f, 1);
  std::vector<double> seconds;
  for (int i = 0; i < 20; ++i) {
    int32_t word = 0;
    seconds.push_back(SecondsOf([&] {
      for (int j = 0; j < 4; ++j) device_.Copy(from, to);
      device_.CopyToHost(to.Slice(0, 0, 1), &word);
    }));
  }
  copy_bytes_per_s_ = 4 * 2.0 * bytes / *std::min_element(seconds.begin(), seconds.end());
  if (flags_.json) std::printf("{\"row\":\"copy\",\"gbps\":%.0f}\n", copy_bytes_per_s_ / 1e9);
}

void Bench::Load(int max_tokens, int max_context, int64_t kv_tokens) {
  const ModelShardOptions options = {.dtype = DType::kBF16,
                                     .quantize_activations = true,
                                     .max_tokens_per_step = max_tokens,
                                     .max_logit_rows = 256,
                                     .max_sequences = 256,
                                     .max_model_len = max_context,
                                     .kv_cache_dtype = kv_dtype_,
                                     .block_size = kBlockSize};
  RandomWeights weights;
  const int64_t available = device_.AvailableBytes();
  const ModelShard::Footprint footprint =
      Must(ModelShard::Plan(options, config_, layout_, weights, device_));
  const double seconds = SecondsOf([&] {
    shard_ = Must(ModelShard::Load(options, config_, layout_, weights, device_, nullptr));
    kv_cache_ = Must(KvCache::Create({.dtype = kv_dtype_,
                                      .block_size = kBlockSize,
                                      .num_blocks = static_cast<int>(kv_tokens / kBlockSize + 1)},
                                     config_, device_));
    for (int i = 0; i < config_.num_hidden_layers; ++i) {
      device_.ops().FillRandom(kv_cache_->layer(i), 1.0f, 100 + i);
    }
    Synchronize();
  });
  const int64_t left =
      static_cast<int64_t>(0.9 * available) - footprint.weight_bytes - footprint.activation_bytes;
  const int64_t kv_cache_tokens = std::max<int64_t>(0, left / kv_token_bytes_);
  if (flags_.json) {
    std::printf(
        "{\"row\":\"memory\",\"weight_bytes\":%lld,\"activation_bytes\":%lld,"
        "\"kv_token_bytes\":%lld,\"kv_cache_tokens\":%lld,\"fill_seconds\":%.1f}\n",
        static_cast<long long>(footprint.weight_bytes),
        static_cast<long long>(footprint.activation_bytes), static_cast<long long>(kv_token_bytes_),
        static_cast<long long>(kv_cache_tokens), seconds);
    return;
  }
  std::printf(
      "rank 0 of %d, %d layers: weights %.2f GB, activations %.2f GB, KV cache %s; at 0.9 of the "
      "free "
      "memory it would hold %lld tokens; copy %.0f GB/s\n",
      flags_.world_size, config_.num_hidden_layers, footprint.weight_bytes / 1e9,
      footprint.activation_bytes / 1e9, flags_.kv_cache_dtype.c_str(),
      static_cast<long long>(kv_cache_tokens), copy_bytes_per_s_ / 1e9);
  std::printf("all-reduces are a local stand-in: times are without collectives between GPUs\n");
  std::printf("%-8s %6s %8s %9s %8s %8s %8s %9s %9s\n", "step", "batch", "context", "ms", "GB",
              "GB/s", "of copy", "floor ms", "of floor");
}

StepBatch Bench::BatchOf(const Step& step) {
  const int blocks = (step.context + kBlockSize - 1) / kBlockSize;
  std::vector<int32_t> all_blocks(step.sequences * blocks);
  std::iota(all_blocks.begin(), all_blocks.end(), 0);
  std::shuffle(all_blocks.begin(), all_blocks.end(), random_);
  std::vector<int32_t> token_ids(static_cast<size_t>(step.sequences) * step.context);
  for (int32_t& id : token_ids) id = static_cast<int32_t>(random_() % config_.vocab_size);
  std::vector<SequenceSlice> slices;
  for (int s = 0; s < step.sequences; ++s) {
    slices.push_back({.token_ids = absl::MakeConstSpan(token_ids).subspan(
                          static_cast<size_t>(s) * step.context, step.context),
                      .blocks = absl::MakeConstSpan(all_blocks).subspan(s * blocks, blocks),
                      .first = step.context - step.tokens_each,
                      .count = step.tokens_each});
  }
  StepBatch batch = BuildStepBatch(slices, kBlockSize);
  for (int s = 1; s <= step.sequences; ++s) {
    batch.logit_rows.push_back(batch.query_start[s] - 1);
  }
  return batch;
}

void Bench::Run(const Step& step) {
  const StepBatch batch = BatchOf(step);
  const auto run = [&] {
    Must(shard_->Forward(batch, *kv_cache_, communicator_));
    Synchronize();
  };
  for (int i = 0; i < 3; ++i) run();  // the second records, the third replays
  std::vector<double> seconds;
  for (int i = 0; i < flags_.repeats; ++i) seconds.push_back(SecondsOf(run));
  std::sort(seconds.begin(), seconds.end());
  const double ms = 1e3 * seconds[seconds.size() / 2];
  const double gb = roofline_.Bytes(step) / 1e9, gbps = gb / ms * 1e3;
  const double floor_ms = roofline_.FloorMs(step, copy_bytes_per_s_);
  const char* name = step.tokens_each == 1 ? "decode" : "prefill";
  if (flags_.json) {
    std::printf(
        "{\"row\":\"%s\",\"batch\":%d,\"tokens\":%d,\"context\":%d,\"ms\":%.3f,\"ms_best\":%.3f,"
        "\"gb\":%.2f,\"gbps\":%.0f,\"share_of_copy\":%.3f,\"floor_ms\":%.3f,\"collectives\":"
        "\"stand-in\"}\n",
        name, step.sequences, step.tokens(), step.context, ms, 1e3 * seconds.front(), gb, gbps,
        gbps * 1e9 / copy_bytes_per_s_, floor_ms);
  } else {
    std::printf("%-8s %6d %8d %9.3f %8.2f %8.0f %7.0f%% %9.2f %8.0f%%\n", name, step.sequences,
                step.context, ms, gb, gbps, 100 * gbps * 1e9 / copy_bytes_per_s_, floor_ms,
                100 * floor_ms / ms);
  }
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Times the steps of one rank of a model, with random weights.", "shard_bench");
  parser.AddSwitch("--json", flags.json, "one object per row");
  parser.Add("--model", flags.model, "folder with config.json");
  parser.Add("--world-size", flags.world_size, "ranks that the model is divided among")
      .Between(1, 1024);
  parser.Add("--kv-cache-dtype", flags.kv_cache_dtype).OneOf({"bfloat16", "fp8"});
  parser.Add("--repeats", flags.repeats, "steps that are timed").Between(1, 1000);
  parser.AddSwitch("--short", flags.is_short, "without the long contexts");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  const std::unique_ptr<Device> device = Must(OpenCudaDevice({}));
  std::vector<Step> steps;
  for (const int batch : {1, 8, 64, 256}) steps.push_back({.sequences = batch, .context = 2304});
  steps.push_back({.tokens_each = 2048, .context = 2048});
  if (!flags.is_short) {
    steps.push_back({.tokens_each = 8192, .context = 8192});
    steps.push_back({.context = 32768});
    steps.push_back({.context = 131072});
  }
  int max_tokens = 0, max_context = 0;
  int64_t kv_tokens = 0;
  for (const Step& step : steps) {
    max_tokens = std::max(max_tokens, step.tokens());
    max_context = std::max(max_context, step.context);
    kv_tokens = std::max<int64_t>(kv_tokens, int64_t{step.sequences} * (step.context + kBlockSize));
  }
  Bench bench(flags, *device);
  bench.MeasureCopy();
  bench.Load(max_tokens, max_context, kv_tokens);
  for (const Step& step : steps) bench.Run(step);
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
