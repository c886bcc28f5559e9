#include "kernels/tensor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace fathom {
namespace {

class TensorTest : public testing::Test {
 protected:
  TensorTest() : values_(24) {
    for (int i = 0; i < 24; ++i) values_[i] = i;
  }
  Tensor Matrix() { return Tensor(values_.data(), DType::kI32, {4, 6}); }

  std::vector<int32_t> values_;
};

TEST_F(TensorTest, KnowsItsShapeAndSize) {
  const Tensor tensor = Matrix();
  EXPECT_EQ(tensor.rank(), 2);
  EXPECT_EQ(tensor.dim(1), 6);
  EXPECT_EQ(tensor.stride(0), 6);
  EXPECT_EQ(tensor.num_elements(), 24);
  EXPECT_EQ(tensor.num_bytes(), 96);
  EXPECT_TRUE(tensor.dense());
  EXPECT_EQ(tensor.DebugString(), "I32[4, 6]");
  EXPECT_FALSE(Tensor().present());
  EXPECT_EQ(Tensor().num_elements(), 0);
}

TEST_F(TensorTest, SlicesWithoutCopying) {
  const Tensor rows = Matrix().Slice(0, 1, 3);
  EXPECT_TRUE(rows.dense());
  EXPECT_EQ(rows.data<int32_t>()[0], 6);
  const Tensor columns = Matrix().Slice(1, 2, 4);
  EXPECT_FALSE(columns.dense());
  EXPECT_EQ(columns.dim(1), 2);
  EXPECT_EQ(columns.data<int32_t>()[columns.stride(0)], 8);
  EXPECT_TRUE(columns.Slice(0, 3, 4).dense()) << "a single row has no gaps";
  EXPECT_TRUE(columns.Slice(0, 0, 0).dense());
}

TEST_F(TensorTest, SplitsTheLastDimensionOfStridedRows) {
  const Tensor heads = Matrix().Slice(1, 0, 4).SplitLast(2, 2);
  EXPECT_EQ(heads.DebugString(), "I32[4, 2, 2]");
  EXPECT_EQ(heads.stride(0), 6);
  EXPECT_EQ(heads[2].data<int32_t>()[heads.stride(1)], 14);
}

TEST_F(TensorTest, ReshapesAndTakesElementsOfTheFirstDimension) {
  const Tensor cube = Matrix().Reshape({2, 3, 4});
  EXPECT_EQ(cube[1][2].DebugString(), "I32[4]");
  EXPECT_EQ(cube[1][2].data<int32_t>()[3], 23);
}

using TensorDeathTest = TensorTest;

TEST_F(TensorDeathTest, DiesOfOurOwnMistakes) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_DEATH(Matrix().Slice(0, 2, 5), "\\[2, 5\\) along 0 of I32\\[4, 6\\]");
  EXPECT_DEATH(Matrix().Reshape({5, 5}), "25 vs 24");
  EXPECT_DEATH(Matrix().Slice(1, 0, 4).Reshape({16}), "dense");
  EXPECT_DEATH(Matrix().data<uint16_t>(), "2 vs 4");
}

}  // namespace
}  // namespace fathom
