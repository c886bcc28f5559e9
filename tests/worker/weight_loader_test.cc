#include "worker/weight_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "kernels/number_formats.h"
#include "tests/worker/checkpoint_files.h"

namespace fathom {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A folder with tensors of random bits, and the slices that come out of it.
class WeightLoaderTest : public testing::Test {
 protected:
  WeightLoaderTest() : device_(*OpenCpuDevice({})) {}

  // Random numbers around 1 in any of the three types; F8_E4M3 with factors.
  void AddMatrix(const std::string& name, const std::string& dtype, int64_t rows, int64_t columns) {
    FileTensor& tensor = tensors_[name];
    tensor = {.dtype = dtype, .shape = {rows, columns}, .bytes = {}};
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = Random();
      if (dtype == "F32") Append(value, tensor);
      if (dtype == "BF16") Append(ToBFloat16(value), tensor);
      if (dtype == "F8_E4M3") Append(ToFloat8E4M3(value), tensor);
    }
    if (dtype == "F8_E4M3") AddMatrix(name + "_scale_inv", "F32", Blocks(rows), Blocks(columns));
  }

  // The value of element (row, column), factors applied.
  float Expected(const std::string& name, int64_t row, int64_t column) const {
    const FileTensor& tensor = tensors_.at(name);
    const int64_t index = row * tensor.shape[1] + column;
    if (tensor.dtype == "F32") return Element<float>(tensor, index);
    if (tensor.dtype == "BF16") return ToFloat(Element<BFloat16>(tensor, index));
    return ToFloat(Element<Float8E4M3>(tensor, index)) *
           Expected(name + "_scale_inv", row / kFp8Block, column / kFp8Block);
  }

  // Writes the tensors and loads what `add` wishes for.
  template <typename Add>
  absl::Status Load(const WeightLoaderOptions& options, Add&& add) {
    WriteCheckpoint(directory_.path(), "{}", tensors_);
    const auto checkpoint = Checkpoint::Open(directory_.path());
    CHECK(checkpoint.ok()) << checkpoint.status();
    CheckpointWeights source(**checkpoint);
    WeightLoader loader(options, source);
    add(loader);
    absl::StatusOr<std::vector<Buffer>> buffers = loader.Load(*device_, nullptr);
    if (!buffers.ok()) return buffers.status();
    buffers_ = *std::move(buffers);
    return absl::OkStatus();
  }

  // Loads one part of a linear layer and compares every element.
  void ExpectPart(const std::string& name, const MatrixPart& part) {
    Weight weight;
    ASSERT_TRUE(Load({.accept_fp8 = true}, [&](WeightLoader& loader) {
                  loader.AddLinear({name, part}, weight);
                }).ok());
    const int64_t rows = part.rows.size(), columns = part.columns.size();
    std::vector<float> values(rows * columns);
    device_->ops().Dequantize(weight, Tensor(values.data(), DType::kF32, {rows, columns}));
    for (int64_t i = 0; i < rows * columns; ++i) {
      ASSERT_EQ(values[i],
                Expected(name, part.rows.begin + i / columns, part.columns.begin + i % columns))
          << name << " at " << i;
    }
  }

  float Random() { return std::uniform_real_distribution<float>(0.5f, 1.5f)(random_); }

  template <typename T>
  static void Append(T value, FileTensor& tensor) {
    tensor.bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  template <typename T>
  static T Element(const FileTensor& tensor, int64_t index) {
    T value;
    std::memcpy(&value, tensor.bytes.data() + index * sizeof(T), sizeof(T));
    return value;
  }
  static int64_t Blocks(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

  TemporaryDirectory directory_;
  FileTensors tensors_;
  std::unique_ptr<Device> device_;
  std::vector<Buffer> buffers_;
  std::mt19937 random_{20250101};
};

TEST_F(WeightLoaderTest, SlicesEqualTheirPartOfTheMatrixInEveryType) {
  for (const std::string dtype : {"F32", "BF16", "F8_E4M3"}) {
    const std::string name = dtype + ".weight";
    AddMatrix(name, dtype, 300, 400);
    ExpectPart(name, MatrixPart::Whole(300, 400));
    ExpectPart(name, MatrixPart::Rows(300, 400, {100, 200}));
    ExpectPart(name, MatrixPart::Rows(300, 400, {299, 300}));
    ExpectPart(name, MatrixPart::Columns(300, 400, {100, 300}));
    ExpectPart(name, MatrixPart::Columns(300, 400, {256, 384}));
  }
}

// Larger than one read, with gaps short enough to read across and too long for that.
TEST_F(WeightLoaderTest, SlicesOfLargeMatricesAreReadInPieces) {
  AddMatrix("narrow.weight", "F32", 3000, 500);
  ExpectPart("narrow.weight", MatrixPart::Columns(3000, 500, {100, 400}));
  ExpectPart("narrow.weight", MatrixPart::Rows(3000, 500, {1000, 3000}));
  AddMatrix("wide.weight", "F8_E4M3", 600, 16384);
  ExpectPart("wide.weight", MatrixPart::Columns(600, 16384, {8192, 16384}));
  ExpectPart("wide.weight", MatrixPart::Columns(600, 16384, {0, 12000}));
}

TEST_F(WeightLoaderTest, StacksHoldTheSamePartOfEachExpert) {
  AddMatrix("e0.weight", "F8_E4M3", 256, 200);
  AddMatrix("e1.weight", "F8_E4M3", 256, 200);
  Weight stack;
  ASSERT_TRUE(Load({.accept_fp8 = true}, [&](WeightLoader& loader) {
                const MatrixPart part = MatrixPart::Rows(256, 200, {96, 192});
                loader.AddExperts({{"e0.weight", part}, {"e1.weight", part}}, stack);
              }).ok());
  EXPECT_EQ(stack.values.DebugString(), "F8_E4M3[2, 96, 200]");
  EXPECT_EQ(stack.scale_inv.DebugString(), "F32[2, 2, 2]");
  EXPECT_EQ(stack.row_offset, 96);
  EXPECT_EQ(stack.column_offset, 0);
  std::vector<float> values(96 * 200);
  device_->ops().Dequantize(
      {.values = stack.values[1], .scale_inv = stack.scale_inv[1], .row_offset = stack.row_offset},
      Tensor(values.data(), DType::kF32, {96, 200}));
  EXPECT_EQ(values[0], Expected("e1.weight", 96, 0));
  EXPECT_EQ(values.back(), Expected("e1.weight", 191, 199));
}

TEST_F(WeightLoaderTest, AStackOfOneIsStillAStack) {
  AddMatrix("e.weight", "BF16", 4, 6);
  Weight stack;
  ASSERT_TRUE(Load({}, [&](WeightLoader& loader) {
                loader.AddExperts({{"e.weight", MatrixPart::Whole(4, 6)}}, stack);
              }).ok());
  EXPECT_EQ(stack.values.DebugString(), "BF16[1, 4, 6]");
}

TEST_F(WeightLoaderTest, LayersOfOneInputAreStackedWhereTheirBlocksLineUp) {
  AddMatrix("a.weight", "F8_E4M3", 256, 200);
  AddMatrix("b.weight", "F8_E4M3", 144, 200);
  AddMatrix("c.weight", "BF16", 144, 200);
  const auto stacked = [&](const std::vector<LinearPart>& layers) {
    StackedLinear stack;
    CHECK(Load({.accept_fp8 = true}, [&](WeightLoader& loader) {
            loader.AddStackedLinear(layers, stack);
          }).ok());
    return stack.weights();
  };
  const LinearPart a = {"a.weight", MatrixPart::Whole(256, 200)};
  const LinearPart upper = {"a.weight", MatrixPart::Rows(256, 200, {0, 96})};
  const LinearPart lower = {"a.weight", MatrixPart::Rows(256, 200, {96, 256})};
  const LinearPart b = {"b.weight", MatrixPart::Whole(144, 200)};
  const LinearPart c = {"c.weight", MatrixPart::Whole(144, 200)};

  const auto together = stacked({a, b});
  ASSERT_EQ(together.size(), 1);
  EXPECT_EQ(together[0].values.DebugString(), "F8_E4M3[400, 200]");
  EXPECT_EQ(together[0].scale_inv.DebugString(), "F32[4, 2]");
  std::vector<float> values(400 * 200);
  device_->ops().Dequantize(together[0], Tensor(values.data(), DType::kF32, {400, 200}));
  for (int64_t i = 0; i < 400 * 200; ++i) {
    const int64_t row = i / 200, column = i % 200;
    ASSERT_EQ(values[i], row < 256 ? Expected("a.weight", row, column)
                                   : Expected("b.weight", row - 256, column));
  }
  // The first may begin within a block, if the next begins where one ends.
  EXPECT_EQ(stacked({lower, b}).size(), 1);
  EXPECT_EQ(stacked({lower, b})[0].row_offset, 96);
  EXPECT_EQ(stacked({b, a}).size(), 2) << "b ends within a block";
  EXPECT_EQ(stacked({upper, a}).size(), 2);
  EXPECT_EQ(stacked({a, lower}).size(), 2) << "lower begins within a block";
  EXPECT_EQ(stacked({a, c}).size(), 2) << "of different types";
  EXPECT_EQ(stacked({c, c}).size(), 1);
}

TEST_F(WeightLoaderTest, ExpertsOfOtherFormsMakeNoStack) {
  AddMatrix("e0.weight", "F8_E4M3", 256, 256);
  AddMatrix("e1.weight", "F8_E4M3", 512, 256);
  AddMatrix("e2.weight", "BF16", 256, 256);
  const LinearPart e0 = {"e0.weight", MatrixPart::Rows(256, 256, {0, 64})};
  WriteCheckpoint(directory_.path(), "{}", tensors_);
  const auto checkpoint = *Checkpoint::Open(directory_.path());
  CheckpointWeights source(*checkpoint);
  const WeightLoader loader({.accept_fp8 = true}, source);
  const auto can_stack = [&](const std::string& name, const MatrixPart& part) {
    return loader.CanStack(std::vector<LinearPart>{e0, {name, part}});
  };
  EXPECT_TRUE(can_stack("e1.weight", MatrixPart::Rows(512, 256, {384, 448})));
  EXPECT_FALSE(can_stack("e1.weight", MatrixPart::Rows(512, 256, {64, 128})));
  EXPECT_FALSE(can_stack("e1.weight", MatrixPart::Rows(512, 256, {0, 128})));
  EXPECT_FALSE(can_stack("e2.weight", MatrixPart::Rows(256, 256, {0, 64})));
  EXPECT_FALSE(can_stack("absent.weight", MatrixPart::Rows(256, 256, {0, 64})));
}

// Factors are of the slice's own blocks, and no value is off by more than half a step of E4M3.
TEST_F(WeightLoaderTest, QuantisesSlicesInBlocksOfTheirOwn) {
  AddMatrix("w.weight", "BF16", 300, 200);
  const MatrixPart part = MatrixPart::Rows(300, 200, {50, 250});
  Weight weight;
  ASSERT_TRUE(Load({.quantization = Quantization::kFp8}, [&](WeightLoader& loader) {
                loader.AddLinear({"w.weight", part}, weight);
              }).ok());
  EXPECT_EQ(weight.values.DebugString(), "F8_E4M3[200, 200]");
  EXPECT_EQ(weight.scale_inv.DebugString(), "F32[2, 2]");
  EXPECT_EQ(weight.row_offset, 0);
  std::vector<float> values(200 * 200);
  device_->ops().Dequantize(weight, Tensor(values.data(), DType::kF32, {200, 200}));
  for (int64_t i = 0; i < 200 * 200; ++i) {
    const float expected = Expected("w.weight", 50 + i / 200, i % 200);
    ASSERT_NEAR(values[i], expected, expected / 16) << i;  // 3 bits of mantissa: 1/16 of the value
  }
}

TEST_F(WeightLoaderTest, TablesAreNeverQuantised) {
  AddMatrix("embed.weight", "BF16", 64, 32);
  Tensor table;
  ASSERT_TRUE(Load({.quantization = Quantization::kFp8}, [&](WeightLoader& loader) {
                loader.AddTable("embed.weight", MatrixPart::Rows(64, 32, {16, 32}), table);
              }).ok());
  EXPECT_EQ(table.DebugString(), "BF16[16, 32]");
  EXPECT_EQ(ToFloat(table.data<BFloat16>()[33]), Expected("embed.weight", 17, 1));
}

TEST_F(WeightLoaderTest, VectorsBecomeFloats) {
  AddMatrix("bf16", "BF16", 1, 5);
  AddMatrix("f32", "F32", 1, 5);
  for (const char* name : {"bf16", "f32"}) tensors_[name].shape = {5};
  Tensor bf16, f32;
  ASSERT_TRUE(Load({}, [&](WeightLoader& loader) {
                loader.AddVector("bf16", 5, bf16);
                loader.AddVector("f32", 5, f32);
              }).ok());
  EXPECT_EQ(bf16.DebugString(), "F32[5]");
  EXPECT_EQ(bf16.data<float>()[4], ToFloat(Element<BFloat16>(tensors_["bf16"], 4)));
  EXPECT_EQ(f32.data<float>()[4], Element<float>(tensors_["f32"], 4));
}

TEST_F(WeightLoaderTest, KvBIsSplitIntoTransposedKeysAndValues) {
  ModelConfig config;  // three values to a key's two, so that a mix-up shows
  config.num_attention_heads = 40;
  config.qk_nope_head_dim = 2;
  config.v_head_dim = 3;
  config.kv_lora_rank = 150;
  const Range heads = {26, 39};  // rows 130 to 195: the first block of factors is cut
  for (const std::string dtype : {"F32", "BF16", "F8_E4M3"}) {
    const std::string name = dtype + ".kv_b_proj.weight";
    AddMatrix(name, dtype, 200, 150);
    Tensor w_uk, w_uv;
    // Never quantised, whatever the option says: it is dequantised anyway.
    ASSERT_TRUE(
        Load({.quantization = Quantization::kFp8, .accept_fp8 = true}, [&](WeightLoader& loader) {
          loader.AddKvB(name, config, heads, w_uk, w_uv);
        }).ok());
    EXPECT_EQ(w_uk.DebugString(), "F32[13, 150, 2]");
    EXPECT_EQ(w_uv.DebugString(), "F32[13, 3, 150]");
    for (int64_t head = 0; head < heads.size(); ++head) {
      const int64_t first_row = (heads.begin + head) * 5;
      for (int64_t r = 0; r < 150; ++r) {
        for (int64_t n = 0; n < 2; ++n) {
          ASSERT_EQ(w_uk.data<float>()[(head * 150 + r) * 2 + n], Expected(name, first_row + n, r));
        }
        for (int64_t v = 0; v < 3; ++v) {
          ASSERT_EQ(w_uv.data<float>()[(head * 3 + v) * 150 + r],
                    Expected(name, first_row + 2 + v, r));
        }
      }
    }
  }
}

TEST_F(WeightLoaderTest, RanksTogetherReadEveryByteOnce) {
  AddMatrix("rows.weight", "BF16", 64, 32);
  AddMatrix("columns.weight", "F32", 64, 32);
  WriteCheckpoint(directory_.path(), "{}", tensors_);
  const auto checkpoint = *Checkpoint::Open(directory_.path());
  int64_t read_bytes = 0;
  for (int64_t rank = 0; rank < 4; ++rank) {
    Weight rows, columns;
    CheckpointWeights source(*checkpoint);
    WeightLoader loader({}, source);
    loader.AddLinear({"rows.weight", MatrixPart::Rows(64, 32, {rank * 16, rank * 16 + 16})}, rows);
    loader.AddLinear({"columns.weight", MatrixPart::Columns(64, 32, {rank * 8, rank * 8 + 8})},
                     columns);
    read_bytes += loader.Plan()->read_bytes;
  }
  EXPECT_EQ(read_bytes, 64 * 32 * (2 + 4));
}

TEST_F(WeightLoaderTest, WhatIsNotAsExpectedIsNamedWithFileAndBoth) {
  AddMatrix("w.weight", "BF16", 4, 6);
  AddMatrix("fp8.weight", "F8_E4M3", 200, 6);
  tensors_["half.weight"] = {"F16", {2}, "1234"};
  tensors_["fp8.weight_scale_inv"].dtype = "I32";
  Weight weight;
  Tensor tensor;
  const auto refusal = [&](auto&& add) {
    return std::string(Load({.accept_fp8 = true}, add).message());
  };
  EXPECT_THAT(
      refusal([&](WeightLoader& loader) {
        loader.AddLinear({"absent.weight", MatrixPart::Whole(4, 6)}, weight);
      }),
      AllOf(HasSubstr(directory_.path()), HasSubstr("tensor \"absent.weight\" is missing, "
                                                    "expected F32 or BF16 or F8_E4M3[4, 6]")));
  EXPECT_THAT(refusal([&](WeightLoader& loader) {
                loader.AddLinear({"w.weight", MatrixPart::Whole(4, 7)}, weight);
              }),
              HasSubstr("model.safetensors: tensor \"w.weight\" is BF16[4, 6], "
                        "expected F32 or BF16 or F8_E4M3[4, 7]"));
  EXPECT_THAT(refusal([&](WeightLoader& loader) { loader.AddVector("half.weight", 2, tensor); }),
              HasSubstr("\"half.weight\" is F16[2], expected F32 or BF16[2]"));
  EXPECT_THAT(refusal([&](WeightLoader& loader) {
                loader.AddTable("fp8.weight", MatrixPart::Whole(200, 6), tensor);
              }),
              HasSubstr("\"fp8.weight\" is F8_E4M3[200, 6], expected F32 or BF16[200, 6]"));
  EXPECT_THAT(refusal([&](WeightLoader& loader) {
                loader.AddLinear({"fp8.weight", MatrixPart::Whole(200, 6)}, weight);
              }),
              HasSubstr("\"fp8.weight_scale_inv\" is I32[2, 1], expected F32[2, 1]"));
}

}  // namespace
}  // namespace fathom
