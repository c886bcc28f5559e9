#include "worker/weight_source.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/worker/golden.h"
#include "worker/kv_cache.h"
#include "worker/model_shard.h"

namespace fathom {
namespace {

double RootMeanSquare(const std::vector<float>& values) {
  double sum = 0.0;
  for (const float value : values) sum += double{value} * value;
  return std::sqrt(sum / static_cast<double>(values.size()));
}

class RandomWeightsTest : public testing::Test {
 protected:
  // A part of a matrix, factors applied.
  std::vector<float> Read(const std::string& name, DType type, const MatrixPart& part) {
    const int64_t rows = part.rows.size(), columns = part.columns.size();
    const int64_t blocks = (rows + 127) / 128, block_columns = (columns + 127) / 128;
    const Buffer codes = *device_->Allocate(rows * columns * SizeOf(type));
    std::vector<float> factors(blocks * block_columns), values(rows * columns);
    Weight weight = {.values = Tensor(codes.data(), type, {rows, columns})};
    Read(name, type, part, weight.values);
    if (type == DType::kF8E4M3) {
      const MatrixPart all = MatrixPart::Whole(blocks, part.num_columns / 128);
      weight.scale_inv = Tensor(factors.data(), DType::kF32, {blocks, block_columns});
      Read(name + "_scale_inv", DType::kF32,
           MatrixPart::Columns(all.num_rows, all.num_columns, {0, block_columns}),
           weight.scale_inv);
    }
    device_->ops().Dequantize(weight, Tensor(values.data(), DType::kF32, {rows, columns}));
    return values;
  }
  void Read(const std::string& name, DType type, const MatrixPart& part, const Tensor& target) {
    const WeightRead read = {.name = name, .type = type, .part = part, .target = target};
    CHECK(source_
              .ReadMatrices(
                  {&read, 1}, *device_, [](int64_t) {}, [](size_t) {})
              .ok());
  }

  RandomWeights source_;
  std::unique_ptr<Device> device_ = *OpenCpuDevice({});
};

// 2¹⁸ numbers: the root of their mean square is known to 0.1 %.
TEST_F(RandomWeightsTest, OutputsAreAsLargeAsInputsInEveryType) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    const auto whole = Read("w.weight", type, MatrixPart::Whole(256, 1024));
    EXPECT_NEAR(RootMeanSquare(whole), std::sqrt(1.0 / 1024), 0.01 * std::sqrt(1.0 / 1024));
    const auto slice = Read("w.weight", type, MatrixPart::Columns(1024, 1024, {256, 512}));
    EXPECT_NEAR(RootMeanSquare(slice), std::sqrt(1.0 / 1024), 0.01 * std::sqrt(1.0 / 1024));
  }
}

TEST_F(RandomWeightsTest, TheSamePartIsTheSameEverywhereAndOthersDiffer) {
  const auto read = [&](const std::string& name, int64_t first_row) {
    return Read(name, DType::kBF16, MatrixPart::Rows(256, 64, {first_row, first_row + 64}));
  };
  EXPECT_EQ(read("a.weight", 64), read("a.weight", 64));
  EXPECT_NE(read("a.weight", 64), read("a.weight", 128));
  EXPECT_NE(read("a.weight", 64), read("b.weight", 64));
}

// One rank of a group alone, as a benchmark loads it, in every combination of types.
TEST_F(RandomWeightsTest, AShardNeedsOnlyAConfigurationAndItsLogitsAreOfOrderOne) {
  for (const std::string model : {"v3_tiny", "v3_tiny_noqlora", "v3_tiny_fp8"}) {
    const auto config = *ReadModelConfig(GoldenCheckpoint(model));
    const auto layout = *ShardLayout::Create({.rank = 0, .world_size = 2}, config);
    for (const Quantization quantization : {Quantization::kNone, Quantization::kFp8}) {
      const ModelShardOptions options = {.dtype = DType::kBF16,
                                         .quantization = quantization,
                                         .quantize_activations = true,
                                         .max_tokens_per_step = 8,
                                         .max_model_len = 64,
                                         .kv_cache_dtype = DType::kF8E4M3};
      const auto shard = *ModelShard::Load(options, config, layout, source_, *device_, nullptr);
      const auto cache =
          *KvCache::Create({.dtype = options.kv_cache_dtype, .num_blocks = 4}, config, *device_);
      const std::vector<int32_t> tokens = {5, 6, 7, 8, 9}, blocks = {2};
      StepBatch batch = BuildStepBatch({{.token_ids = tokens, .blocks = blocks, .count = 5}}, 16);
      batch.logit_rows = {0, 2, 4};
      // Alone in its group it has half of the vocabulary.
      const auto alone = MakeLonelyCommunicator();
      const auto logits = shard->Forward(batch, *cache, *alone);
      ASSERT_TRUE(logits.ok()) << logits.status();
      const auto* values = logits->data<float>();
      const double size = RootMeanSquare({values, values + logits->num_elements()});
      EXPECT_GT(size, 0.3) << model;
      EXPECT_LT(size, 3.0) << model;
    }
  }
}

}  // namespace
}  // namespace fathom
