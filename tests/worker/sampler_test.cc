#include "worker/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "gtest/gtest.h"
#include "proto/sampling.pb.h"
#include "worker/philox.h"

namespace fathom {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A sequence's view of the sampler: set `params`, `counts`, ask.
class SamplerTest : public testing::Test {
 protected:
  static constexpr uint64_t kSeed = 20240917;
  SamplerTest() : random_(kSeed) { std::printf("seed %llu\n", (unsigned long long)kSeed); }

  int32_t Sample(const std::vector<float>& logits, int64_t position = 0) {
    Sampler sampler(static_cast<int>(logits.size()));
    absl::StatusOr<int32_t> token = sampler.Sample(
        logits,
        {.params = params, .counts = counts, .output_token_ids = output, .position = position});
    EXPECT_TRUE(token.ok()) << token.status();
    return token.value_or(-1);
  }

  std::vector<float> RandomLogits(int vocab_size, float spread) {
    std::normal_distribution<float> normal(0.0f, spread);
    std::vector<float> logits(vocab_size);
    for (float& logit : logits) logit = normal(random_);
    return logits;
  }

  // Draws many tokens and compares with the expected probabilities. Laurent and Massart (2000):
  // a chi-square of d degrees exceeds d + 2 sqrt(d x) + 2 x with probability at most exp(-x);
  // x = 20 makes that 2e-9.
  void ExpectDistribution(const std::vector<float>& logits, const std::vector<double>& expected) {
    constexpr int kDraws = 20000;
    std::vector<int> seen(logits.size());
    for (int position = 0; position < kDraws; ++position) ++seen[Sample(logits, position)];
    double chi_square = 0.0;
    int degrees = -1;
    for (size_t id = 0; id < logits.size(); ++id) {
      if (expected[id] == 0.0) {
        EXPECT_EQ(seen[id], 0) << "token " << id;
        continue;
      }
      ++degrees;
      const double mean = expected[id] * kDraws;
      chi_square += (seen[id] - mean) * (seen[id] - mean) / mean;
    }
    EXPECT_LE(chi_square, degrees + 2.0 * std::sqrt(degrees * 20.0) + 2.0 * 20.0);
  }

  std::mt19937_64 random_;
  SamplingParams params;
  TokenCounts counts;
  std::vector<int32_t> output;
};

// The stages after the penalties, as simply as they can be written.
int32_t ReferenceDraw(const std::vector<float>& logits, const SamplingParams& params,
                      int64_t position) {
  const int n = static_cast<int>(logits.size());
  const double best = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(n);
  for (int id = 0; id < n; ++id) {
    weights[id] = std::exp((logits[id] - best) * (1.0 / params.temperature));
    if (weights[id] < params.min_p) weights[id] = 0.0;
  }
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (params.top_k > 0) {
    for (int place = params.top_k; place < n; ++place) weights[order[place]] = 0.0;
  }
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double before = 0.0;
  for (const int id : order) {
    const double weight = weights[id];
    if (before > 0.0 && before >= params.top_p * total) weights[id] = 0.0;
    before += weight;
  }
  total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double target = PhiloxUniform(params.seed, position) * total;
  double cumulative = 0.0;
  for (int id = 0; id < n; ++id) {
    cumulative += weights[id];
    if (target < cumulative) return id;
  }
  return -1;
}

TEST_F(SamplerTest, DrawsFromTheSoftmaxOfTheLogits) {
  const std::vector<float> logits = RandomLogits(12, 1.0f);
  std::vector<double> expected(logits.size());
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(logit);
  for (size_t id = 0; id < logits.size(); ++id) expected[id] = std::exp(logits[id]) / sum;
  ExpectDistribution(logits, expected);
}

TEST_F(SamplerTest, TemperatureFlattensTheDistribution) {
  params.temperature = 3.0f;
  const std::vector<float> logits = {0.0f, 3.0f, 6.0f};
  const double sum = 1.0 + std::exp(1.0) + std::exp(2.0);
  ExpectDistribution(logits, {1.0 / sum, std::exp(1.0) / sum, std::exp(2.0) / sum});
}

TEST_F(SamplerTest, TopPKeepsTheTokenThatReachesItAndDropsTheRest) {
  // Shares 0.5, 0.3, 0.15, 0.05: the first two reach 0.8, the third passes 0.9.
  const std::vector<float> logits = {std::log(0.15f), std::log(0.5f), std::log(0.05f),
                                     std::log(0.3f)};
  params.top_p = 0.79f;
  ExpectDistribution(logits, {0.0, 0.5 / 0.8, 0.0, 0.3 / 0.8});
  params.top_p = 0.9f;
  ExpectDistribution(logits, {0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95});
}

TEST_F(SamplerTest, MinPComesBeforeTopKAndTopP) {
  // Shares 0.4, 0.3, 0.2, 0.1. min_p drops 0.1, so that 0.7 / 0.9 = 0.778 of the rest reaches
  // top_p = 0.75 with two tokens; without min_p it would take three.
  const std::vector<float> logits = {std::log(0.4f), std::log(0.3f), std::log(0.2f),
                                     std::log(0.1f)};
  params.top_p = 0.75f;
  ExpectDistribution(logits, {0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9, 0.0});
  params.min_p = 0.3f;
  ExpectDistribution(logits, {0.4 / 0.7, 0.3 / 0.7, 0.0, 0.0});
}

TEST_F(SamplerTest, AgreesWithAPlainReferenceForManySettings) {
  for (int trial = 0; trial < 400; ++trial) {
    const int vocab_size = std::uniform_int_distribution<int>(2, 600)(random_);
    std::vector<float> logits = RandomLogits(vocab_size, trial % 3 == 0 ? 0.2f : 4.0f);
    if (trial % 5 == 0) {  // many ties
      for (float& logit : logits) logit = std::round(logit);
    }
    std::uniform_real_distribution<float> share(0.0f, 1.0f);
    params = SamplingParams();
    params.temperature = 0.05f + 2.0f * share(random_);
    params.seed = random_();
    if (trial % 2 == 0) params.top_p = std::max(0.001f, share(random_));
    if (trial % 3 != 0) params.top_k = std::uniform_int_distribution<int>(0, vocab_size)(random_);
    if (trial % 4 == 0) params.min_p = 0.3f * share(random_);
    for (int64_t position = 0; position < 8; ++position) {
      ASSERT_EQ(Sample(logits, position), ReferenceDraw(logits, params, position))
          << "trial " << trial << " temperature " << params.temperature << " top_k " << params.top_k
          << " top_p " << params.top_p << " min_p " << params.min_p;
    }
  }
}

TEST_F(SamplerTest, GreedyTakesTheLowestOfEquallyGoodTokens) {
  params.temperature = 0.0f;
  EXPECT_EQ(Sample({1.0f, 5.0f, -2.0f, 5.0f}), 1);
  EXPECT_EQ(Sample({-1.0f, -1.0f}), 0);
}

TEST_F(SamplerTest, TopKOfOneIsGreedyEvenWhenTokensTie) {
  params.top_k = 1;
  for (int64_t position = 0; position < 50; ++position) {
    EXPECT_EQ(Sample({1.0f, 5.0f, -2.0f, 5.0f}, position), 1);
  }
}

TEST_F(SamplerTest, TinyTopPIsGreedy) {
  params.top_p = 1e-6f;
  const std::vector<float> logits = RandomLogits(300, 0.01f);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  for (int64_t position = 0; position < 50; ++position) EXPECT_EQ(Sample(logits, position), best);
}

TEST_F(SamplerTest, TheSameSeedAndPositionGiveTheSameTokenWhateverCameBefore) {
  const std::vector<float> logits = RandomLogits(200, 1.0f);
  params.seed = 99;
  std::vector<int32_t> whole;
  for (int64_t position = 0; position < 40; ++position) whole.push_back(Sample(logits, position));

  // One sampler that was used for other rows, and that resumes in the middle.
  Sampler used(200);
  SamplingParams others;
  others.top_k = 3;
  for (int64_t position = 20; position < 40; ++position) {
    ASSERT_TRUE(used.Sample(RandomLogits(200, 2.0f), {.params = others, .counts = counts}).ok());
    EXPECT_EQ(*used.Sample(logits, {.params = params, .counts = counts, .position = position}),
              whole[position]);
  }
  params.seed = 100;
  std::vector<int32_t> different;
  for (int64_t position = 0; position < 40; ++position) {
    different.push_back(Sample(logits, position));
  }
  EXPECT_NE(whole, different);
}

TEST_F(SamplerTest, LogitBiasShiftsAndForbids) {
  params.temperature = 0.0f;
  params.logit_bias = {{2, 4.0f}};
  EXPECT_EQ(Sample({1.0f, 3.0f, 0.0f}), 2);
  params.logit_bias = {{1, -100.0f}};
  EXPECT_EQ(Sample({1.0f, 3.0f, 0.0f}), 0);
}

TEST_F(SamplerTest, RepetitionPenaltyCountsPromptAndOutputAndPushesDownOnBothSidesOfZero) {
  params.temperature = 0.0f;
  params.repetition_penalty = 2.0f;
  counts.AddPromptToken(0);
  EXPECT_EQ(Sample({4.0f, 2.5f}), 1);    // 4 / 2 < 2.5
  EXPECT_EQ(Sample({4.0f, 1.5f}), 0);    // 4 / 2 > 1.5
  EXPECT_EQ(Sample({-1.0f, -1.5f}), 1);  // -1 * 2 < -1.5
  counts.AddOutputToken(1);
  EXPECT_EQ(Sample({4.0f, 2.5f}), 0);  // both halved now, and only once each
  counts.AddOutputToken(1);
  EXPECT_EQ(Sample({2.0f, 3.0f}), 1);
}

TEST_F(SamplerTest, PresenceAndFrequencyPenaltiesCountTheOutputOnly) {
  params.temperature = 0.0f;
  params.presence_penalty = 1.0f;
  counts.AddPromptToken(0);
  EXPECT_EQ(Sample({2.0f, 1.5f}), 0);
  counts.AddOutputToken(0);
  EXPECT_EQ(Sample({2.0f, 1.5f}), 1);  // 2 - 1
  counts.AddOutputToken(0);
  EXPECT_EQ(Sample({2.0f, 0.9f}), 0);  // still 2 - 1

  params.presence_penalty = 0.0f;
  params.frequency_penalty = 0.75f;
  EXPECT_EQ(Sample({2.0f, 0.4f}), 0);  // 2 - 2 * 0.75 = 0.5
  counts.AddOutputToken(0);
  EXPECT_EQ(Sample({2.0f, 0.4f}), 1);  // 2 - 3 * 0.75 < 0
}

TEST_F(SamplerTest, BiasComesBeforeTheRepetitionPenalty) {
  params.temperature = 0.0f;
  params.repetition_penalty = 2.0f;
  params.logit_bias = {{0, 3.0f}};
  counts.AddPromptToken(0);
  // (1 + 3) / 2 = 2 < 2.5; the other way round 1 / 2 + 3 = 3.5 would win.
  EXPECT_EQ(Sample({1.0f, 2.5f}), 1);
}

TEST_F(SamplerTest, StopTokensWaitForMinTokens) {
  params.temperature = 0.0f;
  params.stop_token_ids = {1, 2};
  params.min_tokens = 3;
  params.logit_bias = {{1, 100.0f}};  // cannot lift a ban
  const std::vector<float> logits = {0.0f, 9.0f, 8.0f, 1.0f};
  output = {0, 0};
  EXPECT_EQ(Sample(logits), 3);
  output = {0, 0, 0};
  EXPECT_EQ(Sample(logits), 1);
}

TEST_F(SamplerTest, OnlyAllowedTokensAreSampled) {
  params.allowed_token_ids = {3, 1};
  params.logit_bias = {{0, 100.0f}};  // cannot lift a ban
  std::map<int32_t, int> seen;
  for (int64_t position = 0; position < 200; ++position) {
    ++seen[Sample({50.0f, 0.0f, 50.0f, 0.1f}, position)];
  }
  EXPECT_EQ(seen.size(), 2u);
  EXPECT_GT(seen[1], 0);
  EXPECT_GT(seen[3], 0);
}

TEST_F(SamplerTest, ABadWordIsNotCompleted) {
  params.temperature = 0.0f;
  params.bad_words = {{2, 0}, {1, 1, 3}};
  const std::vector<float> logits = {9.0f, 5.0f, 1.0f, 7.0f};
  EXPECT_EQ(Sample(logits), 0) << "nothing stands before it";
  output = {2};
  EXPECT_EQ(Sample(logits), 3);
  output = {1, 1};
  EXPECT_EQ(Sample(logits), 0);
  params.bad_words.push_back({0});
  EXPECT_EQ(Sample(logits), 1) << "a word of one token is banned everywhere";
  output = {1, 2};
  EXPECT_EQ(Sample(logits), 3) << "only the whole beginning counts";
}

TEST_F(SamplerTest, AllowedTokensThatAreAllBadWordsAreAFault) {
  params.allowed_token_ids = {1};
  params.bad_words = {{1}};
  Sampler sampler(3);
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f};
  EXPECT_EQ(sampler.Sample(logits, {.params = params, .counts = counts}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(SamplerTest, ABannedTokenStaysBannedUnderPenalties) {
  params.stop_token_ids = {0};
  params.min_tokens = 1;
  params.repetition_penalty = 0.5f;
  params.presence_penalty = -2.0f;
  counts.AddOutputToken(0);
  for (int64_t position = 0; position < 50; ++position) {
    EXPECT_EQ(Sample({50.0f, 0.0f}, position), 1);
  }
}

TEST_F(SamplerTest, ARowThatIsNotFiniteIsAFaultThatNamesThePosition) {
  Sampler sampler(3);
  for (const float bad : {kInfinity, -kInfinity, std::nanf("")}) {
    const std::vector<float> logits = {0.0f, bad, 1.0f};
    const absl::Status fault =
        sampler.Sample(logits, {.params = params, .counts = counts, .position = 17}).status();
    EXPECT_EQ(fault.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(fault.message(), "logits are not finite at position 17");
    EXPECT_EQ(sampler.Logprobs(logits, 0, 1, 17).status(), fault);
  }
  EXPECT_EQ(Sample({0.0f, 100.0f, 1.0f}), 1);
}

TEST_F(SamplerTest, WhatAGrammarDoesNotAllowIsNeverSampled) {
  constexpr int kTokens = 70;  // the last word of the mask is not full
  std::vector<uint32_t> mask(3);
  for (const int id : {0, 33, 64, 69}) mask[id / 32] |= uint32_t{1} << (id % 32);
  std::vector<float> logits = RandomLogits(kTokens, 2.0f);
  Sampler sampler(kTokens);
  std::map<int32_t, int> seen;
  for (int position = 0; position < 2000; ++position) {
    ++seen[*sampler.Sample(logits, {.params = params,
                                    .counts = counts,
                                    .output_token_ids = {},
                                    .position = position,
                                    .allowed = mask})];
  }
  for (const auto& [id, count] : seen) {
    EXPECT_NE(mask[id / 32] >> (id % 32) & 1, 0u) << "token " << id;
  }
  EXPECT_GT(seen.size(), 1);

  mask.assign(3, 0);
  EXPECT_TRUE(absl::IsInvalidArgument(sampler
                                          .Sample(logits, {.params = params,
                                                           .counts = counts,
                                                           .output_token_ids = {},
                                                           .position = 5,
                                                           .allowed = mask})
                                          .status()));
}

TEST_F(SamplerTest, WhereTheGrammarEndsMinTokensGivesWay) {
  params.stop_token_ids = {2, 2};
  params.min_tokens = 5;
  const std::vector<float> logits = {0.0f, 1.0f, 9.0f};
  Sampler sampler(3);
  const auto sample = [&](uint32_t allowed) {
    return *sampler.Sample(logits, {.params = params,
                                    .counts = counts,
                                    .position = 5,
                                    .allowed = absl::MakeSpan(&allowed, 1)});
  };
  EXPECT_NE(sample(0b111), 2);
  EXPECT_EQ(sample(0b110), 1);
  EXPECT_EQ(sample(0b100), 2);
}

TEST_F(SamplerTest, BanningTheWholeVocabularyIsAFault) {
  params.stop_token_ids = {0, 1};
  params.min_tokens = 1;
  Sampler sampler(2);
  const std::vector<float> logits = {0.0f, 1.0f};
  EXPECT_EQ(sampler.Sample(logits, {.params = params, .counts = counts}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(SamplerTest, APenaltyThatOverflowsIsAFault) {
  params.repetition_penalty = 1e-38f;
  counts.AddPromptToken(0);
  Sampler sampler(2);
  const std::vector<float> logits = {1e4f, 1.0f};
  EXPECT_FALSE(sampler.Sample(logits, {.params = params, .counts = counts}).ok());
}

TEST_F(SamplerTest, LogprobsAreTheLogSoftmaxOfTheRawLogits) {
  const std::vector<float> logits = RandomLogits(500, 5.0f);
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  Sampler sampler(500);
  const absl::StatusOr<TokenLogprobs> result = sampler.Logprobs(logits, 123, 20, 0);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->token_id, 123);
  // Computed in F64 and rounded once to F32: half a unit in the last place of a number below 64.
  EXPECT_NEAR(result->logprob, logits[123] - std::log(sum), 2e-6);
  int better = 0;
  for (const float logit : logits) better += logit > logits[123] ? 1 : 0;
  EXPECT_EQ(result->rank, better + 1);

  std::vector<int32_t> order(500);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  EXPECT_EQ(result->top_token_ids, std::vector<int32_t>(order.begin(), order.begin() + 20));
  for (int i = 0; i < 20; ++i) {
    EXPECT_NEAR(result->top_logprobs[i], logits[order[i]] - std::log(sum), 2e-6);
  }
}

TEST_F(SamplerTest, LogprobTiesGoToTheLowerId) {
  Sampler sampler(4);
  const std::vector<float> logits = {1.0f, 2.0f, 2.0f, 0.0f};
  EXPECT_EQ(sampler.Logprobs(logits, 1, 2, 0)->rank, 1);
  EXPECT_EQ(sampler.Logprobs(logits, 2, 2, 0)->rank, 2);
  EXPECT_EQ(sampler.Logprobs(logits, 2, 3, 0)->top_token_ids, (std::vector<int32_t>{1, 2, 0}));
  EXPECT_TRUE(sampler.Logprobs(logits, 2, 0, 0)->top_token_ids.empty());
  EXPECT_EQ(sampler.Logprobs(logits, 3, 9, 0)->top_token_ids.size(), 4u);
}

TEST_F(SamplerTest, LogprobsOfHugeLogitsDoNotOverflow) {
  Sampler sampler(2);
  const std::vector<float> logits = {3e38f, -3e38f};
  EXPECT_EQ(sampler.Logprobs(logits, 0, 0, 0)->logprob, 0.0f);
  params.temperature = 0.01f;
  EXPECT_EQ(Sample(logits), 0);
}

TEST(SamplingParamsTest, AbsentFieldsAreNeutral) {
  const absl::StatusOr<SamplingParams> params = ParseSamplingParams(v1::SamplingParams(), 10);
  ASSERT_TRUE(params.ok());
  EXPECT_EQ(params->temperature, 1.0f);
  EXPECT_FALSE(params->greedy());
  EXPECT_FALSE(params->has_penalties());
  EXPECT_EQ(params->num_logprobs, std::nullopt);
}

TEST(SamplingParamsTest, LowTemperaturesAreGreedyOrRaised) {
  v1::SamplingParams message;
  message.set_temperature(0.9e-5f);
  EXPECT_TRUE(ParseSamplingParams(message, 10)->greedy());
  message.set_temperature(1e-4f);
  EXPECT_EQ(ParseSamplingParams(message, 10)->temperature, 0.01f);
  message.set_temperature(0.5f);
  EXPECT_EQ(ParseSamplingParams(message, 10)->temperature, 0.5f);
}

TEST(SamplingParamsTest, EveryFieldIsCheckedAndNamed) {
  using Message = v1::SamplingParams;
  const float nan = std::nanf("");
  const std::vector<std::pair<std::string, std::function<void(Message&)>>> cases = {
      {"temperature", [](Message& m) { m.set_temperature(-1.0f); }},
      {"temperature", [&](Message& m) { m.set_temperature(nan); }},
      {"temperature", [](Message& m) { m.set_temperature(kInfinity); }},
      {"top_p", [](Message& m) { m.set_top_p(0.0f); }},
      {"top_p", [](Message& m) { m.set_top_p(1.1f); }},
      {"top_p", [&](Message& m) { m.set_top_p(nan); }},
      {"min_p", [](Message& m) { m.set_min_p(-0.1f); }},
      {"min_p", [](Message& m) { m.set_min_p(1.5f); }},
      {"repetition_penalty", [](Message& m) { m.set_repetition_penalty(0.0f); }},
      {"repetition_penalty", [](Message& m) { m.set_repetition_penalty(kInfinity); }},
      {"presence_penalty", [](Message& m) { m.set_presence_penalty(2.5f); }},
      {"frequency_penalty", [](Message& m) { m.set_frequency_penalty(-2.5f); }},
      {"frequency_penalty", [&](Message& m) { m.set_frequency_penalty(nan); }},
      {"logit_bias", [](Message& m) { m.add_logit_bias()->set_token_id(10); }},
      {"logit_bias", [](Message& m) { m.add_logit_bias()->set_bias(101.0f); }},
      {"logit_bias",
       [](Message& m) {
         for (int i = 0; i <= SamplingParams::kMaxListEntries; ++i) m.add_logit_bias();
       }},
      {"stop_token_ids", [](Message& m) { m.add_stop_token_ids(4000000000u); }},
      {"num_logprobs", [](Message& m) { m.set_num_logprobs(11); }},
      {"num_prompt_logprobs", [](Message& m) { m.set_num_prompt_logprobs(4000000000u); }},
  };
  for (const auto& [field, spoil] : cases) {
    Message message;
    spoil(message);
    const absl::Status status = ParseSamplingParams(message, 10).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_EQ(status.message().substr(0, field.size()), field) << status;
  }
}

TEST(SamplingParamsTest, HugeCountsAreClamped) {
  v1::SamplingParams message;
  message.set_top_k(4000000000u);
  message.set_min_tokens(4000000000u);
  const absl::StatusOr<SamplingParams> params = ParseSamplingParams(message, 10);
  ASSERT_TRUE(params.ok());
  EXPECT_EQ(params->top_k, 10);
  EXPECT_EQ(params->min_tokens, INT32_MAX);
}

}  // namespace
}  // namespace fathom
