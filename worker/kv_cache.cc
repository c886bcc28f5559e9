#include "worker/kv_cache.h"

#include <atomic>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/ops.h"

namespace fathom {
namespace {

std::atomic<int64_t> last_kv_cache_id = 0;

}  // namespace

KvCache::KvCache(const KvCacheOptions& options) : options_(options), id_(++last_kv_cache_id) {}

int64_t KvCache::TokenWidth(DType dtype, const ModelConfig& config) {
  if (dtype != DType::kF8E4M3) return config.kv_dim();
  const int64_t blocks = (config.kv_lora_rank + kFp8Block - 1) / kFp8Block;
  return config.kv_lora_rank + blocks * SizeOf(DType::kF32) +
         config.qk_rope_head_dim * SizeOf(DType::kBF16);
}

int64_t KvCache::BlockBytes(const KvCacheOptions& options, const ModelConfig& config) {
  return int64_t{config.num_hidden_layers} * options.block_size *
         TokenWidth(options.dtype, config) * SizeOf(options.dtype);
}

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(const KvCacheOptions& options,
                                                         const ModelConfig& config,
                                                         Device& device) {
  CHECK(options.dtype != DType::kI32);
  CHECK_GT(options.block_size, 0);
  CHECK_GT(options.num_blocks, 0);

  std::unique_ptr<KvCache> cache(new KvCache(options));
  const int64_t layer_bytes = BlockBytes(options, config) / config.num_hidden_layers;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(layer_bytes * options.num_blocks));
    cache->layers_.emplace_back(
        buffer.data(), options.dtype,
        std::initializer_list<int64_t>{options.num_blocks, options.block_size,
                                       TokenWidth(options.dtype, config)});
    cache->buffers_.push_back(std::move(buffer));
  }
  return cache;
}

}  // namespace fathom
