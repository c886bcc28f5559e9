#include "coordinator/block_pool.h"

#include <cstdint>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(BlockPoolTest, HandsOutTheLowestBlocksFirst) {
  BlockPool pool(8);
  std::vector<int32_t> table;
  pool.Take(3, table);
  EXPECT_THAT(table, ElementsAre(0, 1, 2));
  EXPECT_EQ(pool.num_free(), 5);
  EXPECT_EQ(pool.num_used(), 3);
}

TEST(BlockPoolTest, AppendsToTheTableItIsGiven) {
  BlockPool pool(8);
  std::vector<int32_t> table;
  pool.Take(1, table);
  pool.Take(0, table);
  pool.Take(2, table);
  EXPECT_THAT(table, ElementsAre(0, 1, 2));
}

TEST(BlockPoolTest, ReusesTheBlocksFreedLastSoThatMemoryStaysWarm) {
  BlockPool pool(100);
  std::vector<int32_t> table;
  for (int round = 0; round < 50; ++round) {
    pool.Take(4, table);
    EXPECT_THAT(table, ElementsAre(0, 1, 2, 3));
    pool.Release(table);
    EXPECT_THAT(table, IsEmpty());
  }
  EXPECT_EQ(pool.num_free(), 100);
}

TEST(BlockPoolTest, CanBeEmptiedToTheLastBlock) {
  BlockPool pool(5);
  std::vector<int32_t> table;
  pool.Take(5, table);
  EXPECT_EQ(pool.num_free(), 0);
  pool.Release(table);
  EXPECT_EQ(pool.num_free(), 5);
}

TEST(BlockPoolDeathTest, RefusesWhatWouldBreakTheBooks) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  BlockPool pool(4);
  std::vector<int32_t> table;
  pool.Take(2, table);
  std::vector<int32_t> copy = table;
  EXPECT_DEATH(pool.Take(3, table), "num_free");
  EXPECT_DEATH(
      {
        pool.Release(table);
        pool.Release(copy);
      },
      "freed twice");
  std::vector<int32_t> stranger = {4};
  EXPECT_DEATH(pool.Release(stranger), "num_blocks_");
}

}  // namespace
}  // namespace fathom
