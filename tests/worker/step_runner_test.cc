#include "worker/step_runner.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/worker.pb.h"
#include "tests/worker/golden.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kVocabSize = 8;

// A model whose logits a test writes: by default token t is followed by t + 1.
class ScriptedShard final : public ModelShard {
 public:
  absl::StatusOr<Tensor> Forward(const StepBatch& batch, KvCache&,
                                 Communicator& communicator) override {
    if (!failure.ok()) return failure;
    ++num_steps;
    if (communicator.rank() != 0 || batch.logit_rows.empty()) return Tensor();
    logits_.assign(batch.logit_rows.size() * kVocabSize, 0.0f);
    for (size_t row = 0; row < batch.logit_rows.size(); ++row) {
      const int32_t token = batch.token_ids[batch.logit_rows[row]];
      float* values = &logits_[row * kVocabSize];
      values[(token + 1) % kVocabSize] = 3.0f;
      if (token == poisoned_token) values[2] = poison;
    }
    return Tensor(logits_.data(), DType::kF32,
                  {static_cast<int64_t>(batch.logit_rows.size()), kVocabSize});
  }

  void ForgetRecordings() override { ++num_forgets; }

  absl::Status failure;
  int num_forgets = 0;
  int32_t poisoned_token = -1;
  float poison = std::nanf("");
  int num_steps = 0;

 private:
  std::vector<float> logits_;
};

// A lonely rank that notes how often the shard had forgotten its recordings when this ended.
class EndingCommunicator final : public Communicator {
 public:
  EndingCommunicator(const ScriptedShard& shard, int& num_forgets)
      : shard_(shard), num_forgets_(num_forgets) {}
  ~EndingCommunicator() override { num_forgets_ = shard_.num_forgets; }
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  absl::Status AllReduceSum(const Tensor&) override { return absl::OkStatus(); }
  absl::Status GatherToRank0(const Tensor&, const Tensor&) override { return absl::OkStatus(); }
  absl::Status BroadcastFromRank0(void*, int64_t) override { return absl::OkStatus(); }
  void Abort() override {}

 private:
  const ScriptedShard& shard_;
  int& num_forgets_;
};

class StepRunnerTest : public testing::Test {
 protected:
  StepRunnerTest() { MakeRunner(MakeLonelyCommunicator()); }

  void MakeRunner(std::unique_ptr<Communicator> communicator) {
    const absl::StatusOr<ModelConfig> config = ReadModelConfig(GoldenCheckpoint("v3_tiny"));
    device_ = *OpenCpuDevice({});
    runner = std::make_unique<StepRunner>(
        7,
        SlotTableOptions{.vocab_size = kVocabSize,
                         .max_sequences = 4,
                         .max_model_len = 64,
                         .max_tokens_per_step = 64,
                         .max_logit_rows = 64,
                         .block_size = 16,
                         .num_kv_blocks = 16},
        shard, *KvCache::Create({.num_blocks = 16}, *config, *device_), std::move(communicator),
        *DeviceSampler::Create(*device_, 4), nullptr);
  }

  static v1::SamplingParams& Admit(v1::StepCommand& command, uint32_t slot,
                                   std::vector<uint32_t> tokens) {
    v1::SequenceAdmission& admission = *command.add_admitted();
    admission.set_slot(slot);
    admission.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    admission.set_num_prompt_tokens(tokens.size());
    command.add_slots(slot);
    command.add_num_tokens(tokens.size());
    command.add_num_new_blocks(1);
    command.add_new_block_ids(slot);
    admission.mutable_sampling()->set_temperature(0.0f);
    return *admission.mutable_sampling();
  }

  static void Continue(v1::StepCommand& command, uint32_t slot) {
    command.add_slots(slot);
    command.add_num_tokens(1);
    command.add_num_new_blocks(0);
  }

  absl::StatusOr<v1::StepResult> Run(v1::StepCommand command) {
    command.set_epoch(7);
    command.set_step(++step_);
    return runner->Run(command, absl::InfinitePast());
  }

  ScriptedShard shard;
  std::unique_ptr<Device> device_;
  std::unique_ptr<StepRunner> runner;
  uint64_t step_ = 0;
};

TEST_F(StepRunnerTest, SampledTokensFeedTheNextStep) {
  v1::StepCommand first;
  Admit(first, 1, {2, 3});
  EXPECT_THAT(Run(first)->sampled_token_ids(), ElementsAre(4));
  for (const uint32_t expected : {5u, 6u, 7u, 0u}) {
    v1::StepCommand next;
    Continue(next, 1);
    const absl::StatusOr<v1::StepResult> result = Run(next);
    EXPECT_THAT(result->sampled_slots(), ElementsAre(1));
    EXPECT_THAT(result->sampled_token_ids(), ElementsAre(expected));
  }
}

// NCCL waits for recordings with its calls before it ends: a worker hung whose peer was killed.
TEST_F(StepRunnerTest, RecordingsAreForgottenBeforeTheirCommunicatorEnds) {
  runner.reset();
  shard.num_forgets = 0;
  int num_forgets = -1;
  MakeRunner(std::make_unique<EndingCommunicator>(shard, num_forgets));
  runner.reset();
  EXPECT_EQ(num_forgets, 1);
}

TEST_F(StepRunnerTest, LogprobsAreReportedForWhoAsked) {
  v1::StepCommand command;
  Admit(command, 0, {1});
  v1::SamplingParams& curious = Admit(command, 2, {1, 2, 3});
  curious.set_num_logprobs(2);
  curious.set_num_prompt_logprobs(0);
  const absl::StatusOr<v1::StepResult> result = Run(command);
  EXPECT_THAT(result->sampled_slots(), ElementsAre(0, 2));
  EXPECT_THAT(result->sampled_token_ids(), ElementsAre(2, 4));
  // One token of logit 3 among seven of 0.
  const double expected = 3.0 - std::log(std::exp(3.0) + 7.0);
  ASSERT_EQ(result->logprobs_size(), 1);
  EXPECT_EQ(result->logprobs(0).slot(), 2u);
  EXPECT_NEAR(result->logprobs(0).logprobs(0).logprob(), expected, 1e-6);
  EXPECT_THAT(result->logprobs(0).logprobs(0).top_token_ids(), ElementsAre(4, 0));
  ASSERT_EQ(result->prompt_logprobs_size(), 1);
  ASSERT_EQ(result->prompt_logprobs(0).logprobs_size(), 2);
  EXPECT_EQ(result->prompt_logprobs(0).logprobs(0).token_id(), 2u);
  EXPECT_NEAR(result->prompt_logprobs(0).logprobs(0).logprob(), expected, 1e-6);
  EXPECT_EQ(result->prompt_logprobs(0).logprobs(0).top_token_ids_size(), 0);
}

TEST_F(StepRunnerTest, ARowThatIsNotFiniteEndsItsSequenceAndNoOther) {
  for (const float poison : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    shard.poison = poison;
    shard.poisoned_token = 5;
    v1::StepCommand command;
    Admit(command, 0, {1});
    Admit(command, 1, {4, 5}).set_num_logprobs(1);
    Admit(command, 2, {2});
    const absl::StatusOr<v1::StepResult> result = Run(command);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_THAT(result->sampled_slots(), ElementsAre(0, 2));
    EXPECT_THAT(result->sampled_token_ids(), ElementsAre(2, 3));
    ASSERT_EQ(result->faults_size(), 1);
    EXPECT_EQ(result->faults(0).slot(), 1u);
    EXPECT_EQ(result->faults(0).reason(), "logits are not finite at position 2");
    EXPECT_EQ(result->logprobs_size(), 0);

    v1::StepCommand sent_ahead;
    for (const uint32_t slot : {1, 2}) Continue(sent_ahead, slot);
    const absl::StatusOr<v1::StepResult> second = Run(sent_ahead);
    ASSERT_TRUE(second.ok()) << second.status();
    EXPECT_THAT(second->sampled_slots(), ElementsAre(2));
    EXPECT_THAT(second->sampled_token_ids(), ElementsAre(4));
    ASSERT_EQ(second->faults_size(), 1);
    EXPECT_EQ(second->faults(0).slot(), 1u);
    v1::StepCommand alone;
    Continue(alone, 1);
    EXPECT_EQ(Run(alone)->faults_size(), 1);

    v1::StepCommand next;
    for (const uint32_t slot : {0, 1, 2}) next.add_released_slots(slot);
    ASSERT_TRUE(Run(next).ok());
  }
}

TEST_F(StepRunnerTest, AFaultInThePromptLeavesNoOtherEntryOfThatSequence) {
  shard.poisoned_token = 3;
  v1::StepCommand command;
  v1::SamplingParams& sampling = Admit(command, 1, {2, 3, 4, 5});
  sampling.set_num_prompt_logprobs(1);
  Admit(command, 0, {1, 2}).set_num_prompt_logprobs(1);
  const absl::StatusOr<v1::StepResult> result = Run(command);
  ASSERT_EQ(result->faults_size(), 1);
  EXPECT_EQ(result->faults(0).reason(), "logits are not finite at position 2");
  ASSERT_EQ(result->prompt_logprobs_size(), 1);
  EXPECT_EQ(result->prompt_logprobs(0).slot(), 0u);
  EXPECT_THAT(result->sampled_slots(), ElementsAre(0));
}

TEST_F(StepRunnerTest, ACommandWithoutTokensDoesNotRunTheModel) {
  EXPECT_TRUE(Run({}).ok());
  EXPECT_EQ(shard.num_steps, 0);
}

TEST_F(StepRunnerTest, CommandsOutOfTurnAreRefused) {
  v1::StepCommand command;
  command.set_epoch(6);
  command.set_step(1);
  EXPECT_EQ(runner->Run(command, absl::InfinitePast()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  command.set_epoch(7);
  command.set_step(2);
  EXPECT_EQ(runner->Run(command, absl::InfinitePast()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(StepRunnerTest, WhatACollectiveSaysBecomesAbortedAndKeepsItsWords) {
  shard.failure = absl::UnavailableError("the process of rank 3 ended");
  v1::StepCommand command;
  Admit(command, 0, {1});
  const absl::Status status = Run(command).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("rank 0, step 1 of epoch 7: the process of rank 3 ended"));
}

}  // namespace
}  // namespace fathom
