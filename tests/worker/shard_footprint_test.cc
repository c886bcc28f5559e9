// The plan of a shard against what its loading really allocates.
#include <gtest/gtest.h>

#include <string>

#include "tests/worker/counting_device.h"
#include "tests/worker/golden.h"
#include "worker/kv_cache.h"
#include "worker/model_shard.h"

namespace fathom {
namespace {

struct Case {
  const char* model;
  ShardLayoutOptions layout;
  ModelShardOptions options;
};

class ShardFootprintTest : public testing::TestWithParam<Case> {};

TEST_P(ShardFootprintTest, IsWhatIsAllocatedToTheByte) {
  const auto& [model, layout_options, options] = GetParam();
  const auto config = *ReadModelConfig(GoldenCheckpoint(model));
  const auto layout = *ShardLayout::Create(layout_options, config);
  const auto checkpoint = *Checkpoint::Open(GoldenCheckpoint(model));
  CheckpointWeights source(*checkpoint);
  CountingDevice device;
  const auto plan = *ModelShard::Plan(options, config, layout, source, device);

  int64_t bytes_done = 0, bytes_total = 0, weights_peak_bytes = 0;
  const auto shard =
      ModelShard::Load(options, config, layout, source, device, [&](int64_t done, int64_t total) {
        EXPECT_GT(done, bytes_done);
        EXPECT_LE(done, total);
        bytes_done = done;
        bytes_total = total;
        weights_peak_bytes = device.peak_bytes();
      });
  ASSERT_TRUE(shard.ok()) << shard.status();
  EXPECT_EQ(device.live_bytes(), plan.weight_bytes + plan.activation_bytes);
  EXPECT_EQ(bytes_done, bytes_total);

  // While loading there is at most one more slice of a tensor: the widest linear layer's, as it is
  // stored, in BF16 at most, and in F32.
  int64_t widest = 0;
  for (const auto& [name, entry] : checkpoint->tensors()) {
    if (name.ends_with("proj.weight") || name.ends_with("mqa.weight")) {
      widest = std::max(widest, entry.info->shape[0] * entry.info->shape[1]);
    }
  }
  EXPECT_LE(weights_peak_bytes, plan.weight_bytes + (2 + 4) * widest);
}

constexpr ModelShardOptions kSmall = {
    .max_tokens_per_step = 64, .max_logit_rows = 16, .max_model_len = 256};
constexpr ModelShardOptions With(DType dtype, Quantization quantization) {
  ModelShardOptions options = kSmall;
  options.dtype = dtype;
  options.quantization = quantization;
  return options;
}

INSTANTIATE_TEST_SUITE_P(
    Shards, ShardFootprintTest,
    testing::Values(
        Case{"v3_tiny", {}, kSmall}, Case{"v3_tiny", {.rank = 0, .world_size = 8}, kSmall},
        Case{"v3_tiny", {.rank = 7, .world_size = 8}, With(DType::kBF16, Quantization::kFp8)},
        Case{"v3_tiny",
             {.rank = 1, .world_size = 4, .enable_expert_parallel = true},
             With(DType::kF32, Quantization::kFp8)},
        Case{"v3_tiny_noqlora", {.rank = 1, .world_size = 2}, With(DType::kBF16, {})},
        Case{"v2_tiny_softmax", {}, With(DType::kF32, Quantization::kFp8)},
        Case{"v3_tiny_fp8", {}, kSmall},
        Case{"v3_tiny_fp8", {.rank = 5, .world_size = 8}, With(DType::kBF16, Quantization::kFp8)},
        Case{"v3_tiny_fp8", {.rank = 3, .world_size = 4, .enable_expert_parallel = true}, kSmall}));

TEST(KvCacheTest, BlocksTakeWhatTheySayOverAllLayers) {
  const auto config = *ReadModelConfig(GoldenCheckpoint("v3_tiny"));
  // 4 layers, 16 tokens, 64 + 16 numbers of 2 bytes.
  const KvCacheOptions options = {.dtype = DType::kBF16, .block_size = 16, .num_blocks = 10};
  EXPECT_EQ(KvCache::BlockBytes(options, config), 4 * 16 * (64 + 16) * 2);

  CountingDevice device;
  const auto cache = *KvCache::Create(options, config, device);
  EXPECT_EQ(device.live_bytes(), 10 * KvCache::BlockBytes(options, config));
  EXPECT_EQ(cache->layer(0).DebugString(), "BF16[10, 16, 80]");
  EXPECT_NE(cache->layer(0).raw(), cache->layer(3).raw());
}

TEST(KvCacheTest, SaysSoWhenThereIsNoRoom) {
  const auto config = *ReadModelConfig(GoldenCheckpoint("v3_tiny"));
  const auto device = *OpenCpuDevice({});
  const auto cache = KvCache::Create({.num_blocks = 2'000'000'000}, config, *device);
  EXPECT_TRUE(absl::IsResourceExhausted(cache.status())) << cache.status();
}

}  // namespace
}  // namespace fathom
