#include "worker/rotary_table.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/worker/golden.h"

namespace fathom {
namespace {

ModelConfig DeepSeekV3() {
  ModelConfig config;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.rope_theta = 10000.0;
  config.yarn = YarnScaling{.factor = 40.0,
                            .original_max_position_embeddings = 4096,
                            .beta_fast = 32.0,
                            .beta_slow = 1.0,
                            .mscale = 1.0,
                            .mscale_all_dim = 1.0};
  return config;
}

const Golden& GoldenYarn() {
  static const Golden& golden = *new Golden("components/yarn_v3.safetensors");
  return golden;
}

TEST(RotaryTableTest, FrequenciesEqualTheGoldenOnes) {
  ModelConfig config = DeepSeekV3();
  const auto expected = GoldenYarn().Doubles("inv_freq_f64");
  const auto found = RotaryFrequencies(config);
  ASSERT_EQ(found.size(), expected.size());
  // Both in double: only the order of a few products may differ.
  for (size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i] / expected[i], 1.0, 1e-13);

  config.yarn.reset();
  const auto plain = GoldenYarn().Doubles("inv_freq_no_yarn_f64");
  for (size_t i = 0; i < plain.size(); ++i) {
    EXPECT_NEAR(RotaryFrequencies(config)[i] / plain[i], 1.0, 1e-13);
  }
}

TEST(RotaryTableTest, IsRightToTheLastBitOfAFloatUpToTheLastPosition) {
  constexpr int kNumPositions = 163840;
  const auto table = RotaryTable(DeepSeekV3(), kNumPositions);
  const auto positions = GoldenYarn().Ints("positions");
  const auto cosines = GoldenYarn().Doubles("cos_f64"), sines = GoldenYarn().Doubles("sin_f64");
  ASSERT_EQ(table.size(), size_t{kNumPositions} * 64);
  for (size_t row = 0; row < positions.size(); ++row) {
    for (size_t pair = 0; pair < 32; ++pair) {
      const size_t at = size_t{2} * (positions[row] * 32 + pair);
      // Half a unit in the last place of a float near 1 is 3e-8; angles agree to 163840 * 1e-16.
      EXPECT_NEAR(table[at], cosines[row * 32 + pair], 4e-8) << positions[row] << ", " << pair;
      EXPECT_NEAR(table[at + 1], sines[row * 32 + pair], 4e-8) << positions[row] << ", " << pair;
    }
  }
}

TEST(RotaryTableTest, ScalesAreThoseOfTheRealModel) {
  EXPECT_NEAR(YarnMscale(40.0, 1.0), GoldenYarn().Doubles("mscale")[0], 1e-14);
  EXPECT_NEAR(DeepSeekV3().SoftmaxScale(), GoldenYarn().Doubles("softmax_scale")[0], 1e-8);
  ModelConfig plain = DeepSeekV3();
  plain.yarn.reset();
  EXPECT_FLOAT_EQ(plain.SoftmaxScale(), 1.0f / std::sqrt(192.0f));
}

TEST(RotaryTableTest, TheAmplitudeIsTheRatioOfTheTwoScales) {
  ModelConfig config = DeepSeekV3();
  config.yarn->mscale = 0.707;
  config.yarn->mscale_all_dim = 0.0;  // as when it is absent: no correction of the softmax
  const auto table = RotaryTable(config, 1);
  EXPECT_FLOAT_EQ(table[0], static_cast<float>(0.1 * 0.707 * std::log(40.0) + 1.0));
  EXPECT_EQ(table[1], 0.0f);
  EXPECT_FLOAT_EQ(config.SoftmaxScale(), 1.0f / std::sqrt(192.0f));
}

}  // namespace
}  // namespace fathom
