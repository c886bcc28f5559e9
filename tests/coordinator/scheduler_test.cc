#include "coordinator/scheduler.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/step_story.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// What the stories below are told with: requests of so many tokens, steps, and what came of them.
class SchedulerTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kToken = 7;  // what every sequence samples unless told otherwise

  void Start(Scheduler::Options options) { scheduler_ = std::make_unique<Scheduler>(options); }

  static Request Asking(int num_prompt_tokens, int max_tokens) {
    Request request;
    request.prompt_token_ids.assign(num_prompt_tokens, 3);
    request.max_tokens = max_tokens;
    return request;
  }

  SequenceId Add(Request request) {
    scheduler_->Add(++last_id_, std::make_shared<const Request>(std::move(request)));
    return last_id_;
  }
  SequenceId Add(int num_prompt_tokens, int max_tokens) {
    return Add(Asking(num_prompt_tokens, max_tokens));
  }

  std::vector<SequenceUpdate> Commit(const Step& step, uint32_t token_id = kToken) {
    StepOutcome outcome;
    for (const ScheduledSequence& scheduled : step.scheduled) {
      outcome.sequences.emplace_back();
      if (scheduled.samples) outcome.sequences.back().sampled_token_id = token_id;
    }
    return scheduler_->Commit(step, outcome);
  }

  // One whole step.
  std::vector<SequenceUpdate> MakeStep(uint32_t token_id = kToken) {
    return Commit(scheduler_->Schedule(), token_id);
  }

  void ExpectAllFree() {
    EXPECT_EQ(scheduler_->num_running(), 0);
    EXPECT_EQ(scheduler_->num_waiting(), 0);
    EXPECT_EQ(scheduler_->num_free_blocks(), scheduler_->num_blocks());
    EXPECT_TRUE(scheduler_->Schedule().empty());
  }

  std::unique_ptr<Scheduler> scheduler_;
  SequenceId last_id_ = 0;
};

TEST_F(SchedulerTest, HasNothingToDoWhenThereIsNoRequest) {
  Start({.num_kv_blocks = 4});
  EXPECT_TRUE(scheduler_->Schedule().empty());
}

TEST_F(SchedulerTest, ReadsThePromptThenSamplesOneTokenPerStep) {
  Start({.block_size = 4, .num_kv_blocks = 8});
  const SequenceId id = Add(5, 3);

  const Step first = scheduler_->Schedule();
  EXPECT_EQ(first.number, 1);
  ASSERT_THAT(first.admitted, SizeIs(1));
  EXPECT_EQ(first.admitted[0].sequence->id, id);
  EXPECT_EQ(first.admitted[0].num_computed, 0);
  EXPECT_THAT(Story(first), ElementsAre("1:5*"));
  EXPECT_THAT(first.new_block_ids, ElementsAre(0, 1));
  std::vector<SequenceUpdate> updates = Commit(first);
  ASSERT_THAT(updates, SizeIs(1));
  EXPECT_EQ(updates[0].token_id, kToken);
  EXPECT_EQ(updates[0].num_prompt_tokens_done, 5);
  EXPECT_FALSE(updates[0].end.has_value());

  const Step second = scheduler_->Schedule();
  EXPECT_THAT(second.admitted, IsEmpty());
  EXPECT_THAT(Story(second), ElementsAre("1:1*"));
  EXPECT_THAT(second.new_block_ids, IsEmpty());
  EXPECT_EQ(Commit(second)[0].num_prompt_tokens_done, 0);

  updates = MakeStep();
  EXPECT_EQ(updates[0].end, EndReason::kLength);
  EXPECT_EQ(updates[0].num_generated_tokens, 3);
  ExpectAllFree();
}

TEST_F(SchedulerTest, TakesABlockOnlyWhenTheLastOneIsFull) {
  Start({.block_size = 2, .num_kv_blocks = 8});
  Add(2, 5);
  std::vector<size_t> num_new_blocks;
  for (int i = 0; i < 5; ++i) {
    const Step step = scheduler_->Schedule();
    num_new_blocks.push_back(step.new_block_ids.size());
    Commit(step);
  }
  EXPECT_THAT(num_new_blocks, ElementsAre(1, 1, 0, 1, 0));
}

TEST_F(SchedulerTest, CutsALongPromptIntoChunksAndMixesItWithDecoding) {
  Start({.max_tokens_per_step = 8, .num_kv_blocks = 16});
  Add(3, 10);
  MakeStep();
  Add(18, 10);
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("1:1*", "2:7"));
  EXPECT_FALSE(Commit(second)[1].token_id.has_value());
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(third), ElementsAre("1:1*", "2:7"));
  Commit(third);
  const Step fourth = scheduler_->Schedule();
  EXPECT_THAT(Story(fourth), ElementsAre("1:1*", "2:4*"));
  const std::vector<SequenceUpdate> updates = Commit(fourth);
  EXPECT_EQ(updates[1].num_prompt_tokens_done, 4);
  EXPECT_EQ(updates[1].token_id, kToken);
}

TEST_F(SchedulerTest, ServesWaitingRequestsInOrderOfArrivalWithinTheBudget) {
  Start({.max_tokens_per_step = 10, .num_kv_blocks = 16});
  for (int i = 0; i < 4; ++i) Add(4, 2);
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:4*", "2:4*", "3:2"));
  EXPECT_EQ(scheduler_->num_running(), 3);
  EXPECT_EQ(scheduler_->num_waiting(), 1);
}

TEST_F(SchedulerTest, NeverRunsMoreSequencesThanThereAreSlots) {
  Start({.max_sequences = 2, .num_kv_blocks = 16});
  for (int i = 0; i < 3; ++i) Add(1, 1);
  const Step first = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("1:1*", "2:1*"));
  Commit(first);
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("3:1*"));
  EXPECT_THAT(second.released_slots, ::testing::UnorderedElementsAre(0, 1));
}

TEST_F(SchedulerTest, LetsTheFirstThatDoesNotFitBlockThoseBehindIt) {
  Start({.block_size = 4, .num_kv_blocks = 4});
  Add(8, 4);  // takes two blocks and will want a third
  MakeStep();
  Add(8, 4);  // would need two
  Add(1, 1);  // would fit, but it came later
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:1*"));
  EXPECT_EQ(scheduler_->num_waiting(), 2);
}

TEST_F(SchedulerTest, DoesNotAdmitAPromptWhoseLaterChunksWouldNotFit) {
  Start({.max_tokens_per_step = 4, .block_size = 4, .num_kv_blocks = 5});
  Add(8, 4);
  MakeStep();
  MakeStep();
  Add(12, 1);  // its first chunk would fit into the two free blocks, the rest would not
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:1*"));
}

TEST_F(SchedulerTest, PreemptsTheYoungestWhenBlocksRunOut) {
  Start({.block_size = 1, .num_kv_blocks = 8});
  Add(2, 6);
  Add(3, 5);
  const Step first = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("1:2*", "2:3*"));  // five blocks taken
  Commit(first);
  MakeStep();                                // seven
  const Step step = scheduler_->Schedule();  // the first takes the eighth, the second finds none
  EXPECT_THAT(Story(step), ElementsAre("1:1*"));
  EXPECT_THAT(step.released_slots, ElementsAre(1));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_EQ(scheduler_->num_running(), 1);
  EXPECT_EQ(scheduler_->num_waiting(), 1);
}

TEST_F(SchedulerTest, AdmitsAPreemptedSequenceAgainWithAllItsTokens) {
  Start({.block_size = 1, .num_kv_blocks = 8});
  Add(2, 6);
  const SequenceId second = Add(3, 5);
  while (scheduler_->num_preemptions() == 0) MakeStep();
  for (Step step = scheduler_->Schedule(); !step.empty(); step = scheduler_->Schedule()) {
    if (!step.admitted.empty()) {  // the older one has ended
      const Sequence& sequence = *step.admitted[0].sequence;
      EXPECT_EQ(sequence.id, second);
      EXPECT_THAT(sequence.tokens.CopyFrom(0), ElementsAre(3, 3, 3, kToken, kToken));
      EXPECT_THAT(Story(step), ElementsAre("2:5*"));
      const std::vector<SequenceUpdate> updates = Commit(step);
      EXPECT_EQ(updates[0].num_generated_tokens, 3);
      EXPECT_EQ(updates[0].num_prompt_tokens_done, 0) << "counted once, not twice";
      return;
    }
    Commit(step);
  }
  FAIL() << "the preempted sequence did not come back";
}

TEST_F(SchedulerTest, PutsAPreemptedSequenceBeforeThoseThatWaitedLess) {
  Start({.max_sequences = 2, .block_size = 1, .num_kv_blocks = 8});
  Add(2, 6);
  Add(3, 5);
  Add(1, 1);
  while (scheduler_->num_preemptions() == 0) MakeStep();
  std::vector<SequenceId> admitted;
  for (Step step = scheduler_->Schedule(); !step.empty(); step = scheduler_->Schedule()) {
    for (const AdmittedSequence& a : step.admitted) admitted.push_back(a.sequence->id);
    Commit(step);
  }
  EXPECT_THAT(admitted, ElementsAre(2, 3));
  ExpectAllFree();
}

TEST_F(SchedulerTest, FreesBlocksAndSlotOfACancelledSequenceAtOnce) {
  Start({.max_sequences = 1, .block_size = 4, .num_kv_blocks = 4});
  const SequenceId first = Add(16, 0);
  MakeStep();
  const SequenceId running = Add(8, 8);
  const SequenceId waiting = Add(8, 8);
  EXPECT_FALSE(scheduler_->Cancel(first)) << "it has ended";
  MakeStep();
  EXPECT_EQ(scheduler_->num_free_blocks(), 2);
  EXPECT_TRUE(scheduler_->Cancel(running));
  EXPECT_EQ(scheduler_->num_free_blocks(), 4);
  EXPECT_EQ(scheduler_->num_running(), 0);
  const Step step = scheduler_->Schedule();
  EXPECT_THAT(step.released_slots, ElementsAre(0));
  EXPECT_EQ(step.admitted[0].sequence->id, waiting);
  EXPECT_EQ(step.scheduled[0].slot, 0);
  EXPECT_TRUE(scheduler_->Cancel(waiting));
  EXPECT_THAT(Commit(step), IsEmpty()) << "cancelled while its step was in flight";
  ExpectAllFree();
}

TEST_F(SchedulerTest, KeepsReleasedSlotsForTheNextStepThatIsSent) {
  Start({.num_kv_blocks = 4});
  const SequenceId id = Add(1, 5);
  MakeStep();
  scheduler_->Cancel(id);
  EXPECT_TRUE(scheduler_->Schedule().empty());
  Add(1, 5);
  EXPECT_THAT(scheduler_->Schedule().released_slots, ElementsAre(0));
}

TEST_F(SchedulerTest, EndsAtStopTokens) {
  Start({.num_kv_blocks = 64});
  Request request = Asking(1, 100);
  request.eos_token_ids = {1, 50};
  request.stop_token_ids = {50, 60};
  Add(request);
  EXPECT_FALSE(MakeStep(49)[0].end.has_value());
  SequenceUpdate update = MakeStep(60)[0];
  EXPECT_EQ(update.end, EndReason::kStopTokenId);
  EXPECT_EQ(update.token_id, 60) << "the token that stopped it is reported";

  Add(request);
  update = MakeStep(50)[0];
  EXPECT_EQ(update.end, EndReason::kStop) << "end-of-sequence comes first";
  ExpectAllFree();
}

TEST_F(SchedulerTest, DoesNotStopBeforeMinTokens) {
  Start({.num_kv_blocks = 64});
  Request request = Asking(1, 100);
  request.eos_token_ids = {1};
  request.min_tokens = 3;
  Add(request);
  EXPECT_FALSE(MakeStep(1)[0].end.has_value());
  EXPECT_FALSE(MakeStep(1)[0].end.has_value());
  EXPECT_EQ(MakeStep(1)[0].end, EndReason::kStop);
}

TEST_F(SchedulerTest, PrefersStopToLengthWhenBothApply) {
  Start({.num_kv_blocks = 64});
  Request request = Asking(1, 1);
  request.eos_token_ids = {1};
  Add(request);
  EXPECT_EQ(MakeStep(1)[0].end, EndReason::kStop);
}

TEST_F(SchedulerTest, OnlyReadsThePromptWhenNoTokensAreWanted) {
  Start({.max_tokens_per_step = 4, .num_kv_blocks = 64});
  Request request = Asking(6, 0);
  request.wants_prompt_logprobs = true;
  Add(request);
  EXPECT_FALSE(MakeStep()[0].end.has_value());
  const SequenceUpdate update = MakeStep()[0];
  EXPECT_EQ(update.end, EndReason::kLength);
  EXPECT_FALSE(update.token_id.has_value());
  ExpectAllFree();
}

TEST_F(SchedulerTest, EndsAFaultySequenceAndNoOther) {
  Start({.num_kv_blocks = 64});
  Add(1, 5);
  Add(1, 5);
  const Step step = scheduler_->Schedule();
  StepOutcome outcome;
  outcome.sequences.resize(2);
  outcome.sequences[0].fault =
      std::make_unique<absl::Status>(absl::InternalError("logits are not finite"));
  outcome.sequences[1].sampled_token_id = 9;
  const std::vector<SequenceUpdate> updates = scheduler_->Commit(step, outcome);
  EXPECT_EQ(updates[0].end, EndReason::kFault);
  EXPECT_FALSE(updates[1].end.has_value());
  EXPECT_EQ(scheduler_->num_running(), 1);
}

TEST_F(SchedulerTest, CutsAPromptWhereTheRowsOfPromptLogprobsRunOut) {
  Start({.max_prompt_logprob_rows_per_step = 4, .num_kv_blocks = 64});
  Request request = Asking(10, 2);
  request.wants_prompt_logprobs = true;
  Add(request);
  Add(request);
  Add(5, 2);  // wants no rows, but stands behind one that must wait
  const Step first = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("1:4"));
  EXPECT_EQ(first.scheduled[0].num_prompt_logprobs, 4);
  Commit(first);
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("1:4"));
  Commit(second);
  // Nine rows in all, so one is left: the last prompt token and the sample are free.
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(third), ElementsAre("1:2*", "2:3", "3:5*"));
  EXPECT_EQ(third.scheduled[0].num_prompt_logprobs, 1);
  Commit(third);
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:1*", "3:1*", "2:4"));
}

TEST_F(SchedulerTest, DoesNotReportPromptLogprobsTwiceAfterPreemption) {
  Start({.block_size = 1, .num_kv_blocks = 12});
  Add(2, 10);
  Request request = Asking(5, 5);
  request.wants_prompt_logprobs = true;
  Add(request);
  int num_rows = 0;
  int num_admissions = 0;
  for (Step step = scheduler_->Schedule(); !step.empty(); step = scheduler_->Schedule()) {
    num_admissions += static_cast<int>(step.admitted.size());
    for (const AdmittedSequence& a : step.admitted) {
      if (num_admissions == 3) {
        EXPECT_EQ(a.sequence->num_prompt_logprobs_done, 4);
      }
    }
    for (const ScheduledSequence& s : step.scheduled) num_rows += s.num_prompt_logprobs;
    Commit(step);
  }
  EXPECT_EQ(num_admissions, 3) << "two, and one again after preemption";
  EXPECT_EQ(num_rows, 4);
}

TEST_F(SchedulerTest, GoesOnWithASequenceThatAnotherSchedulerBegan) {
  Start({.max_tokens_per_step = 4, .block_size = 4, .num_kv_blocks = 8});
  Request request = Asking(6, 4);
  request.wants_prompt_logprobs = true;
  Add(request);
  MakeStep();
  MakeStep(11);
  MakeStep(12);
  ASSERT_THAT(scheduler_->Sequences(), SizeIs(1));
  const SequenceProgress progress = scheduler_->Sequences()[0]->progress();
  EXPECT_THAT(progress.generated_token_ids, ElementsAre(11, 12));
  EXPECT_EQ(progress.num_prompt_logprobs_done, 5);
  EXPECT_EQ(progress.num_cached_tokens, 0);

  Start({.block_size = 4, .num_kv_blocks = 8});
  scheduler_->Add(9, std::make_shared<const Request>(request), progress);
  const Step step = scheduler_->Schedule();
  EXPECT_THAT(Story(step), ElementsAre("9:8*")) << "its KV is computed again";
  EXPECT_EQ(step.scheduled[0].num_prompt_logprobs, 0) << "these were delivered";
  const std::vector<SequenceUpdate> updates = Commit(step, 13);
  ASSERT_THAT(updates, SizeIs(1));
  EXPECT_EQ(updates[0].token_id, 13);
  EXPECT_EQ(updates[0].num_generated_tokens, 3);
  EXPECT_EQ(updates[0].num_prompt_tokens_done, 0);
  EXPECT_EQ(MakeStep().at(0).end, EndReason::kLength);
  ExpectAllFree();
}

TEST_F(SchedulerTest, SpreadsSequencesOverKvDomainsAndPreemptsWithinOne) {
  Start({.block_size = 1, .num_kv_blocks = 6, .num_kv_domains = 2});
  Add(2, 4);
  Add(2, 4);
  Add(1, 4);
  Add(1, 4);
  MakeStep();
  EXPECT_EQ(scheduler_->num_running(), 4);
  EXPECT_EQ(scheduler_->num_free_blocks(), 12 - 6);
  int num_generated = 0;
  for (Step step = scheduler_->Schedule(); !step.empty(); step = scheduler_->Schedule()) {
    for (const SequenceUpdate& update : Commit(step)) {
      if (update.token_id.has_value()) ++num_generated;
    }
  }
  EXPECT_EQ(num_generated, 4 * 3);
  EXPECT_GE(scheduler_->num_preemptions(), 1);
  ExpectAllFree();
}

TEST_F(SchedulerTest, CanScheduleTheNextChunkWhileOneIsInFlight) {
  Start({.max_tokens_per_step = 4, .block_size = 4, .num_kv_blocks = 8});
  Add(10, 2);
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("1:4"));
  EXPECT_THAT(Story(second), ElementsAre("1:4"));
  EXPECT_THAT(Story(third), ElementsAre("1:2*"));
  Commit(first);
  Commit(second);
  EXPECT_EQ(Commit(third)[0].token_id, kToken);
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:1*"));
}

TEST_F(SchedulerTest, ComputesATokenThatAStepInFlightSamples) {
  Start({.block_size = 4, .num_kv_blocks = 8});
  Add(4, 9);
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("1:1*"));
  EXPECT_EQ(second.scheduled[0].first_token, 4);
  EXPECT_THAT(second.new_block_ids, ElementsAre(1));
  EXPECT_EQ(Commit(first, 11)[0].token_id, 11);
  const Step third = scheduler_->Schedule();
  EXPECT_EQ(third.scheduled[0].first_token, 5);
  const std::vector<SequenceUpdate> updates = Commit(second, 12);
  EXPECT_EQ(updates[0].token_id, 12);
  EXPECT_EQ(updates[0].num_generated_tokens, 2);
}

TEST_F(SchedulerTest, SchedulesNothingPastTheLengthThatIsKnownInAdvance) {
  Start({.block_size = 4, .num_kv_blocks = 8});
  Add(3, 2);
  Add(3, 0);
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("1:3*", "2:3*"));
  EXPECT_THAT(Story(second), ElementsAre("1:1*")) << "the other one only reads its prompt";
  EXPECT_TRUE(scheduler_->Schedule().empty());
  EXPECT_EQ(Commit(first)[1].end, EndReason::kLength);
  EXPECT_TRUE(scheduler_->Schedule().empty());
  EXPECT_EQ(Commit(second)[0].end, EndReason::kLength);
  ExpectAllFree();
}

TEST_F(SchedulerTest, DropsTheOneRowThatWasScheduledBeforeAStopTokenWasKnown) {
  Start({.block_size = 4, .num_kv_blocks = 8});
  Request request = Asking(3, 9);
  request.stop_token_ids = {5};
  Add(std::move(request));
  Add(3, 9);
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("1:1*", "2:1*"));
  const std::vector<SequenceUpdate> updates = Commit(first, 5);
  EXPECT_EQ(updates[0].end, EndReason::kStopTokenId);
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(third), ElementsAre("2:1*"));
  EXPECT_THAT(third.released_slots, ElementsAre(0));
  EXPECT_THAT(Commit(second, 6), SizeIs(1));
}

TEST_F(SchedulerTest, DropsResultsOfASequencePreemptedWhileTheyWereInFlight) {
  Start({.max_tokens_per_step = 64, .block_size = 1, .num_kv_blocks = 6});
  Add(2, 4);
  Add(2, 4);
  MakeStep();
  MakeStep();  // three blocks each: the pool is full
  Add(1, 1);
  const Step last_that_fits = scheduler_->Schedule();
  EXPECT_THAT(Story(last_that_fits), ElementsAre("1:1*"));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_THAT(Commit(last_that_fits), SizeIs(1));
}

TEST_F(SchedulerTest, SamplesAgainWhatWasInFlightWhenTheSequenceWasPreempted) {
  Start({.max_tokens_per_step = 64, .block_size = 1, .num_kv_blocks = 6});
  Add(2, 4);
  Add(2, 4);
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(second), ElementsAre("1:1*", "2:1*"));
  EXPECT_THAT(Story(third), ElementsAre("1:1*"));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_THAT(Commit(first, 11), SizeIs(1));
  EXPECT_THAT(Commit(second, 12), SizeIs(1));
  EXPECT_THAT(Commit(third, 13), SizeIs(1));
  while (scheduler_->num_running() == 1) MakeStep();
  const Step again = scheduler_->Schedule();
  EXPECT_THAT(Story(again), ElementsAre("2:2*"));
  EXPECT_EQ(Commit(again, 11)[0].token_id, 11);
}

TEST_F(SchedulerTest, ServesLowPrioritiesFirstAndPreemptsTheHighest) {
  Start({.max_tokens_per_step = 64,
         .max_sequences = 2,
         .block_size = 1,
         .num_kv_blocks = 8,
         .policy = SchedulingPolicy::kPriority});
  for (const int priority : {5, 0, -1, 0}) {
    Request request = Asking(2, 4);
    request.priority = priority;
    Add(std::move(request));
  }
  const Step first = scheduler_->Schedule();
  EXPECT_THAT(Story(first), ElementsAre("3:2*", "2:2*"));
  Commit(first);
  while (scheduler_->num_preemptions() == 0 && scheduler_->num_running() == 2) MakeStep();
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  std::vector<SequenceId> admitted;
  for (Step step = scheduler_->Schedule(); !step.empty(); step = scheduler_->Schedule()) {
    for (const AdmittedSequence& a : step.admitted) admitted.push_back(a.sequence->id);
    Commit(step);
  }
  ASSERT_GE(admitted.size(), 3u);
  admitted.resize(3);
  EXPECT_THAT(admitted, ElementsAre(2, 4, 1)) << "the one that was thrown out came before the last";
  ExpectAllFree();
}

TEST_F(SchedulerTest, HeedsNoPrioritiesUnlessToldTo) {
  Start({.max_sequences = 1, .num_kv_blocks = 8});
  Add(2, 2);
  Request request = Asking(2, 2);
  request.priority = -9;
  Add(std::move(request));
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("1:2*"));
}

TEST_F(SchedulerTest, CountsTheTokensThatWait) {
  Start({.max_sequences = 1, .num_kv_blocks = 8});
  Add(2, 2);
  Add(3, 2);
  Add(4, 2);
  EXPECT_EQ(scheduler_->num_waiting_tokens(), 9);
  MakeStep();
  EXPECT_EQ(scheduler_->num_waiting_tokens(), 7);
  EXPECT_EQ(scheduler_->num_started_tokens(), 2);
  EXPECT_FALSE(scheduler_->CancelUnlessStarted(1));
  EXPECT_TRUE(scheduler_->CancelUnlessStarted(2));
  EXPECT_FALSE(scheduler_->CancelUnlessStarted(2));
  EXPECT_EQ(scheduler_->num_waiting_tokens(), 4);
}

}  // namespace
}  // namespace fathom
