// How fast the CPU's linear layers and attention are, beside what this machine could do: a plain
// walk through memory and a loop of nothing but fused multiply-adds, measured in the same run on as
// many threads. Each figure is the best of several runs, the one that was disturbed least.
//
//   kernel_bench [--threads N] [--seconds S] [--json]

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/flag_parser.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/device.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/kernel_bench.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Multiply-adds that wait for nothing: twelve sums hide the latency of each. They begin
// differently, or the compiler would compute one of them only. Returns the number of multiply-adds.
double MultiplyAddLoop(int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto a = hn::Set(d, 0.999f);
  const auto b = hn::Set(d, 0.001f);
  auto s0 = hn::Set(d, 0.0f), s1 = hn::Set(d, 0.1f), s2 = hn::Set(d, 0.2f);
  auto s3 = hn::Set(d, 0.3f), s4 = hn::Set(d, 0.4f), s5 = hn::Set(d, 0.5f);
  auto s6 = hn::Set(d, 0.6f), s7 = hn::Set(d, 0.7f), s8 = hn::Set(d, 0.8f);
  auto s9 = hn::Set(d, 0.9f), s10 = hn::Set(d, 1.0f), s11 = hn::Set(d, 1.1f);
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = hn::MulAdd(s0, a, b);
    s1 = hn::MulAdd(s1, a, b);
    s2 = hn::MulAdd(s2, a, b);
    s3 = hn::MulAdd(s3, a, b);
    s4 = hn::MulAdd(s4, a, b);
    s5 = hn::MulAdd(s5, a, b);
    s6 = hn::MulAdd(s6, a, b);
    s7 = hn::MulAdd(s7, a, b);
    s8 = hn::MulAdd(s8, a, b);
    s9 = hn::MulAdd(s9, a, b);
    s10 = hn::MulAdd(s10, a, b);
    s11 = hn::MulAdd(s11, a, b);
  }
  const auto t0 = hn::Add(hn::Add(s0, s1), hn::Add(s2, s3));
  const auto t1 = hn::Add(hn::Add(s4, s5), hn::Add(s6, s7));
  const auto t2 = hn::Add(hn::Add(s8, s9), hn::Add(s10, s11));
  *sink = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(t0, t1), t2)));
  return 12.0 * static_cast<double>(hn::Lanes(d) * rounds);
}

// Adds up every lane of memory. `count` is a multiple of 64 floats.
float ReadLoop(const float* memory, int64_t count) {
  const hn::CappedTag<float, 16> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (int64_t i = 0; i < count; i += 4 * lanes) {
    s0 = hn::Add(s0, hn::Load(d, memory + i));
    s1 = hn::Add(s1, hn::Load(d, memory + i + lanes));
    s2 = hn::Add(s2, hn::Load(d, memory + i + 2 * lanes));
    s3 = hn::Add(s3, hn::Load(d, memory + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(MultiplyAddLoop);
HWY_EXPORT(ReadLoop);

struct Options {
  int num_threads = 1;
  double seconds_per_row = 0.5;
  bool json = false;
};

// The least seconds that `body` took; it is told the number of the run.
double BestSeconds(double total_seconds, const std::function<void(int run)>& body) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
  };
  body(0);
  double best = 1e30;
  const Clock::time_point start = Clock::now();
  for (int run = 1; run < 4 || seconds(Clock::now() - start) < total_seconds; ++run) {
    const Clock::time_point before = Clock::now();
    body(run);
    best = std::min(best, seconds(Clock::now() - before));
  }
  return best;
}

class KernelBench {
 public:
  explicit KernelBench(const Options& options)
      : options_(options),
        pool_(options.num_threads),
        device_(*OpenCpuDevice({.num_threads = options.num_threads})) {}

  void MeasureLimits() {
    constexpr int64_t kFloats = int64_t{64} << 20;  // 256 MB, beyond every cache
    const Tensor memory = Random(DType::kF32, {kFloats});
    const auto* floats = memory.data<float>();
    std::vector<float> sinks(static_cast<size_t>(options_.num_threads) * 16);
    const double read_seconds = BestSeconds(options_.seconds_per_row, [&](int) {
      pool_.ParallelFor(kFloats / 64, 1, [&](int range, int64_t begin, int64_t end) {
        sinks[static_cast<size_t>(range) * 16] =
            HWY_DYNAMIC_DISPATCH(ReadLoop)(floats + begin * 64, (end - begin) * 64);
      });
    });
    read_bytes_per_second_ = kFloats * 4 / read_seconds;

    const Tensor half = memory.Slice(0, 0, kFloats / 2);
    const Tensor other = memory.Slice(0, kFloats / 2, kFloats);
    const double copy_seconds = BestSeconds(options_.seconds_per_row,
                                            [&](int) { device_->CopyFromHost(half.raw(), other); });

    constexpr int64_t kRounds = 1 << 20;
    double multiply_adds = 0.0;
    const double fma_seconds = BestSeconds(options_.seconds_per_row, [&](int) {
      pool_.ParallelFor(options_.num_threads, 1, [&](int range, int64_t, int64_t) {
        multiply_adds =
            HWY_DYNAMIC_DISPATCH(MultiplyAddLoop)(kRounds, &sinks[static_cast<size_t>(range) * 16]);
      });
    });
    flops_per_second_ = 2 * multiply_adds * options_.num_threads / fma_seconds;
    std::fprintf(stderr,
                 "%d threads; limits: read %.1f GB/s, copy (one thread) %.1f GB copied/s, "
                 "multiply-add %.1f GFLOP/s\n",
                 options_.num_threads, read_bytes_per_second_ * 1e-9,
                 kFloats * 2 / copy_seconds * 1e-9, flops_per_second_ * 1e-9);
  }

  // x in F32, or quantised where `x_type` is F8_E4M3.
  void MeasureLinear(DType x_type, DType weight_type, int64_t rows, int64_t outputs,
                     int64_t inputs) {
    LinearInput x = Random(x_type, {rows, inputs});
    if (x_type == DType::kF8E4M3) {
      x.scales = Random(DType::kF32, {rows, (inputs + kFp8Block - 1) / kFp8Block});
    }
    const Tensor out = Random(DType::kF32, {rows, outputs});
    // Different weights in turn, as in the layers of a model, so that none stays in a cache.
    const int64_t copies =
        std::max<int64_t>(1, (int64_t{256} << 20) / (outputs * inputs * SizeOf(weight_type)));
    const Weight weights = RandomWeight(weight_type, {copies, outputs, inputs});
    const auto weight = [&](int run) {
      Weight one = weights;
      one.values = weights.values[run % copies];
      if (weights.scale_inv.present()) one.scale_inv = weights.scale_inv[run % copies];
      return one;
    };
    const double seconds = BestSeconds(
        options_.seconds_per_row, [&](int run) { device_->ops().Linear(x, weight(run), out); });
    Print(x.quantized() ? "Linear, W8A8" : "Linear", weight_type,
          absl::StrCat("M=", rows, " N=", outputs, " K=", inputs),
          outputs * inputs * SizeOf(weight_type) + x.values.num_bytes() + out.num_bytes(),
          2 * rows * outputs * inputs, seconds);
    buffers_.clear();
  }

  // Every expert of 32 takes the same number of rows.
  void MeasureGroupedLinear(DType weight_type, int64_t rows_per_expert, int64_t outputs,
                            int64_t inputs) {
    constexpr int64_t kExperts = 32;
    const int64_t rows = kExperts * rows_per_expert;
    const Tensor x = Random(DType::kF32, {rows, inputs});
    const Tensor out = Random(DType::kF32, {rows, outputs});
    const ExpertGroups groups = {.rows = Allocate(DType::kI32, {rows}),
                                 .offsets = Allocate(DType::kI32, {kExperts + 1}),
                                 .notes = {}};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = i % rows_per_expert * kExperts + i / rows_per_expert;
      groups.rows.data<int32_t>()[i] = static_cast<int32_t>(row);
    }
    for (int64_t e = 0; e <= kExperts; ++e) {
      groups.offsets.data<int32_t>()[e] = static_cast<int32_t>(e * rows_per_expert);
    }
    const Weight weight = RandomWeight(weight_type, {kExperts, outputs, inputs});
    const double seconds = BestSeconds(options_.seconds_per_row, [&](int) {
      device_->ops().GroupedLinear(x, groups, weight, 1, out);
    });
    Print("GroupedLinear", weight_type,
          absl::StrCat("E=32 M/E=", rows_per_expert, " N=", outputs, " K=", inputs),
          weight.values.num_bytes() + x.num_bytes() + out.num_bytes(), 2 * rows * outputs * inputs,
          seconds);
    buffers_.clear();
  }

  // One sequence of V3's sizes, its last `tokens` tokens, 16 heads.
  void MeasureAttention(DType cache_type, int64_t tokens, int64_t context) {
    constexpr int64_t kHeads = 16;
    constexpr int64_t kKvLoraRank = 512;
    constexpr int64_t kNopeDim = 128;
    constexpr int64_t kRopeDim = 64;
    constexpr int64_t kVDim = 128;
    constexpr int64_t kBlockSize = 16;
    const int64_t num_blocks = (context + kBlockSize - 1) / kBlockSize;
    const Tensor q = Random(DType::kF32, {tokens, kHeads, kNopeDim + kRopeDim});
    const MlaWeights weights = {Random(DType::kF32, {kHeads, kKvLoraRank, kNopeDim}),
                                Random(DType::kF32, {kHeads, kVDim, kKvLoraRank})};
    const Tensor positions = Allocate(DType::kI32, {tokens});
    const Tensor cos_sin = Random(DType::kF32, {context, kRopeDim / 2, 2});
    const Tensor out = Random(DType::kF32, {tokens, kHeads * kVDim});
    const int64_t width =
        cache_type == DType::kF8E4M3 ? kKvLoraRank + 16 + 2 * kRopeDim : kKvLoraRank + kRopeDim;
    const Tensor cache = Random(cache_type, {num_blocks, kBlockSize, width});
    const AttentionBatch batch = {.block_tables = Allocate(DType::kI32, {1, num_blocks}),
                                  .query_start = Allocate(DType::kI32, {2}),
                                  .context_lens = Allocate(DType::kI32, {1}),
                                  .block_size = kBlockSize};
    for (int64_t i = 0; i < num_blocks; ++i) {
      batch.block_tables.data<int32_t>()[i] = static_cast<int32_t>(num_blocks - 1 - i);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      positions.data<int32_t>()[t] = static_cast<int32_t>(context - tokens + t);
    }
    batch.query_start.data<int32_t>()[1] = static_cast<int32_t>(tokens);
    batch.context_lens.data<int32_t>()[0] = static_cast<int32_t>(context);
    const double seconds = BestSeconds(options_.seconds_per_row, [&](int) {
      device_->ops().MlaAttention(q, weights, positions, cos_sin, cache, batch, 0.01f, out);
    });
    const int64_t pairs = tokens * context - tokens * (tokens - 1) / 2;  // token and position
    const int64_t weight_elements = kHeads * kKvLoraRank * (kNopeDim + kVDim);
    Print("MlaAttention", cache_type, absl::StrCat("A=16 T=", tokens, " context=", context),
          cache.num_bytes() + 4 * weight_elements + q.num_bytes() + out.num_bytes(),
          2 * (pairs * kHeads * (2 * kKvLoraRank + kRopeDim) + tokens * weight_elements), seconds);
    buffers_.clear();
  }

 private:
  Tensor Allocate(DType dtype, std::initializer_list<int64_t> shape) {
    const int64_t num_bytes = Tensor(nullptr, dtype, shape).num_bytes();
    auto buffer = device_->Allocate(num_bytes);
    CHECK(buffer.ok()) << buffer.status();
    buffers_.push_back(*std::move(buffer));
    return Tensor(buffers_.back().data(), dtype, shape);
  }

  // Small numbers of both signs, none of them subnormal or NaN in any type.
  Tensor Random(DType dtype, std::initializer_list<int64_t> shape) {
    const Tensor tensor = Allocate(dtype, shape);
    uint32_t state = 1;
    for (int64_t i = 0; i < tensor.num_elements(); ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int32_t>(state) >> 16) * 0x1p-15f;
      if (dtype == DType::kF32) tensor.data<float>()[i] = value;
      if (dtype == DType::kBF16) tensor.data<uint16_t>()[i] = ToBFloat16(value).bits;
      if (dtype == DType::kF8E4M3) tensor.data<uint8_t>()[i] = (state >> 16 & 0xbf) | 0x10;
    }
    return tensor;
  }

  Weight RandomWeight(DType dtype, std::initializer_list<int64_t> shape) {
    Weight weight = {.values = Random(dtype, shape)};
    if (dtype == DType::kF8E4M3) {
      const int64_t block_rows = (weight.values.dim(1) + kFp8Block - 1) / kFp8Block;
      const int64_t block_columns = (weight.values.dim(2) + kFp8Block - 1) / kFp8Block;
      weight.scale_inv = Random(DType::kF32, {weight.values.dim(0), block_rows, block_columns});
    }
    return weight;
  }

  void Print(const std::string& kernel, DType dtype, const std::string& shape, int64_t bytes,
             int64_t flops, double seconds) const {
    const double bytes_per_second = static_cast<double>(bytes) / seconds;
    const double flops_per_second = static_cast<double>(flops) / seconds;
    const double bandwidth_share = bytes_per_second / read_bytes_per_second_;
    const double flops_share = flops_per_second / flops_per_second_;
    std::printf(options_.json ? "{\"kernel\":\"%s\",\"dtype\":\"%s\",\"shape\":\"%s\","
                                "\"microseconds\":%.1f,\"gigabytes_per_second\":%.2f,"
                                "\"bandwidth_share\":%.3f,\"gigaflops_per_second\":%.2f,"
                                "\"flops_share\":%.3f}\n"
                              : "%-14s %-8s %-26s %10.1f us %7.2f GB/s (%3.0f %%) "
                                "%8.2f GFLOP/s (%3.0f %%)\n",
                kernel.c_str(), NameOf(dtype), shape.c_str(), seconds * 1e6,
                bytes_per_second * 1e-9, bandwidth_share * (options_.json ? 1 : 100),
                flops_per_second * 1e-9, flops_share * (options_.json ? 1 : 100));
    std::fflush(stdout);
  }

  const Options options_;
  ThreadPool pool_;
  std::unique_ptr<Device> device_;
  std::vector<Buffer> buffers_;
  double read_bytes_per_second_ = 1.0;
  double flops_per_second_ = 1.0;
};

int Main(int argc, char** argv) {
  FlagParser parser("Measures the CPU's linear layers and attention beside the machine's limits.",
                    "kernel_bench");
  Options options;
  parser.Add("--threads", options.num_threads, "threads that share each operation")
      .Between(1, 1024);
  parser.Add("--seconds", options.seconds_per_row, "time for each row");
  parser.AddSwitch("--json", options.json, "print one JSON object per row");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;

  KernelBench bench(options);
  bench.MeasureLimits();
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    for (int64_t rows : {1, 4, 16, 64, 256}) {
      bench.MeasureLinear(DType::kF32, dtype, rows, 2048, 7168);
    }
  }
  for (int64_t rows : {1, 64}) {
    bench.MeasureLinear(DType::kF8E4M3, DType::kF8E4M3, rows, 2048, 7168);
  }
  for (DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    for (int64_t rows : {1, 8, 32}) bench.MeasureGroupedLinear(dtype, rows, 512, 7168);
  }
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    bench.MeasureAttention(dtype, 1, 8192);
    bench.MeasureAttention(dtype, 256, 2048);
  }
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
#endif  // HWY_ONCE
