// How long one layer's decoding attention takes on this GPU, and what share of its memory bandwidth
// that is. The bandwidth is a device-to-device copy measured in the same run (bytes read +
// written).
//
//   mla_decode_bench [--json]     one row per (cache, batch, context); random data, launches go
//   through so many blocks of the caches that none is in the L2 when its turn comes again
//
// "early": started as the forward pass starts it, which asks for the cache of earlier steps while
// the kernel before still runs.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bench/gpu_timer.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_decode_sm90.h"

namespace fathom {
namespace {

constexpr int kLayers = 60;  // launches of one graph
constexpr int kCaches = 4;   // distinct layers of cache among them
constexpr int kBlockSize = 64;

struct Cache {
  const char* name;
  MlaCacheType type;
  int64_t token_bytes;
};
constexpr Cache kKinds[] = {{"BF16", MlaCacheType::kBf16, 576 * 2},
                            {"FP8", MlaCacheType::kFp8, 656}};

struct Row {
  int batch;
  int context_len;
  double flash_mla_us;  // FlashMLA dense decode at 16 heads on one H200, BF16 cache
};
constexpr Row kRows[] = {{1, 2304, 16.3},    {8, 2304, 18.2},  {64, 2304, 51.5},
                         {256, 2304, 168.5}, {1, 32768, 44.5}, {1, 131072, 70.5}};

template <typename T>
void Upload(T* target, const std::vector<T>& values) {
  CUDA_CHECK(cudaMemcpy(target, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
}

int Main(bool json) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  if (!MlaDecodeSm90::Supports(device)) {
    std::fprintf(stderr, "%s is no Hopper GPU: nothing to measure\n", device.name);
    return 1;
  }
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  const int64_t num_blocks = 256 * 36 + 1;
  const int64_t cache_bytes = num_blocks * kBlockSize * kKinds[0].token_bytes;
  char* caches = Allocate<char>(kCaches * cache_bytes);

  std::mt19937 random(20261123);
  {  // random numbers of both signs and magnitudes near 1, read as BF16, F32 or E4M3
    std::vector<uint16_t> values(1 << 24);
    for (uint16_t& value : values) value = static_cast<uint16_t>(0x3E80 | (random() & 0x8137));
    for (int64_t at = 0; at < kCaches * cache_bytes; at += values.size() * 2) {
      const int64_t bytes = std::min<int64_t>(values.size() * 2, kCaches * cache_bytes - at);
      CUDA_CHECK(cudaMemcpy(caches + at, values.data(), bytes, cudaMemcpyHostToDevice));
    }
  }
  const double copy_ms = MedianMs(stream, 3, 20, [&] {
    CUDA_CHECK(cudaMemcpyAsync(caches, caches + 2 * cache_bytes, 2 * cache_bytes,
                               cudaMemcpyDeviceToDevice, stream));
  });
  const double copy_gbps = 4.0 * cache_bytes / copy_ms / 1e6;

  const int sms = device.multiProcessorCount;
  char* workspace = Allocate<char>(MlaDecodeSm90::WorkspaceBytes(kLayers, sms));
  auto* queries = Allocate<__nv_bfloat16>(256 * 16 * 576);
  auto* out = Allocate<__nv_bfloat16>(256 * 16 * 512);
  CUDA_CHECK(cudaMemcpy(queries, caches, 256 * 16 * 576 * 2, cudaMemcpyDeviceToDevice));
  int* tables = Allocate<int>(2 * num_blocks);
  int* lens = Allocate<int>(256);
  const MlaDecodeSm90 decode(workspace, kLayers, sms);
  // All blocks in random order, twice, so that a launch may begin anywhere.
  std::vector<int> blocks_of_all(num_blocks);
  std::iota(blocks_of_all.begin(), blocks_of_all.end(), 0);
  std::shuffle(blocks_of_all.begin(), blocks_of_all.end(), random);
  blocks_of_all.insert(blocks_of_all.end(), blocks_of_all.begin(), blocks_of_all.end());
  Upload(tables, blocks_of_all);

  if (!json) {
    std::printf("%s, copy %.0f GB/s; one layer, 16 heads\n", device.name, copy_gbps);
    std::printf("%-6s %6s %8s %10s %10s %10s %10s %8s %14s\n", "cache", "batch", "context", "us",
                "early us", "GB/s", "of copy", "floor us", "FlashMLA us");
  }
  for (const Cache& cache : kKinds) {
    std::vector<MlaDecodeSm90::CacheMap> maps;
    for (int i = 0; i < kCaches; ++i) {
      maps.push_back(
          MlaDecodeSm90::MapCache({caches + i * cache_bytes, cache.type, num_blocks, kBlockSize}));
    }
    for (const Row& row : kRows) {
      const int blocks = (row.context_len + kBlockSize - 1) / kBlockSize;
      Upload(lens, std::vector<int>(row.batch, row.context_len));
      const auto measure = [&](MlaDecodeSm90::Start start) {
        const double ms = MedianMs(stream, 3, 20, [&] {
          decode.Schedule({.count = row.batch, .context_lens = lens}, stream);
          for (int layer = 0; layer < kLayers; ++layer) {
            const int64_t first = int64_t{layer} * row.batch * blocks % num_blocks;
            decode.Run(maps[layer % kCaches],
                       {.index = layer,
                        .num_rows = row.batch,
                        .q_latent = queries,
                        .q_rope = queries + 256 * 16 * 512,
                        .block_tables = tables + first,
                        .max_blocks = blocks,
                        .scale = 0.1352337788608801f / 8,
                        .out = out,
                        .start = start},
                       stream);
          }
        });
        return 1e3 / kLayers * ms;
      };
      const double us = measure(MlaDecodeSm90::Start::kAfterPredecessors);
      const double early_us = measure(MlaDecodeSm90::Start::kEarly);
      const double bytes = static_cast<double>(row.batch) * row.context_len * cache.token_bytes;
      const double gbps = bytes / us / 1e3;
      const double floor_us = bytes / copy_gbps / 1e3;
      if (json) {
        std::printf(
            "{\"cache\":\"%s\",\"batch\":%d,\"context\":%d,\"us\":%.2f,\"early_us\":%.2f,"
            "\"gbps\":%.0f,\"share_of_copy\":%.3f,\"floor_us\":%.2f,\"flash_mla_us\":%.1f}\n",
            cache.name, row.batch, row.context_len, us, early_us, gbps, gbps / copy_gbps, floor_us,
            row.flash_mla_us);
      } else {
        std::printf("%-6s %6d %8d %10.2f %10.2f %10.0f %9.0f%% %8.1f %14.1f\n", cache.name,
                    row.batch, row.context_len, us, early_us, gbps, 100 * gbps / copy_gbps,
                    floor_us, row.flash_mla_us);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  return fathom::Main(argc > 1 && std::strcmp(argv[1], "--json") == 0);
}
