#include "coordinator/step_cost.h"

#include <cmath>
#include <functional>
#include <iostream>
#include <random>

#include "gtest/gtest.h"
#include "worker/sim_profile.h"

namespace fathom {
namespace {

// One of eight ranks of DeepSeek-V3 on an H200, at the roofline: bench/profiles/h200.json.
SimProfile Roofline() {
  return {.kv_cache_tokens = 677491,
          .fixed_us = 976,
          .us_per_token = 8.54,
          .roofline = SimRoofline{.memory_bytes_per_second = 4.3e12,
                                  .weight_bytes = 3.1478e9,
                                  .expert_bytes = 3.1937e8,
                                  .num_experts = 256,
                                  .num_experts_per_token = 8,
                                  .kv_bytes_per_token = 70272,
                                  .linear_flops_per_token = 1.0958e10,
                                  .linear_flops_per_second = 1e15,
                                  .attention_flops_per_pair = 624640,
                                  .attention_flops_per_second = 6e14}};
}

double TimeOf(const SimProfile& profile, const StepLoad& load) {
  return StepMicroseconds(profile, {.tokens = load.tokens,
                                    .sequences = load.sequences,
                                    .context_tokens = load.context_tokens,
                                    .attention_pairs = load.attention_pairs});
}

class StepCostTest : public ::testing::Test {
 protected:
  StepCostTest() : seed_(std::random_device()()), random_(seed_) {
    std::cout << "seed " << seed_ << "\n";
  }

  int Between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  // So many sequences decode, with about 2,300 tokens each.
  StepLoad Decoding(int num_sequences) {
    StepLoad load;
    for (int i = 0; i < num_sequences; ++i) load.Add(1, Between(2048, 2560));
    return load;
  }
  // The steps of a server under a load that changes: decoding, prompts, and both together.
  StepLoad AnyStep() {
    StepLoad load;
    if (Between(0, 9) > 0) load = Decoding(1 << Between(0, 9));
    if (load.tokens == 0 || Between(0, 3) == 0) load.Add(Between(1, 4096), Between(0, 8192));
    return load;
  }
  void Learn(int num_steps, const std::function<double(const StepLoad&)>& time_of) {
    for (int i = 0; i < num_steps; ++i) {
      const StepLoad load = AnyStep();
      cost_.Learn(load, time_of(load));
    }
  }
  // Of so many steps: the mean and the largest of the errors, as shares of the time.
  struct Errors {
    double mean = 0;
    double largest = 0;
  };
  Errors ErrorsAgainst(const SimProfile& profile) {
    constexpr int kSteps = 1000;
    Errors errors;
    for (int i = 0; i < kSteps; ++i) {
      const StepLoad load = AnyStep();
      const double truth = TimeOf(profile, load);
      const double error = std::abs(cost_.Predict(load) - truth) / truth;
      errors.mean += error / kSteps;
      errors.largest = std::max(errors.largest, error);
    }
    std::cout << "errors " << errors.mean << " on average, " << errors.largest << " at most\n";
    return errors;
  }

  const uint64_t seed_;
  std::mt19937_64 random_;
  StepCost cost_;
};

TEST_F(StepCostTest, SaysNothingBeforeItHasSeenAStep) {
  EXPECT_EQ(cost_.Predict(Decoding(8)), 0);
  cost_.Learn(Decoding(8), 0);  // a worker that does not say
  EXPECT_EQ(cost_.Predict(Decoding(8)), 0);
}

TEST_F(StepCostTest, CountsTheLoadOfASequence) {
  StepLoad load;
  load.Add(3, 10);  // its tokens see 11, 12 and 13
  load.Add(1, 4);
  EXPECT_EQ(load.tokens, 4);
  EXPECT_EQ(load.sequences, 2);
  EXPECT_EQ(load.context_tokens, 18);
  EXPECT_EQ(load.attention_pairs, 36 + 5);
}

TEST_F(StepCostTest, LearnsALinearCostExactly) {
  const SimProfile linear{
      .fixed_us = 900, .us_per_token = 20, .us_per_sequence = 3, .us_per_context_token = 0.01};
  Learn(400, [&](const StepLoad& load) { return TimeOf(linear, load); });
  // Rounding and the slight preference for smoothness are all that is left.
  EXPECT_LT(ErrorsAgainst(linear).largest, 1e-3);
  EXPECT_LT(cost_.mean_error(), 0.01);
}

TEST_F(StepCostTest, LearnsAConstantCost) {
  const SimProfile constant{.fixed_us = 20000};
  Learn(50, [&](const StepLoad& load) { return TimeOf(constant, load); });
  EXPECT_LT(ErrorsAgainst(constant).largest, 1e-3);
}

TEST_F(StepCostTest, LearnsARoofline) {
  Learn(1000, [](const StepLoad& load) { return TimeOf(Roofline(), load); });
  // The bends of the roofline lie between powers of two, and where memory or arithmetic decides the
  // model adds up what really overlaps: a few percent, and more where few steps have been.
  const Errors errors = ErrorsAgainst(Roofline());
  EXPECT_LT(errors.mean, 0.03);
  EXPECT_LT(errors.largest, 0.25);
}

TEST_F(StepCostTest, LearnsFromTimesThatVary) {
  std::normal_distribution<double> noise(1.0, 0.05);
  Learn(1000, [&](const StepLoad& load) { return TimeOf(Roofline(), load) * noise(random_); });
  EXPECT_LT(ErrorsAgainst(Roofline()).mean, 0.06);
}

TEST_F(StepCostTest, KnowsWhatAPromptCostsAfterALongTimeOfDecoding) {
  Learn(500, [](const StepLoad& load) { return TimeOf(Roofline(), load); });
  for (int i = 0; i < 20000; ++i) {
    const StepLoad load = Decoding(64);
    cost_.Learn(load, TimeOf(Roofline(), load));
  }
  StepLoad load = Decoding(64);
  load.Add(2048, 0);
  EXPECT_NEAR(cost_.Predict(load) / TimeOf(Roofline(), load), 1, 0.1);
}

TEST_F(StepCostTest, FollowsAMachineThatBecomesSlower) {
  Learn(500, [](const StepLoad& load) { return TimeOf(Roofline(), load); });
  for (int i = 0; i < 200; ++i) cost_.Learn(Decoding(64), 1.5 * TimeOf(Roofline(), Decoding(64)));
  EXPECT_NEAR(cost_.Predict(Decoding(64)) / TimeOf(Roofline(), Decoding(64)), 1.5, 0.1);
}

TEST_F(StepCostTest, NeverGetsCheaperByDoingMore) {
  std::uniform_real_distribution<double> any(1, 1e5);
  Learn(500, [&](const StepLoad&) { return any(random_); });
  for (int i = 0; i < 1000; ++i) {
    const StepLoad load = AnyStep();
    const double before = cost_.Predict(load);
    EXPECT_GE(before, 0);
    StepLoad more = load;
    more.Add(Between(1, 10000), Between(0, 100000));
    EXPECT_GE(cost_.Predict(more), before);
  }
}

}  // namespace
}  // namespace fathom
