#include "worker/philox.h"

#include <cmath>

#include "gtest/gtest.h"

namespace fathom {
namespace {

using Words4 = std::array<uint32_t, 4>;

TEST(PhiloxTest, GivesThePublishedAnswers) {
  // Random123 distribution, tests/kat_vectors, lines "philox4x32 10".
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words4{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words4{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words4{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, AUniformNumberUsesBothHalvesOfSeedAndPosition) {
  const double base = PhiloxUniform(1, 2);
  EXPECT_NE(base, PhiloxUniform(uint64_t{1} << 32 | 1, 2));
  EXPECT_NE(base, PhiloxUniform(1, uint64_t{1} << 32 | 2));
  EXPECT_EQ(base, PhiloxUniform(1, 2));
  // The first answer above, top 53 bits of its first two words.
  EXPECT_EQ(PhiloxUniform(0, 0), std::ldexp(double(0xe169c58d6627e8d5 >> 11), -53));
}

TEST(PhiloxTest, UniformNumbersStayBelowOneAndAverageOneHalf) {
  // The mean of n uniform numbers has standard deviation 1 / sqrt(12 n); six of them are allowed.
  constexpr int kDraws = 20000;
  double sum = 0.0;
  for (int position = 0; position < kDraws; ++position) {
    const double u = PhiloxUniform(/*seed=*/7, position);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / kDraws, 0.5, 6.0 / std::sqrt(12.0 * kDraws));
}

}  // namespace
}  // namespace fathom
