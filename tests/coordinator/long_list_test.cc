#include "coordinator/long_list.h"

#include <cstdint>
#include <iostream>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(LongListTest, BeginsEmptyOrWithWhatItIsGiven) {
  EXPECT_TRUE(LongList<int>().empty());
  EXPECT_THAT(LongList<int>().CopyFrom(0), IsEmpty());
  const LongList<int> list(std::vector<int>{3, 1, 2});
  EXPECT_EQ(list.size(), 3);
  EXPECT_EQ(list.back(), 2);
  EXPECT_THAT(list.CopyFrom(1), ElementsAre(1, 2));
}

TEST(LongListTest, IsAVectorWhateverIsAskedOfItMeanwhile) {
  const uint64_t seed = std::random_device()();
  std::cout << "seed " << seed << "\n";
  std::mt19937_64 random(seed);
  const auto between = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int round = 0; round < 20; ++round) {
    std::vector<int> expected(between(0, 50));
    for (int& value : expected) value = between(0, 1000);
    LongList<int> list(expected);
    for (int i = 0; i < 300; ++i) {
      expected.push_back(between(0, 1000));
      list.Prefetch();
      list.push_back(expected.back());
      ASSERT_EQ(list.size(), static_cast<int>(expected.size()));
      const int begin = between(0, list.size() - 1);
      ASSERT_EQ(list[begin], expected[begin]);
      ASSERT_EQ(list.back(), expected.back());
      const std::vector<int> end(expected.begin() + begin, expected.end());
      ASSERT_EQ(list.CopyFrom(begin), end);
      if (between(0, 9) > 0) continue;
      const int count = between(0, list.size() - begin);
      const auto slice = list.Slice(begin, count);
      ASSERT_EQ(std::vector<int>(slice.begin(), slice.end()),
                std::vector<int>(end.begin(), end.begin() + count));
    }
  }
}

}  // namespace
}  // namespace fathom
