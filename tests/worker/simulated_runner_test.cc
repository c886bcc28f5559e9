#include "worker/simulated_runner.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/worker.pb.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kVocabSize = 50;
const std::vector<int> kEos = {7, 8, 49};

// Written from the words of sim_token.h alone.
int32_t NextAfter(const std::vector<int32_t>& tokens) {
  uint64_t state = 0;
  for (const int32_t token : tokens) {
    uint64_t x = (state ^ token) + 0x9E3779B97F4A7C15;
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9;
    x ^= x >> 27;
    x *= 0x94D049BB133111EB;
    x ^= x >> 31;
    state = x;
  }
  auto next = static_cast<int32_t>(state % kVocabSize);
  while (next == 7 || next == 8 || next == 49) next = (next + 1) % kVocabSize;
  return next;
}

std::vector<int32_t> Continuation(std::vector<int32_t> tokens, int count) {
  const size_t prompt = tokens.size();
  for (int i = 0; i < count; ++i) tokens.push_back(NextAfter(tokens));
  return {tokens.begin() + static_cast<int64_t>(prompt), tokens.end()};
}

class SimulatedRunnerTest : public testing::Test {
 protected:
  static SimulatedRunner Runner(int rank = 0, double step_us = 0) {
    return SimulatedRunner({.epoch = 7,
                            .rank = rank,
                            .slots = {.vocab_size = kVocabSize,
                                      .max_sequences = 4,
                                      .max_model_len = 64,
                                      .max_tokens_per_step = 64,
                                      .max_logit_rows = 64,
                                      .block_size = 16,
                                      .num_kv_blocks = 16},
                            .profile = {.kv_cache_tokens = 256, .fixed_us = step_us},
                            .eos_token_ids = kEos});
  }

  static v1::SequenceAdmission& Admit(v1::StepCommand& command, uint32_t slot,
                                      const std::vector<int32_t>& tokens) {
    v1::SequenceAdmission& admission = *command.add_admitted();
    admission.set_slot(slot);
    admission.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    admission.set_num_prompt_tokens(tokens.size());
    admission.mutable_sampling()->set_seed(slot);  // not greedy: nothing changes
    return admission;
  }

  static void Schedule(v1::StepCommand& command, uint32_t slot, int num_tokens, int blocks = 0) {
    command.add_slots(slot);
    command.add_num_tokens(num_tokens);
    command.add_num_new_blocks(blocks);
    for (int i = 0; i < blocks; ++i) command.add_new_block_ids(slot + 4 * i);
  }

  absl::StatusOr<v1::StepResult> Run(SimulatedRunner& runner, v1::StepCommand command) {
    command.set_epoch(7);
    command.set_step(++step_);
    return runner.Run(command, absl::Now());
  }

  uint64_t step_ = 0;
};

TEST_F(SimulatedRunnerTest, EveryTokenIsTheHashOfAllBeforeIt) {
  SimulatedRunner runner = Runner();
  v1::StepCommand first;
  Admit(first, 0, {3, 1, 4});
  Admit(first, 2, {1, 5, 9, 2, 6});
  Schedule(first, 0, 3, 2);
  Schedule(first, 2, 2, 2);  // in chunks
  auto result = Run(runner, first);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_THAT(result->sampled_slots(), ElementsAre(0));
  std::vector<int32_t> of_0 = {static_cast<int32_t>(result->sampled_token_ids(0))}, of_2;
  for (int step = 0; step < 20; ++step) {
    v1::StepCommand next;
    Schedule(next, 0, 1);
    Schedule(next, 2, step == 0 ? 3 : 1);
    result = Run(runner, next);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_THAT(result->sampled_slots(), ElementsAre(0, 2));
    of_0.push_back(static_cast<int32_t>(result->sampled_token_ids(0)));
    of_2.push_back(static_cast<int32_t>(result->sampled_token_ids(1)));
  }
  EXPECT_EQ(of_0, Continuation({3, 1, 4}, 21));
  EXPECT_EQ(of_2, Continuation({1, 5, 9, 2, 6}, 20));
}

TEST_F(SimulatedRunnerTest, NoTokenEndsASequence) {
  SimulatedRunner runner = Runner();
  bool would_end = false;
  for (int32_t prompt = 0; prompt < kVocabSize; ++prompt) {
    SimPrefix prefix;
    prefix.Append(prompt);
    const int32_t hash = prefix.NextToken(kVocabSize, {});
    would_end |= std::binary_search(kEos.begin(), kEos.end(), hash);
    v1::StepCommand command;
    if (prompt > 0) command.add_released_slots(1);
    Admit(command, 1, {prompt});
    Schedule(command, 1, 1, 1);
    const auto result = Run(runner, command);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(static_cast<int32_t>(result->sampled_token_ids(0)), NextAfter({prompt}));
  }
  EXPECT_TRUE(would_end) << "the vocabulary is too large for this test";
}

TEST_F(SimulatedRunnerTest, ASequenceThatComesBackGoesOnWhereItWas) {
  SimulatedRunner runner = Runner();
  std::vector<int32_t> tokens = {10, 20, 30};
  v1::StepCommand first;
  Admit(first, 1, tokens);
  Schedule(first, 1, 3, 1);
  tokens.push_back(static_cast<int32_t>(Run(runner, first)->sampled_token_ids(0)));
  v1::StepCommand again;  // preempted and readmitted, with another one in its slot
  again.add_released_slots(1);
  Admit(again, 1, {40, 41});
  Admit(again, 3, tokens).set_num_prompt_tokens(3);
  Schedule(again, 1, 2, 1);
  Schedule(again, 3, 4, 1);
  const auto result = Run(runner, again);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->sampled_token_ids(),
              ElementsAre(NextAfter({40, 41}), Continuation({10, 20, 30}, 2)[1]));
}

TEST_F(SimulatedRunnerTest, OtherRanksComputeTheSameAndReportNothing) {
  SimulatedRunner first = Runner(0), other = Runner(3);
  v1::StepCommand admit, next;
  Admit(admit, 0, {1, 2}).mutable_sampling()->set_num_logprobs(2);
  Schedule(admit, 0, 2, 1);
  Schedule(next, 0, 1);
  for (v1::StepCommand& command : std::vector<v1::StepCommand>{admit, next}) {
    command.set_epoch(7);
    command.set_step(++step_);
    ASSERT_TRUE(first.Run(command, absl::Now()).ok());
    const auto result = other.Run(command, absl::Now());
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->step(), step_);
    EXPECT_EQ(result->sampled_slots_size() + result->logprobs_size(), 0);
  }
}

TEST_F(SimulatedRunnerTest, LogprobsAreThoseOfADistribution) {
  SimulatedRunner runner = Runner();
  v1::StepCommand command;
  v1::SequenceAdmission& admission = Admit(command, 0, {3, 1, 4});
  admission.mutable_sampling()->set_num_logprobs(20);
  admission.mutable_sampling()->set_num_prompt_logprobs(1);
  Schedule(command, 0, 3, 1);
  const auto result = Run(runner, command);
  ASSERT_TRUE(result.ok()) << result.status();

  const v1::TokenLogprobs& sampled = result->logprobs(0).logprobs(0);
  EXPECT_EQ(sampled.token_id(), result->sampled_token_ids(0));
  EXPECT_EQ(sampled.rank(), 1u);
  EXPECT_EQ(sampled.top_token_ids(0), sampled.token_id());
  EXPECT_EQ(sampled.top_logprobs(0), sampled.logprob());
  ASSERT_EQ(sampled.top_logprobs_size(), 20);
  EXPECT_TRUE(std::is_sorted(sampled.top_logprobs().rbegin(), sampled.top_logprobs().rend()));
  double sum = 0;
  for (const float logprob : sampled.top_logprobs()) sum += std::exp(logprob);
  EXPECT_LT(sum, 1.0);

  ASSERT_EQ(result->prompt_logprobs_size(), 1);
  ASSERT_EQ(result->prompt_logprobs(0).logprobs_size(), 2);
  const v1::TokenLogprobs& second = result->prompt_logprobs(0).logprobs(1);
  EXPECT_EQ(second.token_id(), 4u);
  EXPECT_THAT(second.top_token_ids(), ElementsAre(NextAfter({3, 1})));
  EXPECT_EQ(second.logprob(), SimLogprob(second.rank()));
  EXPECT_LE(second.logprob(), second.top_logprobs(0));
}

TEST_F(SimulatedRunnerTest, AStepTakesItsTime) {
  SimulatedRunner runner = Runner(0, 20'000);
  v1::StepCommand command;
  Admit(command, 0, {1});
  Schedule(command, 0, 1, 1);
  const absl::Time start = absl::Now();
  const auto result = Run(runner, command);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(20));
  EXPECT_EQ(result->compute_us(), 20'000u);
}

TEST_F(SimulatedRunnerTest, AStepThatWasQueuedBeginsWhenTheOneAheadEndsHoweverLateItIsNoticed) {
  const absl::Time free_at = absl::FromUnixSeconds(100);
  const auto seconds_later = [&](int seconds) { return free_at + absl::Seconds(seconds); };
  EXPECT_EQ(StepStart(/*arrived=*/seconds_later(-1), free_at, /*now=*/seconds_later(3)), free_at);
  EXPECT_EQ(StepStart(seconds_later(1), free_at, seconds_later(3)), seconds_later(3));
  EXPECT_EQ(StepStart(seconds_later(1), absl::InfinitePast(), seconds_later(3)), seconds_later(3));

  SimulatedRunner runner = Runner(0, 20'000);
  const absl::Time start = absl::Now();
  v1::StepCommand command;
  Admit(command, 0, {1});
  Schedule(command, 0, 1, 1);
  ASSERT_TRUE(Run(runner, command).ok());
  command.clear_admitted();
  command.clear_new_block_ids();
  command.set_num_new_blocks(0, 0);
  command.set_epoch(7);
  command.set_step(2);
  const auto result = runner.Run(command, start);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(40));
  EXPECT_EQ(result->compute_us(), 20'000u);
}

TEST_F(SimulatedRunnerTest, ACommandWithoutTokensTakesNone) {
  SimulatedRunner runner = Runner(0, 1e12);
  v1::StepCommand command;
  Admit(command, 0, {1});
  EXPECT_TRUE(Run(runner, command).ok());
}

TEST_F(SimulatedRunnerTest, AnAbortEndsAStepThatWouldTakeLong) {
  SimulatedRunner runner = Runner(2, 1e12);
  v1::StepCommand command;
  Admit(command, 0, {1});
  Schedule(command, 0, 1, 1);
  std::thread aborting([&] { runner.Abort(); });
  const auto result = Run(runner, command);
  aborting.join();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("rank 2, step 1 of epoch 7"));
}

TEST_F(SimulatedRunnerTest, CommandsAreCheckedAsWithAModel) {
  SimulatedRunner runner = Runner();
  v1::StepCommand command;
  command.set_epoch(6);
  command.set_step(1);
  EXPECT_EQ(runner.Run(command, absl::Now()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  command.set_epoch(7);
  command.set_step(2);
  EXPECT_THAT(std::string(runner.Run(command, absl::Now()).status().message()),
              HasSubstr("after step 0"));
  v1::StepCommand wrong;
  Admit(wrong, 0, {kVocabSize});
  const absl::Status status = Run(runner, wrong).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0, step 1 of epoch 7: slot 0: token"));
}

}  // namespace
}  // namespace fathom
