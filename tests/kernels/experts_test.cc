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
    TestTensor logits;
    TestTensor experts;
    TestTensor weights;
    TestTensor rows;
    TestTensor offsets;
    TestTensor notes;

    operator Routes() const {
      return {logits, experts, weights, {.rows = rows, .offsets = offsets, .notes = notes}};
    }
  };
  // Of the experts [first_expert, first_expert + num_local).
  Routed Route(Ops& ops, const Tensor& x, const Tensor& gate, const Tensor& bias,
               const RoutingConfig& config, int first_expert, int64_t num_local) {
    const int64_t tokens = x.dim(0);
    const int64_t num_rows = tokens * config.num_choices();
    Routed routed = {TestTensor(DType::kF32, {tokens, gate.dim(0)}),
                     TestTensor(DType::kI32, {tokens, config.num_choices()}),
                     TestTensor(DType::kF32, {tokens, config.num_choices()}),
                     TestTensor(DType::kI32, {num_rows}),
                     TestTensor(DType::kI32, {num_local + 1}),
                     TestTensor(DType::kI32, {NumGroupNotes(num_local, num_rows)})};
    ops.Route(x, gate, bias, config, first_expert, routed);
    return routed;
  }

  // Routes by given logits: token by token, with an input of 1 and the logits as the gate.
  Routed RouteLogits(const Tensor& logits, const Tensor& bias, const RoutingConfig& config) {
    const int64_t tokens = logits.dim(0);
    const int64_t num_experts = logits.dim(1);
    Routed all = {TestTensor(DType::kF32, {tokens, num_experts}),
                  TestTensor(DType::kI32, {tokens, config.num_choices()}),
                  TestTensor(DType::kF32, {tokens, config.num_choices()}),
                  TestTensor(DType::kI32, {tokens * config.num_choices()}),
                  TestTensor(DType::kI32, {1}),
                  TestTensor(DType::kI32, {NumGroupNotes(0, tokens * config.num_choices())})};
    const TestTensor one = random_.Floats(DType::kF32, {1, 1});
    one->data<float>()[0] = 1.0f;
    for (int64_t t = 0; t < tokens; ++t) {
      const Tensor gate(logits.data<float>() + t * num_experts, DType::kF32, {num_experts, 1});
      const Routed routed = Route(ops_, one, gate, bias, config, 0, 0);
      device_->CopyFromHost(routed.logits->raw(), (*all.logits)[t]);
      device_->CopyFromHost(routed.experts->raw(), (*all.experts)[t]);
      device_->CopyFromHost(routed.weights->raw(), (*all.weights)[t]);
    }
    return all;
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
    const Routed routed = RouteLogits(logits.tensor, bias.tensor, config);
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
      RouteLogits(logits, bias, {.num_experts_per_tok = 3, .n_group = 4, .topk_group = 2});
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
    const Routed routed = RouteLogits(logits, TestTensor(DType::kF32, {8}),
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

TEST_P(ExpertsTest, ComputesTheLogitsOfEachTokenInF32) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (DType gate_type : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act), " ", NameOf(gate_type)));
      const TestTensor x = random_.Floats(act, {9, 133});
      const TestTensor gate = random_.Floats(gate_type, {24, 133});
      const TestTensor bias = random_.Floats(DType::kF32, {24});
      const Routed routed = Route(ops_, x, gate, bias, {.num_experts_per_tok = 4}, 0, 24);
      for (int64_t t = 0; t < 9; ++t) {
        for (int64_t e = 0; e < 24; ++e) {
          EXPECT_WITHIN(At(routed.logits, t, e),
                        ReferenceDot(*x, t, {.values = gate}, 0, e).Rounded(DType::kF32));
        }
      }
    }
  }
}

TEST_P(ExpertsTest, SortsTheChoicesOfThisRankByExpertThenByRow) {
  const TestTensor x = random_.Floats(DType::kBF16, {40, 16});
  const TestTensor gate = random_.Floats(DType::kBF16, {12, 16});
  const TestTensor bias = random_.Floats(DType::kF32, {12});
  const RoutingConfig config = {.num_experts_per_tok = 3, .num_shared_experts = 2};
  // All experts; some in the middle; the last routed ones with the shared ones behind them.
  for (const auto& [first, count] : {std::pair(0, 14), {3, 5}, {9, 5}, {14, 0}}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " experts from ", first, ": ", count));
    const Routed routed = Route(ops_, x, gate, bias, config, first, count);
    const OwnedGroups expected(routed.experts, first, count);
    EXPECT_EQ(BytesOf(routed.offsets), BytesOf(expected.offsets));
    const auto num_sorted = static_cast<int64_t>(At(routed.offsets, count));
    EXPECT_EQ(BytesOf(routed.rows->Slice(0, 0, num_sorted)),
              BytesOf(expected.rows->Slice(0, 0, num_sorted)));
  }
}

TEST_P(ExpertsTest, SendsEveryTokenToTheSharedExpertsWithWeightOne) {
  const TestTensor x = random_.Floats(DType::kF32, {7, 16});
  const TestTensor gate = random_.Floats(DType::kF32, {12, 16});
  const TestTensor bias = random_.Floats(DType::kF32, {12});
  RoutingConfig config = {
      .num_experts_per_tok = 3, .norm_topk_prob = true, .routed_scaling_factor = 2.5f};
  const Routed without = Route(ops_, x, gate, bias, config, 0, 12);
  config.num_shared_experts = 2;
  const Routed with = Route(ops_, x, gate, bias, config, 0, 14);
  for (int64_t t = 0; t < 7; ++t) {
    for (int64_t j = 0; j < 3; ++j) {
      EXPECT_EQ(At(with.experts, t, j), At(without.experts, t, j));
      EXPECT_EQ(At(with.weights, t, j), At(without.weights, t, j));
    }
    for (int64_t j = 3; j < 5; ++j) {
      EXPECT_EQ(At(with.experts, t, j), 12 + j - 3);
      EXPECT_EQ(At(with.weights, t, j), 1.0);
    }
  }
  EXPECT_EQ(At(with.offsets, 13) - At(with.offsets, 12), 7);
}

TEST_P(ExpertsTest, RoutesATokenTheSameWayAloneAndOnEveryThread) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  const TestTensor x = random_.Floats(DType::kBF16, {150, 300});
  const TestTensor gate = random_.Floats(DType::kBF16, {32, 300});
  const TestTensor bias = random_.Floats(DType::kF32, {32});
  const RoutingConfig config = {.num_experts_per_tok = 6, .n_group = 4, .topk_group = 2};
  const Routed together = Route(three_threads->ops(), x, gate, bias, config, 0, 32);
  for (int64_t t = 0; t < 150; ++t) {
    const Routed alone = Route(ops_, x->Slice(0, t, t + 1), gate, bias, config, 0, 32);
    EXPECT_EQ(BytesOf(alone.logits), BytesOf((*together.logits)[t])) << t;
    EXPECT_EQ(BytesOf(alone.experts), BytesOf((*together.experts)[t])) << t;
    EXPECT_EQ(BytesOf(alone.weights), BytesOf((*together.weights)[t])) << t;
  }
}

TEST_P(ExpertsTest, SumsTheWeightedRowsOfThisRanksExperts) {
  constexpr int64_t kTokens = 9;
  constexpr int64_t kChoices = 3;
  constexpr int64_t kSize = 37;
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (bool accumulate : {false, true}) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act), " accumulate ", accumulate));
      const TestTensor experts = random_.Ints({kTokens, kChoices}, 6);
      const OwnedGroups groups(experts, 0, 4);  // 4 and 5 are another rank's
      const TestTensor y = random_.Floats(act, {kTokens * kChoices, kSize});
      const TestTensor weights = random_.Floats(DType::kF32, {kTokens, kChoices});
      const TestTensor before = random_.Floats(act, {kTokens, kSize});
      const TestTensor out(act, {kTokens, kSize});
      device_->CopyFromHost(before->raw(), out);
      const Routes routes = {{}, experts, weights, groups};
      ops_.CombineExperts(y, routes, accumulate, out);
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t h = 0; h < kSize; ++h) {
          double sum = accumulate ? At(before, t, h) : 0.0;
          double magnitude = std::abs(sum);
          for (int64_t i = 0; i < At(groups.offsets, 4); ++i) {
            const auto row = static_cast<int64_t>(At(groups.rows, i));
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
      three_threads->ops().CombineExperts(y, routes, accumulate, threaded);
      EXPECT_EQ(BytesOf(threaded), BytesOf(out));
    }
  }
}

INSTANTIATE_ON_EVERY_TARGET(ExpertsTest);

}  // namespace
}  // namespace fathom
