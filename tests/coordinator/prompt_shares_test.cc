// Stories of prompts that share a step: with each other, and with sequences that decode.
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/step_story.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;

class PromptSharesTest : public ::testing::Test {
 protected:
  void Start(Scheduler::Options options) {
    options.block_size = 16;
    if (options.num_kv_blocks == 0) options.num_kv_blocks = 10000;
    scheduler_ = std::make_unique<Scheduler>(options);
  }

  SequenceId Add(int num_prompt_tokens, int max_tokens = 1) {
    Request request;
    request.prompt_token_ids.assign(num_prompt_tokens, 3);
    request.max_tokens = max_tokens;
    scheduler_->Add(++last_id_, std::make_shared<const Request>(std::move(request)));
    return last_id_;
  }

  // What workers would take: a millisecond and ten microseconds a token.
  static StepLoad LoadOf(const Step& step) {
    StepLoad load;
    for (const ScheduledSequence& s : step.scheduled) load.Add(s.num_tokens, s.first_token);
    return load;
  }
  static double Microseconds(const Step& step) { return 1000 + 10 * LoadOf(step).tokens; }

  // One whole step, as "id:tokens".
  Step MakeStep() {
    Step step = scheduler_->Schedule();
    StepOutcome outcome{.number = step.number, .compute_us = Microseconds(step), .sequences = {}};
    for (const ScheduledSequence& s : step.scheduled) {
      outcome.sequences.emplace_back();
      if (s.samples) outcome.sequences.back().sampled_token_id = 7;
    }
    if (!step.empty()) scheduler_->Commit(outcome);
    return step;
  }
  std::vector<std::string> NextStory() { return Story(MakeStep()); }
  static int TokensOf(SequenceId id, const Step& step) {
    for (const ScheduledSequence& s : step.scheduled) {
      if (s.id == id) return s.num_tokens;
    }
    return 0;
  }

  std::unique_ptr<Scheduler> scheduler_;
  SequenceId last_id_ = 0;
};

TEST_F(PromptSharesTest, AShortPromptDoesNotWaitForALongOneBeforeIt) {
  Start({.max_tokens_per_step = 100});
  Add(10000);
  EXPECT_THAT(NextStory(), ElementsAre("1:100"));
  Add(30);
  EXPECT_THAT(NextStory(), ElementsAre("1:70", "2:30*")) << "nothing is left over";
  Add(80);
  EXPECT_THAT(NextStory(), ElementsAre("1:50", "3:50"));
  EXPECT_THAT(NextStory(), ElementsAre("1:70", "3:30*"));
}

TEST_F(PromptSharesTest, PromptsThatAreAlikeAreReadInOrderOfArrival) {
  Start({.max_tokens_per_step = 100});
  for (int i = 0; i < 3; ++i) Add(150);
  EXPECT_THAT(NextStory(), ElementsAre("1:100"));
  EXPECT_THAT(NextStory(), ElementsAre("1:50*", "2:50"));
  EXPECT_THAT(NextStory(), ElementsAre("2:100*"));
  EXPECT_THAT(NextStory(), ElementsAre("3:100"));
}

TEST_F(PromptSharesTest, TheShortestComesFirstAfterTheOldest) {
  Start({.max_tokens_per_step = 100});
  Add(10000);
  Add(5000);
  Add(2000);
  EXPECT_THAT(NextStory(), ElementsAre("1:50", "2:25", "3:25"));
  Add(40);
  EXPECT_THAT(NextStory(), ElementsAre("1:50", "3:25", "2:13", "4:12"));
  EXPECT_THAT(NextStory(), ElementsAre("1:50", "4:28*", "3:22"));
}

TEST_F(PromptSharesTest, NoPromptStarvesWhateverComesAfterIt) {
  Start({.max_tokens_per_step = 100});
  const SequenceId first = Add(2000);
  const SequenceId second = Add(1990);
  std::map<SequenceId, int> num_steps;
  for (int i = 0; i < 200; ++i) {
    Add(60);
    const Step step = MakeStep();
    for (const SequenceId id : {first, second}) {
      if (TokensOf(id, step) > 0) num_steps[id] = i + 1;
    }
  }
  // The oldest has half of every step: 50 tokens.
  EXPECT_LE(num_steps[first], 2000 / 50);
  EXPECT_LE(num_steps[second], (2000 + 1990) / 50 + 1);
}

TEST_F(PromptSharesTest, PromptsGetTheTimeThatDecodingLeaves) {
  Start({.max_tokens_per_step = 2048, .max_sequences = 64, .target_step_us = 5000});
  for (int i = 0; i < 40; ++i) Add(20 + i, 1000);
  while (scheduler_->num_waiting() > 0) MakeStep();
  for (int i = 0; i < 20; ++i) MakeStep();
  const SequenceId prompt = Add(4000);
  int num_steps = 0;
  for (Step step = MakeStep(); TokensOf(prompt, step) > 0; step = MakeStep()) {
    ++num_steps;
    // Nothing like the first ones has been seen before.
    const double tolerance = num_steps <= 3 ? 1.1 : 1.02;
    EXPECT_LE(Microseconds(step), 5000 * tolerance) << num_steps;
    EXPECT_EQ(step.scheduled.size(), 41u) << "all the others decode";
  }
  // 5,000 us are 400 tokens, of which 40 decode. The last chunk may be smaller.
  EXPECT_NEAR(num_steps, 4000 / 360.0, 1.0);
}

TEST_F(PromptSharesTest, PromptsHaveAllTheTimeWhileNothingDecodes) {
  Start({.max_tokens_per_step = 2048, .target_step_us = 2000});
  Add(100, 30);
  for (int i = 0; i < 30; ++i) MakeStep();
  ASSERT_EQ(scheduler_->num_running(), 0);
  Add(10000);
  EXPECT_THAT(NextStory(), ElementsAre("2:2048"));
}

TEST_F(PromptSharesTest, PromptsGoOnWhenDecodingAloneTakesTooLong) {
  Start({.max_tokens_per_step = 2048, .max_sequences = 512, .target_step_us = 1});
  for (int i = 0; i < 400; ++i) Add(20, 1000);
  while (scheduler_->num_waiting() > 0) MakeStep();
  for (int i = 0; i < 20; ++i) MakeStep();
  const SequenceId prompt = Add(1000);
  const Step step = MakeStep();
  // 400 that decode take 5,000 us; 45 % of that are 225 tokens.
  EXPECT_NEAR(TokensOf(prompt, step), 225, 10);
}

TEST_F(PromptSharesTest, PromptsGoOnByAFewTokensWhereTheirTimeIsNotEnoughForOne) {
  Start({.max_tokens_per_step = 2048, .target_step_us = 1});
  Add(20, 1000);
  for (int i = 0; i < 20; ++i) MakeStep();
  const SequenceId prompt = Add(1000);
  EXPECT_GE(TokensOf(prompt, MakeStep()), Scheduler::kLeastPromptTokens);
}

TEST_F(PromptSharesTest, PromptsGoOnWhenMoreDecodeThanAStepHasTokens) {
  Start({.max_tokens_per_step = 40, .max_sequences = 64});
  const SequenceId prompt = Add(1000);
  MakeStep();
  for (int i = 0; i < 60; ++i) Add(1, 1000);
  for (int i = 0; i < 10; ++i) MakeStep();
  EXPECT_EQ(scheduler_->num_running(), 61);
  EXPECT_EQ(TokensOf(prompt, MakeStep()), Scheduler::kLeastPromptTokens);
}

}  // namespace
}  // namespace fathom
