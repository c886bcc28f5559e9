// How long one layer's attention of prefill chunks takes on this GPU: expansion of the cached
// latents, attention, and both. FLOP/s count the products that causality leaves: 2 · (192 + 128)
// per query, visible key and head, and 2 · 512 · 256 per token and head for the expansion.
//
//   mla_prefill_bench [--json]     one row per (chunk, earlier tokens); random data

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "bench/gpu_timer.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_prefill_sm90.h"

namespace fathom {
namespace {

constexpr int kLayers = 32;   // of one graph
constexpr int kWeights = 16;  // distinct layers of weights among them, more than the L2 holds
constexpr int kCaches = 4;    // the same of cache
constexpr int kMaxContext = 66'560;
constexpr int kBlockSize = 64;
constexpr int kHeads = MlaPrefillSm90::kHeads;

struct Row {
  int sequences;
  int chunk;
  int earlier;
  MlaCacheType cache = MlaCacheType::kBf16;
};
constexpr Row kRows[] = {{1, 2048, 0},     {1, 2048, 0, MlaCacheType::kFp8},
                         {1, 2048, 2048},  {1, 2048, 14336},
                         {1, 2048, 63488}, {1, 8192, 0},
                         {4, 2048, 0},     {8, 256, 0},
                         {1, 512, 0},      {1, 128, 0}};

template <typename T>
T* Upload(const std::vector<T>& values) {
  T* data = Allocate<T>(values.size());
  CUDA_CHECK(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

// BF16 of both signs: normal numbers of this deviation.
__nv_bfloat16* RandomBf16(size_t count, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<__nv_bfloat16> values(1 << 20);
  for (auto& value : values) value = __float2bfloat16(normal(random));
  auto* data = Allocate<__nv_bfloat16>(count);
  for (size_t at = 0; at < count; at += values.size()) {
    CUDA_CHECK(cudaMemcpy(data + at, values.data(), std::min(values.size(), count - at) * 2,
                          cudaMemcpyHostToDevice));
  }
  return data;
}

int Main(bool json) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  if (!MlaPrefillSm90::Supports(device)) {
    std::fprintf(stderr, "%s is no Hopper GPU: nothing to measure\n", device.name);
    return 1;
  }
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  std::mt19937 random(20261123);
  const MlaPrefillSm90::Limits limits = {.max_tokens = 8192, .max_context_tokens = kMaxContext};
  char* workspace = Allocate<char>(MlaPrefillSm90::WorkspaceBytes(limits));
  const MlaPrefillSm90 prefill(workspace, limits, device.multiProcessorCount);
  const int64_t num_blocks = kMaxContext / kBlockSize;
  const int64_t cache_elements = num_blocks * kBlockSize * 576;
  __nv_bfloat16* caches = RandomBf16(kCaches * cache_elements, 1.0f, random);
  unsigned char* fp8_cache = Allocate<unsigned char>(num_blocks * kBlockSize * 656);
  CUDA_CHECK(cudaMemset(fp8_cache, 0x30, num_blocks * kBlockSize * 656));
  const size_t weight_elements = size_t{kHeads} * 512 * 128;
  __nv_bfloat16* weights = RandomBf16(2 * kWeights * weight_elements, 0.044f, random);
  __nv_bfloat16* q = RandomBf16(size_t{8192} * kHeads * 192, 1.0f, random);
  const float* cos_sin = Upload(std::vector<float>(size_t{kMaxContext} * 64, 0.7f));
  auto* out = Allocate<unsigned char>(size_t{8192} * kHeads * 128);
  auto* out_scales = Allocate<float>(8192 * kHeads);

  if (!json) {
    std::printf("%s; one layer, 16 heads, %.0f MB of scratch\n", device.name,
                MlaPrefillSm90::WorkspaceBytes(limits) / 1e6);
    std::printf("%4s %6s %8s %5s %9s %9s %11s %9s %11s\n", "seqs", "chunk", "earlier", "cache",
                "all us", "expand us", "TFLOP/s", "attn us", "TFLOP/s");
  }
  for (const Row& row : kRows) {
    const int context = row.earlier + row.chunk;
    const int blocks = (context + kBlockSize - 1) / kBlockSize;
    std::vector<int> table(static_cast<size_t>(row.sequences) * blocks), starts, contexts,
        positions;
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int>(i);
    std::shuffle(table.begin(), table.end(), random);
    for (int s = 0; s <= row.sequences; ++s) starts.push_back(s * row.chunk);
    for (int s = 0; s < row.sequences; ++s) {
      contexts.push_back(context);
      for (int i = 0; i < row.chunk; ++i) positions.push_back(row.earlier + i);
    }
    int* device_table = Upload(table);
    int* device_starts = Upload(starts);
    int* device_contexts = Upload(contexts);
    int* device_positions = Upload(positions);
    const MlaPrefillSm90::Step step = prefill.Schedule({.num_sequences = row.sequences,
                                                        .query_start = device_starts,
                                                        .context_lens = device_contexts,
                                                        .host_query_start = starts.data(),
                                                        .host_context_lens = contexts.data()},
                                                       stream);
    const bool fp8 = row.cache == MlaCacheType::kFp8;
    const auto measure = [&](MlaPrefillSm90::Parts parts) {
      return 1e3 *
             MedianMs(stream, 2, 7,
                      [&] {
                        for (int i = 0; i < kLayers; ++i) {
                          const int which = i % kWeights;
                          const void* cache = fp8 ? static_cast<const void*>(fp8_cache)
                                                  : caches + i % kCaches * cache_elements;
                          prefill.Run(step, {cache, row.cache, num_blocks, kBlockSize},
                                      {.q = q,
                                       .w_uk = weights + 2 * which * weight_elements,
                                       .w_uv = weights + (2 * which + 1) * weight_elements,
                                       .positions = device_positions,
                                       .cos_sin = cos_sin,
                                       .block_tables = device_table,
                                       .max_blocks = blocks,
                                       .scale = 0.07f,
                                       .out_fp8 = out,
                                       .out_scales = out_scales,
                                       .parts = parts},
                                      stream);
                        }
                      }) /
             kLayers;
    };
    const double all = measure(MlaPrefillSm90::Parts::kAll);
    const double expand = measure(MlaPrefillSm90::Parts::kExpansion);
    const double attention = measure(MlaPrefillSm90::Parts::kAttention);
    const double pairs = static_cast<double>(row.sequences) * row.chunk *
                         (row.earlier + (row.chunk + 1) / 2.0) * kHeads;
    const double attention_tflops = pairs * 2 * 320 / attention / 1e6;
    const double expand_tflops =
        static_cast<double>(row.sequences) * context * kHeads * 2 * 512 * 256 / expand / 1e6;
    std::printf(json ? "{\"sequences\":%d,\"chunk\":%d,\"earlier\":%d,\"cache\":\"%s\",\"us\":%.1f,"
                       "\"expand_us\":%.1f,\"expand_tflops\":%.0f,\"attention_us\":%.1f,"
                       "\"attention_tflops\":%.0f}\n"
                     : "%4d %6d %8d %5s %9.1f %9.1f %11.0f %9.1f %11.0f\n",
                row.sequences, row.chunk, row.earlier, fp8 ? "fp8" : "bf16", all, expand,
                expand_tflops, attention, attention_tflops);
    for (int* data : {device_table, device_starts, device_contexts, device_positions}) {
      CUDA_CHECK(cudaFree(data));
    }
  }
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  return fathom::Main(argc > 1 && std::strcmp(argv[1], "--json") == 0);
}
