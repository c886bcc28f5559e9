#include "worker/kv_cache.h"

#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {

int64_t KvCache::BlockBytes(const KvCacheOptions& options, const ModelConfig& config) {
  return int64_t{config.num_hidden_layers} * options.block_size * config.kv_dim() *
         SizeOf(options.dtype);
}

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(const KvCacheOptions& options,
                                                         const ModelConfig& config,
                                                         Device& device) {
  CHECK(options.dtype == DType::kF32 || options.dtype == DType::kBF16);
  CHECK_GT(options.block_size, 0);
  CHECK_GT(options.num_blocks, 0);

  std::unique_ptr<KvCache> cache(new KvCache(options));
  const int64_t layer_bytes = BlockBytes(options, config) / config.num_hidden_layers;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(layer_bytes * options.num_blocks));
    cache->layers_.emplace_back(
        buffer.data(), options.dtype,
        std::initializer_list<int64_t>{options.num_blocks, options.block_size, config.kv_dim()});
    cache->buffers_.push_back(std::move(buffer));
  }
  return cache;
}

}  // namespace fathom
