#include "worker/shard_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace fathom {
namespace {

using testing::HasSubstr;

ModelConfig DeepSeekV3() {
  ModelConfig config;
  config.vocab_size = 129280;
  config.num_hidden_layers = 61;
  config.num_attention_heads = 128;
  config.intermediate_size = 18432;
  config.n_routed_experts = 256;
  config.n_shared_experts = 1;
  config.moe_intermediate_size = 2048;
  config.first_k_dense_replace = 3;
  return config;
}

ShardLayout Layout(const ShardLayoutOptions& options, const ModelConfig& config) {
  const auto layout = ShardLayout::Create(options, config);
  CHECK(layout.ok()) << layout.status();
  return *layout;
}

std::string Refusal(const ShardLayoutOptions& options, const ModelConfig& config) {
  return std::string(ShardLayout::Create(options, config).status().message());
}

TEST(ShardLayoutTest, ALonelyRankOwnsEverything) {
  const ShardLayout layout = Layout({}, DeepSeekV3());
  EXPECT_EQ(layout.heads(), (Range{0, 128}));
  EXPECT_EQ(layout.vocabulary(), (Range{0, 129280}));
  EXPECT_EQ(layout.intermediate(), (Range{0, 18432}));
  EXPECT_EQ(layout.shared_intermediate(), (Range{0, 2048}));
  EXPECT_EQ(layout.experts(), (Range{0, 256}));
  EXPECT_EQ(layout.expert_intermediate(), (Range{0, 2048}));
}

TEST(ShardLayoutTest, RanksOwnConsecutiveEqualPartsOfTheWhole) {
  for (const int world_size : {2, 4, 8, 16}) {
    std::vector<int64_t> ends(4, 0);
    for (int rank = 0; rank < world_size; ++rank) {
      const ShardLayout layout = Layout({.rank = rank, .world_size = world_size}, DeepSeekV3());
      const Range parts[] = {layout.heads(), layout.vocabulary(), layout.intermediate(),
                             layout.expert_intermediate()};
      for (int i = 0; i < 4; ++i) {
        EXPECT_EQ(parts[i].begin, ends[i]);
        ends[i] = parts[i].end;
      }
      EXPECT_EQ(layout.experts(), (Range{0, 256})) << "a slice of every expert";
    }
    EXPECT_EQ(ends, (std::vector<int64_t>{128, 129280, 18432, 2048}));
  }
}

TEST(ShardLayoutTest, WholeExpertsLeaveSharedOnesSliced) {
  const ShardLayout layout =
      Layout({.rank = 3, .world_size = 8, .enable_expert_parallel = true}, DeepSeekV3());
  EXPECT_EQ(layout.experts(), (Range{96, 128}));
  EXPECT_EQ(layout.expert_intermediate(), (Range{0, 2048}));
  EXPECT_EQ(layout.shared_intermediate(), (Range{768, 1024}));
}

TEST(ShardLayoutTest, WhatCannotBeSplitIsNamedWithBothNumbers) {
  const ModelConfig config = DeepSeekV3();
  EXPECT_THAT(Refusal({.world_size = 3}, config),
              HasSubstr("world size 3 does not divide num_attention_heads 128: "
                        "--tensor-parallel-size can be 1, 2, 4, 8, 16, 32, 64, 128 for"));
  const auto refusal = [&](int ModelConfig::*field, int value, bool whole_experts) {
    ModelConfig edited = config;
    edited.*field = value;
    return Refusal({.world_size = 8, .enable_expert_parallel = whole_experts}, edited);
  };
  EXPECT_THAT(refusal(&ModelConfig::vocab_size, 1001, false),
              HasSubstr("world size 8 does not divide vocab_size 1001"));
  EXPECT_THAT(refusal(&ModelConfig::intermediate_size, 1001, false),
              HasSubstr("world size 8 does not divide intermediate_size 1001"));
  EXPECT_THAT(refusal(&ModelConfig::moe_intermediate_size, 12, false),
              HasSubstr("n_shared_experts * moe_intermediate_size 12"));
  EXPECT_THAT(refusal(&ModelConfig::n_routed_experts, 12, true),
              HasSubstr("world size 8 does not divide n_routed_experts 12"));
  EXPECT_EQ(refusal(&ModelConfig::n_routed_experts, 12, false), "") << "each is sliced";
}

TEST(ShardLayoutTest, WhatNoLayerHasNeedNotBeDivisible) {
  ModelConfig config = DeepSeekV3();
  config.first_k_dense_replace = 0;
  config.intermediate_size = 1001;
  EXPECT_EQ(Refusal({.world_size = 8}, config), "");
  config = DeepSeekV3();
  config.n_routed_experts = 0;
  config.moe_intermediate_size = 1001;
  EXPECT_EQ(Refusal({.world_size = 8}, config), "");
}

TEST(ShardLayoutTest, ImpossibleRanksAreRefused) {
  EXPECT_THAT(Refusal({.world_size = 0}, DeepSeekV3()), HasSubstr("world size is 0"));
  EXPECT_THAT(Refusal({.rank = 8, .world_size = 8}, DeepSeekV3()),
              HasSubstr("rank is 8, expected 0 to 7"));
  EXPECT_THAT(Refusal({.rank = -1, .world_size = 8}, DeepSeekV3()), HasSubstr("rank is -1"));
}

}  // namespace
}  // namespace fathom
