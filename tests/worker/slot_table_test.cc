#include "worker/slot_table.h"

#include <functional>
#include <numeric>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/worker.pb.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A table of 4 slots, blocks of 4 tokens, sequences of up to 20 tokens; and the words to command
// it.
class SlotTableTest : public testing::Test {
 protected:
  SlotTableTest()
      : table({.vocab_size = 100,
               .max_sequences = 4,
               .max_model_len = 20,
               .max_tokens_per_step = 16,
               .max_logit_rows = 6,
               .block_size = 4,
               .num_kv_blocks = 10}) {}

  static v1::SequenceAdmission& Admit(v1::StepCommand& command, uint32_t slot,
                                      std::vector<uint32_t> token_ids) {
    v1::SequenceAdmission& admission = *command.add_admitted();
    admission.set_slot(slot);
    admission.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
    admission.set_num_prompt_tokens(token_ids.size());
    admission.mutable_sampling()->set_seed(1);
    return admission;
  }

  static void Schedule(v1::StepCommand& command, uint32_t slot, uint32_t num_tokens,
                       std::vector<uint32_t> new_blocks = {}) {
    command.add_slots(slot);
    command.add_num_tokens(num_tokens);
    command.add_num_new_blocks(new_blocks.size());
    command.mutable_new_block_ids()->Add(new_blocks.begin(), new_blocks.end());
  }

  StepPlan Apply(const v1::StepCommand& command) {
    absl::StatusOr<StepPlan> plan = table.Apply(command);
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan.ok() ? *std::move(plan) : StepPlan();
  }

  static std::vector<int> SampledSlots(const StepPlan& plan) {
    std::vector<int> slots;
    for (const StepPlan::SampledRow& row : plan.sampled) slots.push_back(row.slot);
    return slots;
  }

  SlotTable table;
};

TEST_F(SlotTableTest, APromptIsComputedInChunksAndThenDecoded) {
  v1::StepCommand first;
  Admit(first, 2, {11, 12, 13, 14, 15, 16});
  Schedule(first, 2, 5, {7, 3});
  const StepPlan chunk = Apply(first);
  EXPECT_THAT(chunk.batch.token_ids, ElementsAre(11, 12, 13, 14, 15));
  EXPECT_THAT(chunk.batch.positions, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(chunk.batch.places, ElementsAre(28, 29, 30, 31, 12));  // block 7, then block 3
  EXPECT_THAT(chunk.batch.query_start, ElementsAre(0, 5));
  EXPECT_THAT(chunk.batch.context_lens, ElementsAre(5));
  EXPECT_THAT(chunk.batch.block_tables, ElementsAre(7, 3));
  EXPECT_EQ(chunk.batch.block_size, 4);
  EXPECT_THAT(chunk.batch.logit_rows, IsEmpty());
  EXPECT_THAT(chunk.sampled, IsEmpty());

  v1::StepCommand second;
  Schedule(second, 2, 1);
  const StepPlan last = Apply(second);
  EXPECT_THAT(last.batch.token_ids, ElementsAre(16));
  EXPECT_THAT(last.batch.logit_rows, ElementsAre(0));
  EXPECT_THAT(SampledSlots(last), ElementsAre(2));
  EXPECT_EQ(table.ContextOf(2).position, 6);
  EXPECT_EQ(table.ContextOf(2).num_output_tokens(), 0);
  table.AppendSampledToken(2, 42);

  v1::StepCommand third;
  Schedule(third, 2, 1);
  const StepPlan decode = Apply(third);
  EXPECT_THAT(decode.batch.token_ids, ElementsAre(42));
  EXPECT_THAT(decode.batch.positions, ElementsAre(6));
  EXPECT_THAT(decode.batch.places, ElementsAre(14));
  EXPECT_THAT(decode.batch.context_lens, ElementsAre(7));
  EXPECT_THAT(SampledSlots(decode), ElementsAre(2));
  EXPECT_EQ(table.ContextOf(2).position, 7);
  EXPECT_EQ(table.ContextOf(2).num_output_tokens(), 1);
}

TEST_F(SlotTableTest, PromptsAndDecodingShareAStep) {
  v1::StepCommand first;
  Admit(first, 0, {1, 2, 3});
  Schedule(first, 0, 3, {0});
  Apply(first);
  table.AppendSampledToken(0, 4);

  v1::StepCommand second;
  Admit(second, 3, {21, 22, 23, 24, 25, 26, 27, 28, 29});
  Admit(second, 1, {31});
  Schedule(second, 3, 6, {5, 6});
  Schedule(second, 0, 1);
  Schedule(second, 1, 1, {9});
  const StepPlan plan = Apply(second);
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(21, 22, 23, 24, 25, 26, 4, 31));
  EXPECT_THAT(plan.batch.query_start, ElementsAre(0, 6, 7, 8));
  EXPECT_THAT(plan.batch.context_lens, ElementsAre(6, 4, 1));
  EXPECT_EQ(plan.batch.max_blocks, 2);
  EXPECT_THAT(plan.batch.block_tables, ElementsAre(5, 6, 0, 0, 9, 0));
  EXPECT_THAT(plan.batch.logit_rows, ElementsAre(6, 7));
  EXPECT_THAT(SampledSlots(plan), ElementsAre(0, 1));
  EXPECT_EQ(plan.sampled[0].logit_row, 0);
  EXPECT_EQ(plan.sampled[1].logit_row, 1);
}

TEST_F(SlotTableTest, AReleasedSlotCanBeTakenAgainInTheSameCommand) {
  v1::StepCommand first;
  Admit(first, 0, {1, 2});
  Schedule(first, 0, 2, {0});
  Apply(first);
  v1::StepCommand second;
  second.add_released_slots(0);
  Admit(second, 0, {9});
  Schedule(second, 0, 1, {4});
  const StepPlan plan = Apply(second);
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(9));
  EXPECT_THAT(plan.batch.places, ElementsAre(16));
}

TEST_F(SlotTableTest, APreemptedSequenceComesBackWithAllItsTokens) {
  v1::StepCommand command;
  v1::SequenceAdmission& admission = Admit(command, 1, {1, 2, 3, 50, 51});
  admission.set_num_prompt_tokens(3);
  admission.mutable_sampling()->set_presence_penalty(1.0f);
  Schedule(command, 1, 5, {8, 9});
  const StepPlan plan = Apply(command);
  EXPECT_THAT(SampledSlots(plan), ElementsAre(1));
  const SamplingContext context = table.ContextOf(1);
  EXPECT_EQ(context.num_output_tokens(), 2);
  EXPECT_EQ(context.position, 5);
  EXPECT_EQ(context.counts.output_counts().at(2), 0);
  EXPECT_EQ(context.counts.output_counts().at(50), 1);
  table.AppendSampledToken(1, 50);
  EXPECT_EQ(table.ContextOf(1).counts.output_counts().at(50), 2);
}

TEST_F(SlotTableTest, ASlotWithAFaultIsSkippedUntilItIsReleased) {
  v1::StepCommand first;
  Admit(first, 1, {11, 12, 13, 14});
  Schedule(first, 1, 4, {7});
  Apply(first);
  table.MarkFault(1);

  v1::StepCommand sent_before_it_was_known;
  Admit(sent_before_it_was_known, 0, {21});
  Schedule(sent_before_it_was_known, 1, 1, {8});
  Schedule(sent_before_it_was_known, 0, 1, {3});
  const StepPlan plan = Apply(sent_before_it_was_known);
  EXPECT_THAT(plan.slots_with_faults, ElementsAre(1));
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(21));
  EXPECT_THAT(plan.batch.places, ElementsAre(12));
  EXPECT_THAT(SampledSlots(plan), ElementsAre(0));

  v1::StepCommand third;
  third.add_released_slots(1);
  Admit(third, 1, {31});
  Schedule(third, 1, 1, {5});
  EXPECT_THAT(Apply(third).slots_with_faults, IsEmpty());
}

TEST_F(SlotTableTest, ComputedTokensAreNotComputedAgain) {
  v1::StepCommand command;
  Admit(command, 1, {1, 2, 3, 4, 5, 6}).set_num_computed(4);
  Schedule(command, 1, 2, {8, 9});
  const StepPlan plan = Apply(command);
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(5, 6));
  EXPECT_THAT(plan.batch.positions, ElementsAre(4, 5));
  EXPECT_THAT(plan.batch.block_tables, ElementsAre(8, 9));
}

TEST_F(SlotTableTest, PromptLogprobsAreReadOffTheRowBeforeEachPromptToken) {
  v1::StepCommand first;
  Admit(first, 0, {11, 12, 13, 14}).mutable_sampling()->set_num_prompt_logprobs(0);
  Schedule(first, 0, 2, {0});
  const StepPlan chunk = Apply(first);
  EXPECT_THAT(chunk.batch.logit_rows, ElementsAre(0, 1));
  ASSERT_EQ(chunk.prompt_rows.size(), 2u);
  EXPECT_EQ(chunk.prompt_rows[0].token_id, 12);
  EXPECT_EQ(chunk.prompt_rows[0].position, 1);
  EXPECT_EQ(chunk.prompt_rows[1].token_id, 13);
  EXPECT_THAT(chunk.sampled, IsEmpty());

  v1::StepCommand second;
  Schedule(second, 0, 2);
  const StepPlan rest = Apply(second);
  EXPECT_THAT(rest.batch.logit_rows, ElementsAre(0, 1));  // token 14, then the next one
  ASSERT_EQ(rest.prompt_rows.size(), 1u);
  EXPECT_EQ(rest.prompt_rows[0].token_id, 14);
  ASSERT_EQ(rest.sampled.size(), 1u);
  EXPECT_EQ(rest.sampled[0].logit_row, 1);
}

TEST_F(SlotTableTest, PromptLogprobsAlreadyDeliveredAreNotReportedAgain) {
  v1::StepCommand command;
  v1::SequenceAdmission& admission = Admit(command, 0, {11, 12, 13, 14, 60});
  admission.set_num_prompt_tokens(4);
  admission.mutable_sampling()->set_num_prompt_logprobs(2);
  admission.set_num_prompt_logprobs_done(2);  // of 12 and 13
  Schedule(command, 0, 5, {0, 1});
  const StepPlan plan = Apply(command);
  ASSERT_EQ(plan.prompt_rows.size(), 1u);
  EXPECT_EQ(plan.prompt_rows[0].token_id, 14);
  EXPECT_THAT(plan.batch.logit_rows, ElementsAre(2, 4));
}

TEST_F(SlotTableTest, ASequenceOfTheFullLengthMaySampleButNotGoOn) {
  std::vector<uint32_t> tokens(20);
  std::iota(tokens.begin(), tokens.end(), 0);
  v1::StepCommand first;
  Admit(first, 0, tokens).set_num_computed(8);
  Schedule(first, 0, 12, {0, 1, 2, 3, 4});
  EXPECT_THAT(SampledSlots(Apply(first)), ElementsAre(0));
  table.AppendSampledToken(0, 5);
  v1::StepCommand second;
  Schedule(second, 0, 1);
  EXPECT_THAT(table.Apply(second).status().message(), HasSubstr("position 20 is past"));
}

TEST_F(SlotTableTest, ACommandMayOnlyRelease) {
  v1::StepCommand first;
  Admit(first, 0, {1});
  Schedule(first, 0, 1, {0});
  Apply(first);
  v1::StepCommand second;
  second.add_released_slots(0);
  const StepPlan plan = Apply(second);
  EXPECT_EQ(plan.batch.num_tokens(), 0);
  EXPECT_EQ(plan.batch.num_sequences(), 0);
}

TEST_F(SlotTableTest, WhatIsWrongWithACommandIsSaidAndNothingBreaks) {
  using Spoil = std::function<void(v1::StepCommand&)>;
  // Before each command slot 0 holds four tokens, three of them computed, in block 1.
  const std::vector<std::pair<std::string, Spoil>> cases = {
      {"slot 9 is out of range", [](auto& c) { c.add_released_slots(9); }},
      {"slot 4294967295 is out of range", [](auto& c) { c.add_released_slots(-1); }},
      {"slot 2 holds no sequence", [](auto& c) { c.add_released_slots(2); }},
      {"slot 0 holds no sequence",
       [](auto& c) {
         c.add_released_slots(0);
         c.add_released_slots(0);
       }},
      {"slot 4 is out of range", [](auto& c) { Admit(c, 4, {1}); }},
      {"slot 0 is already taken", [](auto& c) { Admit(c, 0, {1}); }},
      {"slot 1 is already taken",
       [](auto& c) {
         Admit(c, 1, {1});
         Admit(c, 1, {2});
       }},
      {"0 tokens, expected 1 to 20", [](auto& c) { Admit(c, 1, {}); }},
      {"21 tokens", [](auto& c) { Admit(c, 1, std::vector<uint32_t>(21, 1)); }},
      {"token id 100 at position 1",
       [](auto& c) {
         Admit(c, 1, {1, 100});
       }},
      {"token id 4000000000", [](auto& c) { Admit(c, 1, {4000000000u}); }},
      {"num_prompt_tokens is 0", [](auto& c) { Admit(c, 1, {1}).set_num_prompt_tokens(0); }},
      {"num_prompt_tokens is 3",
       [](auto& c) {
         Admit(c, 1, {1, 2}).set_num_prompt_tokens(3);
       }},
      {"num_computed is 2 of 2",
       [](auto& c) {
         Admit(c, 1, {1, 2}).set_num_computed(2);
       }},
      {"num_prompt_logprobs_done is 3",
       [](auto& c) {
         Admit(c, 1, {1, 2}).set_num_prompt_logprobs_done(3);
       }},
      {"top_p is 2", [](auto& c) { Admit(c, 1, {1}).mutable_sampling()->set_top_p(2.0f); }},
      {"has no seed", [](auto& c) { Admit(c, 1, {1}).mutable_sampling()->clear_seed(); }},
      {"slot 7 is out of range", [](auto& c) { Schedule(c, 7, 1); }},
      {"slot 3 holds no sequence", [](auto& c) { Schedule(c, 3, 1, {2}); }},
      {"slot 0 is scheduled twice",
       [](auto& c) {
         Schedule(c, 0, 1);
         Schedule(c, 0, 1);
       }},
      {"num_tokens is 0", [](auto& c) { Schedule(c, 0, 0); }},
      {"num_tokens is 2, but 1 tokens", [](auto& c) { Schedule(c, 0, 2); }},
      {"the step has 17 tokens, limit 16", [](auto& c) { Schedule(c, 0, 17); }},
      {"the step has 8589934590 tokens",
       [](auto& c) {
         Schedule(c, 0, -1);
         Schedule(c, 1, -1);
       }},
      {"block id 10 is out of range", [](auto& c) { Schedule(c, 0, 1, {10}); }},
      {"block id 4294967295", [](auto& c) { Schedule(c, 0, 1, {4294967295u}); }},
      {"would have 6 blocks, limit 5",
       [](auto& c) {
         Schedule(c, 0, 1, {2, 3, 4, 5, 6});
       }},
      {"5 tokens do not fit into 1 blocks of 4",
       [](auto& c) {
         Admit(c, 1, {1, 2, 3, 4, 5});
         Schedule(c, 1, 5, {2});
       }},
      {"do not fit into 0 blocks",
       [](auto& c) {
         Admit(c, 1, {1, 2, 3, 4, 5}).set_num_computed(4);
         Schedule(c, 1, 1);
       }},
      {"num_tokens 0 and num_new_blocks 0", [](auto& c) { c.add_slots(0); }},
      {"slots has 1 entries, num_tokens 2",
       [](auto& c) {
         Schedule(c, 0, 1);
         c.add_num_tokens(1);
       }},
      {"num_new_blocks add up to 0, but there are 1",
       [](auto& c) {
         Schedule(c, 0, 1);
         c.add_new_block_ids(3);
       }},
      {"num_new_blocks add up to 4294967295",
       [](auto& c) {
         Schedule(c, 0, 1);
         c.set_num_new_blocks(0, -1);
       }},
      {"the step wants 9 rows of logits, limit 6",
       [](auto& c) {
         Admit(c, 1, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
             .mutable_sampling()
             ->set_num_prompt_logprobs(1);
         Schedule(c, 1, 9, {2, 3, 4});
       }},
  };
  EXPECT_GE(cases.size(), 20u);
  for (const auto& [expected, spoil] : cases) {
    SlotTable victim({.vocab_size = 100,
                      .max_sequences = 4,
                      .max_model_len = 20,
                      .max_tokens_per_step = 16,
                      .max_logit_rows = 6,
                      .block_size = 4,
                      .num_kv_blocks = 10});
    v1::StepCommand before;
    Admit(before, 0, {1, 2, 3, 4});
    Schedule(before, 0, 3, {1});
    ASSERT_TRUE(victim.Apply(before).ok());
    v1::StepCommand command;
    spoil(command);
    const absl::Status status = victim.Apply(command).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << expected;
    EXPECT_THAT(std::string(status.message()), HasSubstr(expected));
  }
}

}  // namespace
}  // namespace fathom
