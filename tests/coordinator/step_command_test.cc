#include "coordinator/step_command.h"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/grammar_fault.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pointee;
using ::testing::SizeIs;

constexpr uint32_t kVocabSize = 100;

ScheduledSequence Scheduled(SequenceId id, int slot, int num_tokens) {
  ScheduledSequence scheduled{};
  scheduled.id = id;
  scheduled.slot = slot;
  scheduled.num_tokens = num_tokens;
  return scheduled;
}

// A step of three: slot 4 decodes and wants logprobs, slot 2 has just been admitted and has a chunk
// with two rows of prompt logprobs, slot 0 decodes.
class StepCommandTest : public ::testing::Test {
 protected:
  StepCommandTest() : sequence_(9, MakeRequest(), {}) {
    sequence_.slot = 2;
    sequence_.num_prompt_logprobs_done = 1;
    sequence_.Append(60);  // generated before it was preempted
    step_.number = 17;
    step_.released_slots = {5, 2};
    step_.admitted = {{.sequence = &sequence_, .num_computed = 0}};
    step_.scheduled = {Scheduled(7, 4, 1), Scheduled(9, 2, 3), Scheduled(3, 0, 1)};
    step_.scheduled[0].samples = true;
    step_.scheduled[0].wants_logprobs = true;
    step_.scheduled[0].num_new_blocks = 1;
    step_.scheduled[1].num_new_blocks = 2;
    step_.scheduled[1].num_prompt_logprobs = 2;
    step_.scheduled[2].samples = true;
    step_.new_block_ids = {30, 31, 32};
    step_.num_tokens = 5;
  }

  static std::shared_ptr<const Request> MakeRequest() {
    auto request = std::make_shared<Request>();
    request->prompt_token_ids = {10, 20, 30, 40};
    request->max_tokens = 8;
    request->sampling.set_seed(99);
    request->sampling.set_temperature(0.5);
    request->sampling.add_stop_token_ids(1);
    return request;
  }

  // The right answer, of which each test below changes one thing.
  static v1::StepResult RightResult() {
    v1::StepResult result;
    result.set_epoch(1);
    result.set_step(17);
    result.add_sampled_slots(4);
    result.add_sampled_token_ids(44);
    result.add_sampled_slots(0);
    result.add_sampled_token_ids(11);
    v1::SlotLogprobs& logprobs = *result.add_logprobs();
    logprobs.set_slot(4);
    logprobs.add_logprobs()->set_token_id(44);
    v1::SlotLogprobs& prompt_logprobs = *result.add_prompt_logprobs();
    prompt_logprobs.set_slot(2);
    prompt_logprobs.add_logprobs()->set_token_id(30);
    prompt_logprobs.add_logprobs()->set_token_id(40);
    return result;
  }

  void ExpectRefused(const std::function<void(v1::StepResult&)>& spoil, const std::string& why) {
    v1::StepResult result = RightResult();
    spoil(result);
    const absl::Status status = DecodeResult(step_, kVocabSize, std::move(result)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  }

  Sequence sequence_;
  Step step_;
};

TEST_F(StepCommandTest, SurvivesTheWire) {
  v1::StepCommand command;
  ASSERT_TRUE(command.ParseFromString(EncodeStep(step_, 3).SerializeAsString()));
  EXPECT_EQ(command.epoch(), 3u);
  EXPECT_EQ(command.step(), 17u);
  EXPECT_THAT(command.released_slots(), ElementsAre(5, 2));
  EXPECT_THAT(command.slots(), ElementsAre(4, 2, 0));
  EXPECT_THAT(command.num_tokens(), ElementsAre(1, 3, 1));
  EXPECT_THAT(command.num_new_blocks(), ElementsAre(1, 2, 0));
  EXPECT_THAT(command.new_block_ids(), ElementsAre(30, 31, 32));
  ASSERT_THAT(command.admitted(), SizeIs(1));
  const v1::SequenceAdmission& admission = command.admitted(0);
  EXPECT_EQ(admission.slot(), 2u);
  EXPECT_THAT(admission.token_ids(), ElementsAre(10, 20, 30, 40, 60));
  EXPECT_EQ(admission.num_prompt_tokens(), 4u);
  EXPECT_EQ(admission.num_computed(), 0u);
  EXPECT_EQ(admission.num_prompt_logprobs_done(), 1u);
  EXPECT_EQ(admission.sampling().seed(), 99u);
  EXPECT_FLOAT_EQ(admission.sampling().temperature(), 0.5);
  EXPECT_THAT(admission.sampling().stop_token_ids(), ElementsAre(1));
}

TEST_F(StepCommandTest, CarriesFewBytesForASequenceThatDecodes) {
  Step step;
  step.number = 1000;
  for (int slot = 0; slot < 256; ++slot) step.scheduled.push_back(Scheduled(slot + 1, slot, 1));
  // Slot (one or two bytes of varint), count and number of blocks.
  EXPECT_LT(EncodeStep(step, 1).ByteSizeLong(), 256 * 4 + 32);
}

TEST_F(StepCommandTest, PutsEachPartOfTheResultWhereItBelongs) {
  const auto answer = DecodeResult(step_, kVocabSize, RightResult());
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_THAT(answer->outcome.sequences, SizeIs(3));
  EXPECT_EQ(answer->outcome.sequences[0].sampled_token_id, 44u);
  EXPECT_FALSE(answer->outcome.sequences[1].sampled_token_id.has_value());
  EXPECT_EQ(answer->outcome.sequences[2].sampled_token_id, 11u);
  EXPECT_THAT(answer->logprobs[0].logprobs(), SizeIs(1));
  EXPECT_THAT(answer->logprobs[1].logprobs(), IsEmpty());
  EXPECT_THAT(answer->prompt_logprobs[1].logprobs(), SizeIs(2));
}

TEST_F(StepCommandTest, HasNoLogprobsWhereNoSequenceHasAny) {
  step_.scheduled[0].wants_logprobs = false;
  step_.scheduled[1].num_prompt_logprobs = 0;
  v1::StepResult result = RightResult();
  result.clear_logprobs();
  result.clear_prompt_logprobs();
  const auto answer = DecodeResult(step_, kVocabSize, std::move(result));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->logprobs, IsEmpty());
  EXPECT_THAT(answer->prompt_logprobs, IsEmpty());
}

TEST_F(StepCommandTest, RefusesSlotsFarBeyondThoseScheduled) {
  ExpectRefused([](v1::StepResult& r) { r.set_sampled_slots(0, 0xffffffff); },
                "names slot 4294967295, which was not scheduled");
}

TEST_F(StepCommandTest, AFaultTakesTheFaultySequencesPartOnly) {
  v1::StepResult result = RightResult();
  result.mutable_sampled_slots()->Truncate(1);
  result.mutable_sampled_token_ids()->Truncate(1);
  v1::SlotFault& fault = *result.add_faults();
  fault.set_slot(0);
  fault.set_reason("not finite");
  const auto answer = DecodeResult(step_, kVocabSize, std::move(result));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->outcome.sequences[2].fault, Pointee(absl::InternalError("not finite")));
  EXPECT_EQ(answer->outcome.sequences[0].sampled_token_id, 44u);
}

TEST_F(StepCommandTest, AFaultSaysWhetherTheRequestOrItsGrammarIsToBlame) {
  for (const bool is_of_grammar : {false, true}) {
    v1::StepResult result = RightResult();
    result.mutable_sampled_slots()->Truncate(1);
    result.mutable_sampled_token_ids()->Truncate(1);
    v1::SlotFault& fault = *result.add_faults();
    fault.set_is_of_request(true);
    fault.set_is_of_grammar(is_of_grammar);
    const auto answer = DecodeResult(step_, kVocabSize, std::move(result));
    ASSERT_TRUE(answer.ok()) << answer.status();
    const absl::Status& told = *answer->outcome.sequences[2].fault;
    EXPECT_TRUE(absl::IsInvalidArgument(told)) << told;
    EXPECT_EQ(IsOfGrammar(told), is_of_grammar);
  }
}

TEST_F(StepCommandTest, RefusesAResultThatIsNotOfThisStep) {
  ExpectRefused([](v1::StepResult& r) { r.set_step(16); }, "is of step 16");
  ExpectRefused([](v1::StepResult& r) { r.set_sampled_slots(0, 9); },
                "names slot 9, which was not scheduled");
  ExpectRefused([](v1::StepResult& r) { r.mutable_logprobs(0)->set_slot(9); }, "names slot 9");
  ExpectRefused([](v1::StepResult& r) { r.add_faults()->set_slot(9); }, "names slot 9");
}

TEST_F(StepCommandTest, RefusesTokensThatAreMissingOrTooMany) {
  ExpectRefused([](v1::StepResult& r) { r.mutable_sampled_slots()->Truncate(1); },
                "has 1 slots and 2 tokens");
  ExpectRefused(
      [](v1::StepResult& r) {
        r.mutable_sampled_slots()->Truncate(1);
        r.mutable_sampled_token_ids()->Truncate(1);
      },
      "lacks the token of slot 0");
  ExpectRefused([](v1::StepResult& r) { r.set_sampled_slots(1, 4); },
                "has a token too many for slot 4");
  ExpectRefused([](v1::StepResult& r) { r.set_sampled_slots(1, 2); },
                "has a token too many for slot 2");
  ExpectRefused([](v1::StepResult& r) { r.add_faults()->set_slot(4); },
                "has a token too many for slot 4");
  ExpectRefused([](v1::StepResult& r) { r.set_sampled_token_ids(0, kVocabSize); },
                "has token 100 for slot 4, expected less than 100");
  ExpectRefused(
      [](v1::StepResult& r) {
        r.add_faults()->set_slot(2);
        r.add_faults()->set_slot(2);
      },
      "has two faults of slot 2");
}

TEST_F(StepCommandTest, RefusesLogprobsThatAreMissingOrTooMany) {
  ExpectRefused([](v1::StepResult& r) { r.clear_logprobs(); },
                "has 0 logprobs and 0 prompt logprobs for slot 4, expected 1 and 0");
  ExpectRefused([](v1::StepResult& r) { r.mutable_logprobs(0)->set_slot(0); }, "slot 4");
  ExpectRefused(
      [](v1::StepResult& r) { r.mutable_prompt_logprobs(0)->mutable_logprobs()->RemoveLast(); },
      "has 0 logprobs and 1 prompt logprobs for slot 2, expected 0 and 2");
}

}  // namespace
}  // namespace fathom
