// How long the FP8 linear layers of one DeepSeek-V3 shard (rank 0 of 8) take on this GPU, and what
// share of its memory bandwidth (weights alone) that is: the kernel for few tokens (stream) and the
// one for many (tile). The bandwidth is a device-to-device copy measured in the same run (bytes
// read + written). fp8_torch_bench.py times cuBLASLt's product on the same dense layers.
//
//   fp8_linear_bench [--json | LAYER]   one row per (kernel, layer, batch); random data and routes,
//   weights rotated past the L2

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bench/gpu_timer.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/fp8_stream_sm90.h"
#include "kernels/cuda/fp8_tile_sm90.h"

namespace fathom {
namespace {

constexpr int kLaunches = 30;  // of one graph
constexpr int kRoutings = 5;   // distinct ones among them
constexpr int kRoutedExperts = 256;
constexpr int kChoices = 9;  // eight routed experts and the shared one
constexpr int kMaxBatch = 2048;

struct Layer {
  const char* name;
  int num_matrices;
  int n;
  int k;
  bool gathers;  // its input is by token, not by sorted row
};
constexpr Layer kLayers[] = {{"qkv_a", 1, 2112, 7168, false},
                             {"q_b", 1, 3072, 1536, false},
                             {"o_proj", 1, 7168, 2048, false},
                             {"w13", kRoutedExperts + 1, 512, 7168, true},
                             {"w2", kRoutedExperts + 1, 7168, 256, false}};

// Random e4m3 without NaN or random factors near 0.01, a pattern repeated.
uint8_t* RandomValues(size_t size, std::mt19937& random) {
  std::vector<uint8_t> values(std::min<size_t>(size, (1 << 24) + 4096));
  for (uint8_t& value : values) value = static_cast<uint8_t>(random() % 0x48 | (random() & 0x80));
  auto* data = Allocate<uint8_t>(size);
  for (size_t at = 0; at < size; at += values.size()) {
    CUDA_CHECK(cudaMemcpy(data + at, values.data(), std::min(values.size(), size - at),
                          cudaMemcpyHostToDevice));
  }
  return data;
}
float* RandomScales(size_t size, std::mt19937& random) {
  std::vector<float> values(size);
  for (float& value : values) value = 0.01f + static_cast<float>(random() % 1000) * 1e-5f;
  auto* data = Allocate<float>(size);
  CUDA_CHECK(cudaMemcpy(data, values.data(), size * 4, cudaMemcpyHostToDevice));
  return data;
}

// A step's rows by expert: every token to eight random experts and the shared one.
struct Routing {
  int num_rows = 0;
  int num_experts = 0;  // that have rows
  int num_chunks = 0;
  int* notes = nullptr;
  int* rows = nullptr;
};
Routing MakeRouting(int batch, int max_count, std::mt19937& random) {
  std::vector<std::vector<int>> rows_of(kRoutedExperts + 1);
  std::vector<int> ids(kRoutedExperts);
  std::iota(ids.begin(), ids.end(), 0);
  for (int token = 0; token < batch; ++token) {
    std::shuffle(ids.begin(), ids.end(), random);
    for (int j = 0; j + 1 < kChoices; ++j) rows_of[ids[j]].push_back(token * kChoices + j);
    rows_of[kRoutedExperts].push_back(token * kChoices + kChoices - 1);
  }
  Routing routing;
  std::vector<int> notes(kFirstChunkNote), rows;
  for (int e = 0; e <= kRoutedExperts; ++e) {
    const int count = static_cast<int>(rows_of[e].size());
    routing.num_experts += count > 0 ? 1 : 0;
    for (int begin = 0; begin < count; begin += max_count) {
      const int chunk[] = {e, static_cast<int>(rows.size()) + begin,
                           std::min(max_count, count - begin), 0};
      notes.insert(notes.end(), chunk, chunk + 4);
      ++notes[0];
    }
    rows.insert(rows.end(), rows_of[e].begin(), rows_of[e].end());
  }
  routing.num_rows = static_cast<int>(rows.size());
  routing.num_chunks = notes[0];
  routing.notes = Allocate<int>(notes.size());
  routing.rows = Allocate<int>(rows.size());
  CUDA_CHECK(cudaMemcpy(routing.notes, notes.data(), notes.size() * 4, cudaMemcpyHostToDevice));
  CUDA_CHECK(cudaMemcpy(routing.rows, rows.data(), rows.size() * 4, cudaMemcpyHostToDevice));
  return routing;
}

class Bench {
 public:
  explicit Bench(const cudaDeviceProp& device)
      : sms_(device.multiProcessorCount),
        stream_kernel_(Allocate<char>(Fp8StreamSm90::WorkspaceBytes(sms_)), sms_),
        tile_kernel_(sms_) {
    CUDA_CHECK(cudaStreamCreate(&stream_));
    x_ = RandomValues(size_t{kMaxBatch} * kChoices * 7168, random_);
    x_scales_ = RandomScales(size_t{kMaxBatch} * kChoices * 56, random_);
    out_ = Allocate<__nv_bfloat16>(size_t{kMaxBatch} * kChoices * 7168);
  }

  double CopyGbps() {
    constexpr size_t kBytes = size_t{1400} << 20;
    char* data = Allocate<char>(2 * kBytes);
    CUDA_CHECK(cudaMemset(data, 1, 2 * kBytes));
    const double ms = MedianMs(stream_, 3, 10, [&] {
      CUDA_CHECK(cudaMemcpyAsync(data, data + kBytes, kBytes, cudaMemcpyDeviceToDevice, stream_));
    });
    CUDA_CHECK(cudaFree(data));
    return 2.0 * kBytes / ms / 1e6;
  }

  void Measure(const Layer& layer, double copy_gbps, bool json) {
    const size_t bytes = static_cast<size_t>(layer.n) * layer.k * layer.num_matrices;
    const int sets = layer.num_matrices == 1 ? static_cast<int>(150'000'000 / bytes) + 1 : 1;
    uint8_t* values = RandomValues(bytes * sets, random_);
    float* scales = RandomScales(
        static_cast<size_t>(layer.num_matrices) * ((layer.n + 127) / 128) * (layer.k / 128),
        random_);
    const auto row = [&](const char* kernel, int batch, int max_count, auto launch) {
      std::vector<Routing> routings;
      for (int i = 0; i < kRoutings; ++i) {
        routings.push_back(MakeRouting(batch, max_count, random_));
      }
      const double us = 1e3 / kLaunches * MedianMs(stream_, 3, 10, [&] {
                          for (int i = 0; i < kLaunches; ++i) {
                            launch(values + i % sets * bytes, routings[i % kRoutings]);
                          }
                        });
      double matrices = 0;
      for (const Routing& routing : routings) {
        matrices += layer.num_matrices == 1 ? 1.0 / kRoutings
                                            : static_cast<double>(routing.num_experts) / kRoutings;
        CUDA_CHECK(cudaFree(routing.notes));
        CUDA_CHECK(cudaFree(routing.rows));
      }
      const double gbps = matrices * layer.n * layer.k / us / 1e3;
      const double rows = layer.num_matrices == 1 ? batch : batch * kChoices;
      std::printf(json ? "{\"kernel\":\"%s\",\"layer\":\"%s\",\"batch\":%d,\"matrices\":%.1f,"
                         "\"us\":%.2f,\"gbps\":%.0f,\"share_of_copy\":%.3f,\"tflops\":%.1f}\n"
                       : "%-7s %-8s %6d %9.1f %10.2f %8.0f %8.2f %8.0f\n",
                  kernel, layer.name, batch, matrices, us, gbps, gbps / copy_gbps,
                  2e-6 * rows * layer.n * layer.k / us);
    };
    for (int batch : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
      const int max_count = std::min(16, batch);
      row("stream", batch, max_count, [&](const uint8_t* weights, const Routing& routing) {
        Stream(layer, weights, scales, batch, max_count, routing);
      });
    }
    for (int batch : {32, 64, 128, 256, 512, 1024, 2048}) {
      const int max_count = RowsPerChunk(int64_t{batch} * kChoices, kRoutedExperts + 1);
      if (layer.num_matrices > 1 && max_count < 32) continue;
      row("tile", batch, max_count, [&](const uint8_t* weights, const Routing& routing) {
        Tile(layer, weights, scales, batch, routing);
      });
    }
    CUDA_CHECK(cudaFree(values));
    CUDA_CHECK(cudaFree(scales));
  }

 private:
  void Stream(const Layer& layer, const uint8_t* values, const float* scales, int batch,
              int max_count, const Routing& routing) {
    const Fp8StreamSm90::Weight weight = {values, scales, layer.num_matrices, layer.n, layer.k};
    const Fp8StreamSm90::Output out = {out_, Fp8StreamSm90::OutputType::kBf16, layer.n};
    Fp8StreamSm90::Input x = {x_, x_scales_, batch, layer.k};
    if (layer.num_matrices == 1) {
      stream_kernel_.Linear(x, weight, out, stream_);
      return;
    }
    if (!layer.gathers) x.rows = routing.num_rows;
    stream_kernel_.GroupedLinear(x,
                                 {.notes = routing.notes,
                                  .rows = layer.gathers ? routing.rows : nullptr,
                                  .divisor = kChoices,
                                  .max_count = max_count,
                                  .complete_early = !layer.gathers,
                                  .num_rows = routing.num_rows,
                                  .max_chunks = routing.num_chunks},
                                 weight, out, stream_);
  }

  void Tile(const Layer& layer, const uint8_t* values, const float* scales, int batch,
            const Routing& routing) {
    const Fp8TileSm90::Weight weight = {reinterpret_cast<const __nv_fp8_e4m3*>(values), scales,
                                        layer.num_matrices, layer.n, layer.k};
    const Fp8TileSm90::Output out = {out_, layer.n};
    Fp8TileSm90::Input x = {reinterpret_cast<const __nv_fp8_e4m3*>(x_), x_scales_, batch, layer.k,
                            layer.k / 128};
    if (layer.num_matrices == 1) {
      tile_kernel_.Linear(x, weight, out, stream_);
      return;
    }
    if (!layer.gathers) x.rows = routing.num_rows;
    tile_kernel_.GroupedLinear(
        x, {.notes = routing.notes, .rows = routing.rows, .divisor = layer.gathers ? kChoices : 0},
        weight, out, stream_);
  }

  int sms_;
  Fp8StreamSm90 stream_kernel_;
  Fp8TileSm90 tile_kernel_;
  cudaStream_t stream_ = nullptr;
  std::mt19937 random_{20261123};
  uint8_t* x_ = nullptr;
  float* x_scales_ = nullptr;
  __nv_bfloat16* out_ = nullptr;
};

int Main(bool json, const char* only) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  if (!Fp8StreamSm90::Supports(device)) {
    std::fprintf(stderr, "%s is no Hopper GPU: nothing to measure\n", device.name);
    return 1;
  }
  Bench bench(device);
  const double copy_gbps = bench.CopyGbps();
  if (!json) {
    std::printf("%s, copy %.0f GB/s\n%-7s %-8s %6s %9s %10s %8s %8s %8s\n", device.name, copy_gbps,
                "kernel", "layer", "batch", "matrices", "us", "GB/s", "of copy", "TFLOP/s");
  }
  for (const Layer& layer : kLayers) {
    if (only == nullptr || std::strcmp(only, layer.name) == 0) {
      bench.Measure(layer, copy_gbps, json);
    }
  }
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  const bool json = argc > 1 && std::strcmp(argv[1], "--json") == 0;
  return fathom::Main(json, argc > 1 && !json ? argv[1] : nullptr);
}
