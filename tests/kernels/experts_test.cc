#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/golden_file.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_tensor.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 20240515;

class ExpertsTest : public EveryTargetTest {
 protected:
  struct Routed {
    TestTensor experts;
    TestTensor weights;
  };
  Routed Route(const Tensor& logits, const Tensor& bias, const RoutingConfig& config) {
    Routed routed = {TestTensor(DType::kI32, {logits.dim(0), config.num_experts_per_tok}),
                     TestTensor(DType::kF32, {logits.dim(0), config.num_experts_per_tok})};
    ops_.RouteExperts(logits, bias, config, routed.experts, routed.weights);
    return routed;
  }

  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(1);
  Ops& ops_ = device_->ops();
};

TEST_P(ExpertsTest, RoutesAsDeepSeeksGateDoes) {
  const RoutingConfig kV3 = {.num_experts_per_tok = 8,
                             .n_group = 8,
                             .topk_group = 4,
                             .norm_topk_prob = true,
                             .routed_scaling_factor = 2.5f};
  RoutingConfig kimi = kV3;
  kimi.n_group = kimi.topk_group = 1;
  kimi.routed_scaling_factor = 2.827f;
  const RoutingConfig kV2 = {.num_experts_per_tok = 6,
                             .n_group = 8,
                             .topk_group = 3,
                             .scoring_func = ScoringFunc::kSoftmax,
                             .topk_method = TopkMethod::kGroupLimitedGreedy,
                             .routed_scaling_factor = 16.0f};
  const RoutingConfig kV2Lite = {.num_experts_per_tok = 6,
                                 .scoring_func = ScoringFunc::kSoftmax,
                                 .topk_method = TopkMethod::kGreedy};
  const std::pair<const char*, RoutingConfig> kCases[] = {
      {"v3_plain", kV3},         {"v3_strong_bias", kV3},     {"v3_negative_scores", kV3},
      {"kimi_384_1group", kimi}, {"v2_softmax_grouped", kV2}, {"v2lite_softmax_greedy", kV2Lite}};
  const GoldenFile golden("gating.safetensors");
  for (const auto& [name, config] : kCases) {
    SCOPED_TRACE(name);
    const GoldenFile::Owned logits = golden.Load(absl::StrCat(name, ".logits"), DType::kF32);
    const std::string bias_key = absl::StrCat(name, ".bias");
    const GoldenFile::Owned bias =
        golden.Has(bias_key) ? golden.Load(bias_key, DType::kF32) : GoldenFile::Owned{};
    const Routed routed = Route(logits.tensor, bias.tensor, config);
    const auto experts = golden.Values<int32_t>(absl::StrCat(name, ".indices"));
    const auto weights = golden.Values<float>(absl::StrCat(name, ".weights"));
    for (size_t i = 0; i < experts.size(); ++i) {
      EXPECT_EQ(routed.experts->data<int32_t>()[i], experts[i]) << i;
      // Both sides round a score, a sum of eight and two products in float32.
      EXPECT_NEAR(routed.weights->data<float>()[i], weights[i], 2e-6 * weights[i]) << i;
    }
  }
}

TEST_P(ExpertsTest, PrefersTheLowerIdAmongEquals) {
  TestTensor logits(DType::kF32, {1, 8});
  TestTensor bias(DType::kF32, {8});
  logits->data<float>()[6] = 1.0f;
  const Routed routed =
      Route(logits, bias, {.num_experts_per_tok = 3, .n_group = 4, .topk_group = 2});
  EXPECT_EQ(At(routed.experts, 0, 0), 6.0);  // group 3, and group 0 as the first of equals
  EXPECT_EQ(At(routed.experts, 0, 1), 0.0);
  EXPECT_EQ(At(routed.experts, 0, 2), 1.0);
}

TEST_P(ExpertsTest, GivesABrokenRowIdsThatExistAndWeightsThatTell) {
  TestTensor logits = random_.Floats(DType::kF32, {3, 8});
  for (int e = 0; e < 8; ++e) {
    logits->data<float>()[8 + e] = std::numeric_limits<float>::quiet_NaN();
  }
  for (ScoringFunc scoring_func : {ScoringFunc::kSigmoid, ScoringFunc::kSoftmax}) {
    const Routed routed = Route(logits, TestTensor(DType::kF32, {8}),
                                {.num_experts_per_tok = 4,
                                 .n_group = 4,
                                 .topk_group = 2,
                                 .scoring_func = scoring_func,
                                 .norm_topk_prob = true});
    std::set<double> ids;
    for (int64_t j = 0; j < 4; ++j) {
      EXPECT_TRUE(At(routed.experts, 1, j) >= 0 && At(routed.experts, 1, j) < 8);
      EXPECT_TRUE(ids.insert(At(routed.experts, 1, j)).second);
      EXPECT_TRUE(std::isnan(At(routed.weights, 1, j)));
      EXPECT_TRUE(std::isfinite(At(routed.weights, 0, j)));
      EXPECT_TRUE(std::isfinite(At(routed.weights, 2, j)));
    }
  }
}

TEST_P(ExpertsTest, SortsTheChoicesOfThisRankByExpertThenByRow) {
  const TestTensor experts = IntTensor({5, 2, 4, 7, 2, 5, 9, 4});
  const TestTensor rows(DType::kI32, {8});
  const TestTensor offsets(DType::kI32, {5});
  ops_.GroupByExpert(experts->Reshape({4, 2}), 2, {.rows = rows, .offsets = offsets});
  const int32_t kOffsets[] = {0, 2, 2, 4, 6};  // experts 2, 3 (nobody), 4, 5
  const int32_t kRows[] = {1, 4, 2, 7, 0, 5};
  EXPECT_TRUE(std::equal(std::begin(kOffsets), std::end(kOffsets), offsets->data<int32_t>()));
  EXPECT_TRUE(std::equal(std::begin(kRows), std::end(kRows), rows->data<int32_t>()));
}

TEST_P(ExpertsTest, AddsTheWeightedRowsOfThisRanksExperts) {
  constexpr int64_t kTokens = 9;
  constexpr int64_t kChoices = 3;
  constexpr int64_t kSize = 37;
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (DType act : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act)));
    const TestTensor experts = random_.Ints({kTokens, kChoices}, 6);
    const TestTensor rows(DType::kI32, {kTokens * kChoices});
    const TestTensor offsets(DType::kI32, {5});
    const ExpertGroups groups = {.rows = rows, .offsets = offsets};
    ops_.GroupByExpert(experts, 0, groups);  // 4 and 5 are another rank's
    const TestTensor y = random_.Floats(act, {kTokens * kChoices, kSize});
    const TestTensor weights = random_.Floats(DType::kF32, {kTokens, kChoices});
    const TestTensor before = random_.Floats(act, {kTokens, kSize});
    const TestTensor out(act, {kTokens, kSize});
    device_->CopyFromHost(before->raw(), out);
    ops_.CombineExperts(y, groups, weights, out);
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t h = 0; h < kSize; ++h) {
        double sum = At(before, t, h);
        double magnitude = std::abs(sum);
        for (int64_t i = 0; i < At(offsets, 4); ++i) {
          const auto row = static_cast<int64_t>(At(rows, i));
          if (row / kChoices != t) continue;
          const double product = At(weights, t, row % kChoices) * At(y, i, h);
          sum += product;
          magnitude += std::abs(product);
        }
        EXPECT_WITHIN(At(out, t, h),
                      (Bounded{sum, (kChoices + 1) * kFloatRoundoff * magnitude}.Rounded(act)));
      }
    }
    const TestTensor threaded(act, {kTokens, kSize});
    device_->CopyFromHost(before->raw(), threaded);
    three_threads->ops().CombineExperts(y, groups, weights, threaded);
    EXPECT_EQ(BytesOf(threaded), BytesOf(out));
  }
}

INSTANTIATE_ON_EVERY_TARGET(ExpertsTest);

}  // namespace
}  // namespace fathom
