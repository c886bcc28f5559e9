// How long each operation of a layer takes on this GPU, at the shapes of one rank of eight of
// DeepSeek-V3, with the bytes it must move, the floor that follows and its share of it.
//
//   operation_bench [--json] [--tokens 1,8,64,256,2048] [--context 2304] [--only NAME]
//
// Decode steps: one token per sequence at the given context. From 512 tokens on: one prompt without
// earlier context. Every row is a recording of many calls over weights that together are larger
// than the L2, replayed; random numbers throughout. The floor is the larger of bytes over the
// bandwidth of a copy measured in the same run and FLOP over the published peak of the tensor
// cores.

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
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
#include "kernels/ops.h"

namespace fathom {
namespace {

constexpr int64_t kHidden = 7168, kHeads = 16, kQueryRank = 1536, kLatent = 512, kRope = 64;
constexpr int64_t kNope = 128, kValue = 128, kExperts = 257, kRouted = 256, kWidth = 256;
constexpr int64_t kVocabulary = 16160;
constexpr int kBlockSize = 64;
constexpr int64_t kRotatedBytes = int64_t{200} << 20;  // of weights, several times the L2
constexpr double kFp8FlopPerUs = 1979e6, kBf16FlopPerUs = 989e6;

struct Flags {
  bool json = false;
  std::vector<int> tokens = {1, 8, 64, 256, 2048};
  int context = 2304;
  std::string only;
};

// Work of one call.
struct Cost {
  double bytes = 0.0;
  double fp8_flop = 0.0;
  double bf16_flop = 0.0;
};

class Bench {
 public:
  Bench(Device& device, const Flags& flags) : device_(device), ops_(device.ops()), flags_(flags) {}

  void MeasureCopy();
  void Run(int tokens);

 private:
  // Uniform random numbers up to `amplitude`; nothing where that is 0.
  Tensor Make(DType dtype, std::initializer_list<int64_t> shape, float amplitude = 1.0f);
  Tensor MakeIds(const std::vector<int32_t>& ids);
  LinearInput MakeInput(int64_t rows, int64_t columns);
  std::vector<Weight> MakeWeights(int64_t outputs, int64_t inputs, int64_t experts = 0);
  void Synchronize();
  double MedianUs(int calls, const std::function<void(int)>& call);
  void Row(const char* name, const Cost& cost, int calls, const std::function<void(int)>& call);

  void Linears();
  void Norms();
  void Attention();
  void Experts();

  Device& device_;
  Ops& ops_;
  const Flags& flags_;
  double copy_bytes_per_us_ = 0.0;
  int tokens_ = 0;
  uint64_t seed_ = 20261123;
  std::vector<Buffer> memory_;
  Buffer scratch_;  // operations use it from then on
  std::mt19937 random_{20261123};
};

Tensor Bench::Make(DType dtype, std::initializer_list<int64_t> shape, float amplitude) {
  const Tensor size(nullptr, dtype, shape);
  absl::StatusOr<Buffer> buffer = device_.Allocate(size.num_bytes());
  CHECK(buffer.ok()) << buffer.status();
  const Tensor tensor(buffer->data(), dtype, shape);
  memory_.push_back(*std::move(buffer));
  if (amplitude > 0.0f) ops_.FillRandom(tensor, amplitude, ++seed_);
  return tensor;
}

Tensor Bench::MakeIds(const std::vector<int32_t>& ids) {
  const Tensor tensor = Make(DType::kI32, {static_cast<int64_t>(ids.size())}, 0.0f);
  device_.CopyFromHost(ids.data(), tensor);
  return tensor;
}

LinearInput Bench::MakeInput(int64_t rows, int64_t columns) {
  return {Make(DType::kF8E4M3, {rows, columns}), Make(DType::kF32, {rows, columns / kFp8Block})};
}

std::vector<Weight> Bench::MakeWeights(int64_t outputs, int64_t inputs, int64_t experts) {
  const int64_t bytes = std::max<int64_t>(experts, 1) * outputs * inputs;
  const int64_t blocks = (outputs + kFp8Block - 1) / kFp8Block;
  std::vector<Weight> weights(std::max<int64_t>(2, kRotatedBytes / bytes));
  for (Weight& weight : weights) {
    if (experts == 0) {
      weight.values = Make(DType::kF8E4M3, {outputs, inputs});
      weight.scale_inv = Make(DType::kF32, {blocks, inputs / kFp8Block});
    } else {
      weight.values = Make(DType::kF8E4M3, {experts, outputs, inputs});
      weight.scale_inv = Make(DType::kF32, {experts, blocks, inputs / kFp8Block});
    }
  }
  return weights;
}

void Bench::Synchronize() {
  int32_t word = 0;
  device_.CopyToHost(Tensor(memory_.front().data(), DType::kI32, {1}), &word);
}

// Of one call, over a recording of `calls` of them.
double Bench::MedianUs(int calls, const std::function<void(int)>& call) {
  call(0);  // what is set up on first use
  Synchronize();
  absl::StatusOr<std::unique_ptr<Recording>> recording = device_.Record([&] {
    for (int i = 0; i < calls; ++i) call(i);
    return absl::OkStatus();
  });
  CHECK(recording.ok() && *recording != nullptr) << recording.status();
  std::vector<double> times;
  for (int i = 0; i < 14; ++i) {
    Synchronize();
    const auto start = std::chrono::steady_clock::now();
    (*recording)->Replay();
    Synchronize();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    if (i >= 3) times.push_back(time.count() / calls);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void Bench::Row(const char* name, const Cost& cost, int calls,
                const std::function<void(int)>& call) {
  if (!flags_.only.empty() && flags_.only != name) return;
  const double us = MedianUs(calls, call);
  const double floor_us = std::max(cost.bytes / copy_bytes_per_us_,
                                   cost.fp8_flop / kFp8FlopPerUs + cost.bf16_flop / kBf16FlopPerUs);
  const double tflops = (cost.fp8_flop + cost.bf16_flop) / us / 1e6;
  if (flags_.json) {
    std::printf(
        "{\"row\":\"operation\",\"operation\":\"%s\",\"tokens\":%d,\"context\":%d,\"us\":%.2f,"
        "\"mbytes\":%.2f,\"gbps\":%.0f,\"tflops\":%.1f,\"floor_us\":%.2f}\n",
        name, tokens_, flags_.context, us, cost.bytes / 1e6, cost.bytes / us / 1e3, tflops,
        floor_us);
  } else {
    std::printf("%6d  %-22s %9.2f %9.2f %8.0f %8.1f %9.2f %7.0f%%\n", tokens_, name, us,
                cost.bytes / 1e6, cost.bytes / us / 1e3, tflops, floor_us, 100.0 * floor_us / us);
  }
  std::fflush(stdout);
}

void Bench::MeasureCopy() {
  const int64_t bytes = int64_t{1} << 30;
  const Tensor from = Make(DType::kF32, {bytes / 4}), to = Make(DType::kF32, {bytes / 4});
  double us = 1e9;  // of one copy; not recorded: recorded copies take another, slower way
  for (int i = 0; i < 20; ++i) {
    Synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int j = 0; j < 4; ++j) device_.Copy(from, to);
    Synchronize();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    us = std::min(us, time.count() / 4);
  }
  copy_bytes_per_us_ = 2.0 * static_cast<double>(bytes) / us;
  memory_.resize(1);
  if (flags_.json) {
    std::printf("{\"row\":\"copy\",\"gbps\":%.0f}\n", copy_bytes_per_us_ / 1e3);
  } else {
    std::printf("copy %.0f GB/s (read + write)\n", copy_bytes_per_us_ / 1e3);
    std::printf("%6s  %-22s %9s %9s %8s %8s %9s %8s\n", "tokens", "operation", "us", "MB", "GB/s",
                "TFLOP/s", "floor us", "of floor");
  }
}

void Bench::Run(int tokens) {
  tokens_ = tokens;
  Norms();
  Linears();
  Attention();
  Experts();
}

void Bench::Norms() {
  const Tensor x = Make(DType::kBF16, {tokens_, kHidden}),
               y = Make(DType::kBF16, {tokens_, kHidden});
  const Tensor normed = Make(DType::kBF16, {tokens_, kHidden});
  const Tensor weight = Make(DType::kF32, {kHidden});
  const LinearInput quantized = MakeInput(tokens_, kHidden);
  Row("add_rms_norm, attention's", {.bytes = tokens_ * kHidden * (2.0 * 3 + 1)}, 32,
      [&](int) { ops_.AddRmsNorm(x, y, weight, 1e-6f, {}, quantized); });
  Row("add_rms_norm", {.bytes = tokens_ * kHidden * (4.0 * 2 + 1)}, 32,
      [&](int) { ops_.AddRmsNorm(x, y, weight, 1e-6f, normed, quantized); });
  memory_.resize(1);
}

void Bench::Linears() {
  const struct {
    const char* name;
    int64_t outputs, inputs;
  } layers[] = {{"qkv_a_proj", kQueryRank + kLatent + kRope, kHidden},
                {"q_b_proj", kHeads * (kNope + kRope), kQueryRank},
                {"o_proj", kHidden, kHeads * kValue},
                {"dense gate_up_proj", 4608, kHidden},
                {"dense down_proj", kHidden, 2304}};
  for (const auto& layer : layers) {
    const std::vector<Weight> weights = MakeWeights(layer.outputs, layer.inputs);
    const LinearInput x = MakeInput(tokens_, layer.inputs);
    const Tensor out = Make(DType::kBF16, {tokens_, layer.outputs});
    const Cost cost = {
        .bytes = static_cast<double>(layer.outputs * layer.inputs + tokens_ * layer.inputs +
                                     2 * tokens_ * layer.outputs),
        .fp8_flop = 2.0 * tokens_ * static_cast<double>(layer.outputs * layer.inputs)};
    Row(layer.name, cost, 32, [&](int i) { ops_.Linear(x, weights[i % weights.size()], out); });
    memory_.resize(1);
  }
  const Tensor head[] = {Make(DType::kBF16, {kVocabulary, kHidden}),
                         Make(DType::kBF16, {kVocabulary, kHidden})};
  const int64_t rows = std::min(tokens_, 256);
  const Tensor x = Make(DType::kBF16, {rows, kHidden});
  const Tensor out = Make(DType::kF32, {rows, kVocabulary});
  const Cost cost = {.bytes = 2.0 * kVocabulary * kHidden + 4.0 * rows * kVocabulary,
                     .bf16_flop = 2.0 * rows * kVocabulary * kHidden};
  Row("lm_head", cost, 8, [&](int i) { ops_.Linear(x, {.values = head[i % 2]}, out); });
  memory_.resize(1);
}

void Bench::Attention() {
  const bool is_prefill = tokens_ >= 512;
  const int sequences = is_prefill ? 1 : tokens_;
  const int context = is_prefill ? tokens_ : flags_.context;
  const int blocks = (context + kBlockSize - 1) / kBlockSize;
  const int64_t num_blocks = int64_t{sequences} * blocks;
  constexpr int kCaches = 3;
  std::vector<Tensor> caches;
  for (int i = 0; i < kCaches; ++i) {
    caches.push_back(Make(DType::kBF16, {num_blocks, kBlockSize, kLatent + kRope}));
  }
  std::vector<int32_t> table(num_blocks), starts(sequences + 1), lens(sequences, context);
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), random_);
  for (int s = 0; s <= sequences; ++s) starts[s] = is_prefill ? s * tokens_ : s;
  std::vector<int32_t> positions(tokens_), places(tokens_);
  for (int t = 0; t < tokens_; ++t) {
    positions[t] = is_prefill ? t : context - 1;
    const int sequence = is_prefill ? 0 : t;
    places[t] = table[sequence * blocks + positions[t] / kBlockSize] * kBlockSize +
                positions[t] % kBlockSize;
  }
  const AttentionBatch batch = {.block_tables = MakeIds(table).Reshape({sequences, blocks}),
                                .query_start = MakeIds(starts),
                                .context_lens = MakeIds(lens),
                                .block_size = kBlockSize,
                                .host_query_start = starts.data(),
                                .host_context_lens = lens.data()};
  const Tensor position_ids = MakeIds(positions), place_ids = MakeIds(places);
  const Tensor cos_sin = Make(DType::kF32, {context, kRope / 2, 2});

  const Tensor qkv_a = Make(DType::kBF16, {tokens_, kQueryRank + kLatent + kRope});
  const Tensor q_norm = Make(DType::kF32, {kQueryRank}), kv_norm = Make(DType::kF32, {kLatent});
  const LinearInput q_a = MakeInput(tokens_, kQueryRank);
  const double latents = kQueryRank + kLatent + kRope;
  Row("store_latents", {.bytes = tokens_ * (2 * latents + kQueryRank + 2 * (kLatent + kRope))}, 32,
      [&](int i) {
        ops_.StoreLatents(qkv_a, q_norm, kv_norm, 1e-6f, position_ids, cos_sin, place_ids, q_a,
                          caches[i % kCaches]);
      });

  const StepLimits limits = {.act = DType::kBF16,
                             .kv_cache_dtype = DType::kBF16,
                             .max_tokens = tokens_,
                             .max_sequences = sequences,
                             .max_model_len = context,
                             .block_size = kBlockSize,
                             .num_layers = 64,
                             .hidden_size = kHidden,
                             .heads = kHeads,
                             .qk_nope_head_dim = kNope,
                             .qk_rope_head_dim = kRope,
                             .kv_lora_rank = kLatent,
                             .v_head_dim = kValue,
                             .n_routed_experts = kRouted,
                             .num_experts = kExperts,
                             .num_choices = 9,
                             .widest_linear = kHidden};
  absl::StatusOr<Buffer> scratch = device_.Allocate(ops_.ScratchBytes(limits));
  CHECK(scratch.ok()) << scratch.status();
  scratch_ = *std::move(scratch);
  ops_.UseScratch(limits, scratch_.data());
  std::vector<MlaWeights> weights(32);
  for (MlaWeights& weight : weights) {
    weight = {.w_uk = Make(DType::kBF16, {kHeads, kLatent, kNope}),
              .w_uv = Make(DType::kBF16, {kHeads, kValue, kLatent})};
  }
  const Tensor q = Make(DType::kBF16, {tokens_, kHeads, kNope + kRope});
  const LinearInput out = MakeInput(tokens_, kHeads * kValue);
  const double projections = 2.0 * kHeads * kLatent * (kNope + kValue);
  const double pairs = is_prefill ? 0.5 * tokens_ * tokens_ : 1.0 * tokens_ * context;
  const Cost cost = {.bytes = 1.0 * sequences * context * 2 * (kLatent + kRope) + projections +
                              tokens_ * kHeads * (2.0 * (kNope + kRope) + kValue),
                     .bf16_flop = tokens_ * projections +
                                  pairs * 2 * kHeads *
                                      (is_prefill ? kNope + kRope + kValue : 2 * kLatent + kRope)};
  ops_.BeginStep(batch);
  Row("mla_attention", cost, 32, [&](int i) {
    ops_.MlaAttention(q, weights[i % weights.size()], position_ids, cos_sin, caches[i % kCaches],
                      batch, 0.1352f, out);
  });
  Synchronize();
  memory_.resize(1);
}

void Bench::Experts() {
  const int64_t choices = 9, rows = tokens_ * choices;
  const Tensor x = Make(DType::kBF16, {tokens_, kHidden});
  const Tensor bias = Make(DType::kF32, {kRouted}, 0.0f);
  std::vector<Tensor> gates;
  // Logits of order one, as a router's are: larger ones saturate, and ties go to few experts.
  const float amplitude = 3.0f / std::sqrt(static_cast<float>(kHidden));
  for (int i = 0; i < 40; ++i) gates.push_back(Make(DType::kBF16, {kRouted, kHidden}, amplitude));
  const RoutingConfig config = {.num_experts_per_tok = 8,
                                .n_group = 8,
                                .topk_group = 4,
                                .norm_topk_prob = true,
                                .routed_scaling_factor = 2.5f,
                                .num_shared_experts = 1};
  const Routes routes = {
      .logits = Make(DType::kF32, {tokens_, kRouted}),
      .experts = Make(DType::kI32, {tokens_, choices}, 0.0f),
      .weights = Make(DType::kF32, {tokens_, choices}),
      .groups = {.rows = Make(DType::kI32, {rows}, 0.0f),
                 .offsets = Make(DType::kI32, {kExperts + 1}, 0.0f),
                 .notes = Make(DType::kI32, {NumGroupNotes(kExperts, rows)}, 0.0f)}};
  Row("route", {.bytes = 2.0 * kRouted * kHidden + 2.0 * tokens_ * kHidden}, 32,
      [&](int i) { ops_.Route(x, gates[i % gates.size()], bias, config, 0, routes); });
  ops_.Route(x, gates[0], bias, config, 0, routes);
  std::vector<int32_t> offsets(kExperts + 1);
  device_.CopyToHost(routes.groups.offsets, offsets.data());
  double used = 0;
  for (int64_t e = 0; e < kExperts; ++e) used += offsets[e + 1] > offsets[e] ? 1 : 0;

  const LinearInput normed = MakeInput(tokens_, kHidden);
  const Tensor gate_up = Make(DType::kBF16, {rows, 2 * kWidth});
  const LinearInput activated = MakeInput(rows, kWidth);
  const Tensor expert_out = Make(DType::kBF16, {rows, kHidden});
  const Tensor out = Make(DType::kBF16, {tokens_, kHidden});
  const std::vector<Weight> w13 = MakeWeights(2 * kWidth, kHidden, kExperts);
  const std::vector<Weight> w2 = MakeWeights(kHidden, kWidth, kExperts);
  Row("experts gate_up_proj",
      {.bytes = used * 2 * kWidth * kHidden + tokens_ * kHidden + rows * 4.0 * kWidth,
       .fp8_flop = 2.0 * rows * 2 * kWidth * kHidden},
      16, [&](int i) {
        ops_.GroupedLinear(normed, routes.groups, w13[i % w13.size()], choices, gate_up);
      });
  Row("swiglu", {.bytes = rows * 5.0 * kWidth}, 32,
      [&](int) { ops_.SwiGlu(gate_up, &routes.groups, activated); });
  Row("experts down_proj",
      {.bytes = used * kHidden * kWidth + rows * (kWidth + 2.0 * kHidden),
       .fp8_flop = 2.0 * rows * kWidth * kHidden},
      16, [&](int i) {
        ops_.GroupedLinear(activated, routes.groups, w2[i % w2.size()], 0, expert_out);
      });
  Row("swiglu, down, combine",
      {.bytes = used * kHidden * kWidth + rows * 4.0 * kWidth + 2.0 * kHidden * tokens_,
       .fp8_flop = 2.0 * rows * kHidden * kWidth},
      16, [&](int i) {
        ops_.DownAndCombine(gate_up, routes, w2[i % w2.size()], false, {activated, expert_out},
                            out);
      });
  Row("combine_experts", {.bytes = 2.0 * kHidden * (rows + tokens_)}, 32,
      [&](int) { ops_.CombineExperts(expert_out, routes, false, out); });
  memory_.resize(1);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Times every operation of a layer at the shapes of DeepSeek-V3 on eight GPUs.",
                    "operation_bench");
  parser.AddSwitch("--json", flags.json, "one object per row");
  parser.Add("--tokens", flags.tokens, "tokens of a step").SplitAtCommas().Between(1, 8192);
  parser.Add("--context", flags.context, "tokens of each sequence when decoding")
      .Between(1, 131072);
  parser.Add("--only", flags.only, "one operation");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  absl::StatusOr<std::unique_ptr<Device>> device = OpenCudaDevice({});
  if (!device.ok()) {
    std::fprintf(stderr, "%s\n", device.status().ToString().c_str());
    return 1;
  }
  Bench bench(**device, flags);
  bench.MeasureCopy();
  for (const int tokens : flags.tokens) bench.Run(tokens);
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
