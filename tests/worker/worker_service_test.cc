#include "worker/worker_service.h"

#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/golden.h"
#include "tests/worker/worker_group_fixture.h"

namespace fathom {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

constexpr int kVocabSize = 512;  // of v3_tiny

grpc::Status CallAbort(v1::Worker::Stub& stub, uint64_t epoch) {
  grpc::ClientContext context;
  v1::AbortRequest request;
  request.set_epoch(epoch);
  v1::AbortResponse response;
  return stub.Abort(&context, request, &response);
}

grpc::Status CallDescribe(v1::Worker::Stub& stub, const v1::ShardSpec& shard,
                          v1::DescribeResponse* response) {
  grpc::ClientContext context;
  v1::DescribeRequest request;
  *request.mutable_shard() = shard;
  return stub.Describe(&context, request, response);
}

bool ReadAnything(const std::vector<v1::JoinProgress>& progress) {
  return std::any_of(progress.begin(), progress.end(),
                     [](const v1::JoinProgress& one) { return one.bytes_total() > 0; });
}

TEST(WorkerServiceTest, DescribesItsShard) {
  TestGroup group(1);
  v1::ShardSpec shard = group.Shard(0);
  shard.set_world_size(4);
  v1::DescribeResponse response;
  const grpc::Status status = CallDescribe(group.worker(0).stub(), shard, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.version(), "test");
  EXPECT_EQ(response.architecture(), "DeepseekV3ForCausalLM");
  EXPECT_EQ(response.vocab_size(), kVocabSize);
  EXPECT_EQ(response.model_fingerprint().size(), 32u);
  EXPECT_EQ(response.device(), "cpu");
  EXPECT_EQ(response.dtype(), "float32");
  EXPECT_EQ(response.kv_cache_dtype(), "float32");
  EXPECT_EQ(response.quantization(), "none");
  EXPECT_GT(response.plan().weight_bytes(), 0u);
  // 512 MiB in blocks of 16 tokens, 4 layers, 64 + 16 numbers of 4 bytes each.
  EXPECT_EQ(response.plan().kv_block_bytes(), 16u * 4 * 80 * 4);
  EXPECT_EQ(response.plan().kv_block_capacity(), (512u << 20) / (16 * 4 * 80 * 4));

  v1::DescribeResponse whole;
  shard.set_world_size(1);
  ASSERT_TRUE(CallDescribe(group.worker(0).stub(), shard, &whole).ok());
  EXPECT_GT(whole.plan().weight_bytes(), response.plan().weight_bytes());
}

TEST(WorkerServiceTest, RefusesShardsThatCannotBe) {
  TestGroup group(1);
  const std::vector<std::pair<std::string, std::function<void(v1::ShardSpec&)>>> cases = {
      {"world_size is 0", [](auto& s) { s.set_world_size(0); }},
      {"rank is 1, expected 0 to 0", [](auto& s) { s.set_rank(1); }},
      {"world size 3 does not divide", [](auto& s) { s.set_world_size(3); }},
      {"block_size is 8", [](auto& s) { s.set_block_size(8); }},
      {"max_tokens_per_step is 0", [](auto& s) { s.set_max_tokens_per_step(0); }},
      {"max_sequences is 0", [](auto& s) { s.set_max_sequences(0); }},
      {"max_logit_rows is 0", [](auto& s) { s.set_max_logit_rows(0); }},
      {"workers_on_this_host is 0", [](auto& s) { s.set_workers_on_this_host(0); }},
      {"max_model_len is 5121", [](auto& s) { s.set_max_model_len(5121); }},
  };
  for (const auto& [expected, spoil] : cases) {
    v1::ShardSpec shard = group.Shard(0);
    spoil(shard);
    v1::DescribeResponse response;
    const grpc::Status described = CallDescribe(group.worker(0).stub(), shard, &response);
    EXPECT_EQ(described.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(described.error_message(), HasSubstr(expected));
  }
  v1::JoinRequest join = group.JoinOf(0, 1);
  join.set_num_kv_blocks(0);
  EXPECT_THAT(CallJoin(group.worker(0).stub(), join).status.error_message(),
              HasSubstr("num_kv_blocks is 0"));
  join.set_epoch(2);
  join.set_num_kv_blocks(4000000000u);
  EXPECT_THAT(CallJoin(group.worker(0).stub(), join).status.error_message(),
              HasSubstr("num_kv_blocks is 4000000000"));
}

TEST(WorkerServiceTest, CollectivesThatAreNotForItsDeviceAreRefusedInWords) {
  TestGroup group(2);
  for (const auto& [collectives, words] :
       {std::pair(v1::JoinRequest::COLLECTIVES_PEER, "have no peer memory"),
        std::pair(v1::JoinRequest::COLLECTIVES_NCCL, "--collectives nccl"),
        std::pair(v1::JoinRequest::COLLECTIVES_UNSPECIFIED, "none of shm, gloo, peer and nccl")}) {
    group.collectives = collectives;
    ++group.epoch;
    for (const JoinOutcome& outcome : group.Join(group.epoch)) {
      EXPECT_THAT(outcome.status.error_message(), HasSubstr(words));
    }
  }
}

struct WorldCase {
  int world_size;
  v1::JoinRequest::Collectives collectives;
};

class GoldenGroupTest : public testing::TestWithParam<WorldCase> {};

INSTANTIATE_TEST_SUITE_P(Worlds, GoldenGroupTest,
                         testing::Values(WorldCase{1, v1::JoinRequest::COLLECTIVES_SHM},
                                         WorldCase{2, v1::JoinRequest::COLLECTIVES_SHM},
                                         WorldCase{2, v1::JoinRequest::COLLECTIVES_GLOO}),
                         [](const auto& info) {
                           return absl::StrCat(
                               "World", info.param.world_size,
                               info.param.collectives == v1::JoinRequest::COLLECTIVES_SHM ? "Shm"
                                                                                          : "Gloo");
                         });

TEST_P(GoldenGroupTest, GreedyTokensAreDeepSeeks) {
  TestGroup group(GetParam().world_size);
  group.collectives = GetParam().collectives;
  group.Form(1);
  const Golden golden("v3_tiny/golden.safetensors");
  const int count = GetParam().collectives == v1::JoinRequest::COLLECTIVES_GLOO ? 6 : 32;
  for (const std::string prompt : {"p1", "p7", "p64"}) {
    std::vector<int32_t> expected = golden.Ints(prompt + ".greedy");
    expected.resize(count);
    EXPECT_EQ(group.Greedy(golden.Ints(prompt + ".tokens"), count, 512), expected) << prompt;
  }
  std::vector<int32_t> expected = golden.Ints("p64.greedy");
  expected.resize(5);
  EXPECT_EQ(group.Greedy(golden.Ints("p64.tokens"), 5, 7), expected) << "in chunks of 7";
}

TEST_P(GoldenGroupTest, PromptLogprobsAreTheLogSoftmaxOfDeepSeeksLogits) {
  TestGroup group(GetParam().world_size);
  group.collectives = GetParam().collectives;
  group.Form(1);
  const Golden golden("v3_tiny/golden.safetensors");
  const std::vector<int32_t> prompt = golden.Ints("p64.tokens");
  const std::vector<float> logits = golden.Floats("p64.logits");
  v1::StepCommand command;
  v1::SamplingParams& sampling = *AddAdmission(command, 0, prompt).mutable_sampling();
  sampling.set_temperature(0.0f);
  sampling.set_num_prompt_logprobs(3);
  sampling.set_num_logprobs(1);
  AddScheduled(command, 0, 64, {5, 6, 7, 8});
  const absl::StatusOr<v1::StepResult> result = group.Step(command);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->prompt_logprobs_size(), 1);
  ASSERT_EQ(result->prompt_logprobs(0).logprobs_size(), 63);
  for (int i = 0; i < 63; ++i) {
    const v1::TokenLogprobs& token = result->prompt_logprobs(0).logprobs(i);
    ASSERT_EQ(token.token_id(), static_cast<uint32_t>(prompt[i + 1]));
    double sum = 0.0;
    for (int id = 0; id < kVocabSize; ++id) {
      sum += std::exp(static_cast<double>(logits[i * kVocabSize + id]));
    }
    // 1e-4 of the largest logit is what float32 grants (README of the golden data); they are
    // below 10.
    EXPECT_NEAR(token.logprob(), logits[i * kVocabSize + prompt[i + 1]] - std::log(sum), 1e-3);
    EXPECT_EQ(token.top_token_ids_size(), 3);
  }
  ASSERT_EQ(result->logprobs_size(), 1);
  EXPECT_EQ(result->logprobs(0).logprobs(0).token_id(), result->sampled_token_ids(0));
  EXPECT_EQ(result->logprobs(0).logprobs(0).rank(), 1u);
}

TEST(WorkerServiceTest, SampledTokensAreTheSameInABatchAndAfterPreemption) {
  TestGroup group(2);
  group.Form(1);
  const std::vector<int32_t> prompt = {3, 1, 4, 1, 5, 9, 2, 6};
  const auto admit = [&](v1::StepCommand& command, uint32_t slot, std::vector<int32_t> tokens) {
    v1::SequenceAdmission& admission = AddAdmission(command, slot, tokens);
    admission.set_num_prompt_tokens(8);
    v1::SamplingParams& sampling = *admission.mutable_sampling();
    sampling.set_seed(77);
    sampling.set_top_p(0.95f);
    sampling.set_repetition_penalty(1.1f);
    sampling.set_frequency_penalty(0.3f);
  };
  std::vector<int32_t> alone = prompt;
  v1::StepCommand first;
  admit(first, 0, prompt);
  AddScheduled(first, 0, 8, {1, 2});
  for (int i = 0; i < 12; ++i) {
    v1::StepCommand next;
    AddScheduled(next, 0, 1, {});
    alone.push_back(group.Step(i == 0 ? first : next)->sampled_token_ids(0));
  }

  // In another slot, beside the first one, thrown out after five tokens.
  std::vector<int32_t> preempted = prompt;
  v1::StepCommand second;
  admit(second, 5, prompt);
  AddScheduled(second, 0, 1, {});
  AddScheduled(second, 5, 8, {9, 8});
  for (int i = 0; i < 12; ++i) {
    v1::StepCommand next;
    if (i == 5) {
      next.add_released_slots(5);
      admit(next, 2, preempted);
      AddScheduled(next, 2, static_cast<int>(preempted.size()), {20, 21});
    } else {
      AddScheduled(next, i < 5 ? 5 : 2, 1, {});
    }
    const absl::StatusOr<v1::StepResult> result = group.Step(i == 0 ? second : next);
    ASSERT_TRUE(result.ok()) << result.status();
    preempted.push_back(result->sampled_token_ids(i == 0 ? 1 : 0));
  }
  EXPECT_EQ(preempted, alone);
}

TEST(WorkerServiceTest, OldEpochsAreRefused) {
  TestGroup group(1);
  group.Form(5);
  EXPECT_EQ(CallJoin(group.worker(0).stub(), group.JoinOf(0, 5)).status.error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(CallJoin(group.worker(0).stub(), group.JoinOf(0, 4)).status.error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(CallAbort(group.worker(0).stub(), 4).ok());  // nothing of it is running
  v1::StepCommand empty;
  EXPECT_TRUE(group.Step(empty).ok()) << "the current epoch goes on";
  v1::DescribeResponse response;
  ASSERT_TRUE(CallDescribe(group.worker(0).stub(), group.Shard(0), &response).ok());
  EXPECT_EQ(response.last_epoch(), 5u);

  v1::StepCommand stale;
  stale.set_epoch(4);
  stale.set_step(2);
  group.Send(0, stale);
  const grpc::Status status = group.Finish(0);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("epoch 4"));
}

TEST(WorkerServiceTest, OneRunStreamPerEpochAndNoneWithoutOne) {
  TestGroup group(1);
  const auto run = [&] {
    grpc::ClientContext context;
    return group.worker(0).stub().Run(&context)->Finish();
  };
  EXPECT_EQ(run().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  group.Form(1);
  ASSERT_TRUE(group.Step({}).ok());
  EXPECT_EQ(run().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(group.Step({}).ok());
}

TEST(WorkerServiceTest, AWrongCommandEndsTheStreamNotTheWorker) {
  TestGroup group(2);
  group.Form(1);
  v1::StepCommand command;
  AddAdmission(command, 0, {1, 2, 600}).mutable_sampling()->set_temperature(0.0f);
  AddScheduled(command, 0, 3, {1});
  const absl::Status status = group.Step(command).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("token id 600"));
  EXPECT_EQ(group.Finish(1).error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  group.Form(2);
  v1::StepCommand skip;
  skip.set_epoch(2);
  skip.set_step(2);
  group.Send(0, skip);
  EXPECT_THAT(group.Finish(0).error_message(), HasSubstr("step 2 came after step 0"));
}

TEST(WorkerServiceTest, AbortEndsAStepThatWaitsForAnotherRank) {
  TestGroup group(2);
  group.Form(1);
  ASSERT_TRUE(group.Step({}).ok());  // both streams are open
  v1::StepCommand command;
  AddAdmission(command, 0, {1, 2, 3}).mutable_sampling()->set_temperature(0.0f);
  AddScheduled(command, 0, 3, {1});
  command.set_epoch(1);
  command.set_step(2);
  group.Send(0, command);  // rank 1 gets none
  EXPECT_TRUE(CallAbort(group.worker(0).stub(), 1).ok());
  const grpc::Status status = group.Finish(0);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("the coordinator ended epoch 1"));
  EXPECT_TRUE(CallAbort(group.worker(1).stub(), 1).ok());
  EXPECT_EQ(group.Finish(1).error_code(), grpc::StatusCode::ABORTED);

  group.Form(2);
  EXPECT_TRUE(group.Step({}).ok());
}

TEST(WorkerServiceTest, AStepThatDoesNotEndInTimeEndsTheWorker) {
  std::atomic<bool> is_stuck = false;
  WorkerServiceOptions options = {.version = "test"};
  options.abort_timeout = absl::ZeroDuration();
  options.on_stuck = [&] { is_stuck = true; };
  TestGroup group(1, "v3_tiny", options);
  // A prompt takes long enough to be caught in the middle of a layer, if not each time.
  for (uint64_t epoch = 1; epoch <= 100 && !is_stuck; ++epoch) {
    group.Form(epoch);
    ASSERT_TRUE(group.Step({}).ok());
    v1::StepCommand command;
    command.set_epoch(epoch);
    command.set_step(2);
    AddAdmission(command, 0, std::vector<int32_t>(512, 1)).mutable_sampling()->set_seed(1);
    std::vector<uint32_t> blocks(32);
    std::iota(blocks.begin(), blocks.end(), 0);
    AddScheduled(command, 0, 512, blocks);
    group.Send(0, command);
    absl::SleepFor(absl::Milliseconds(epoch));
    CallAbort(group.worker(0).stub(), epoch);
    group.Drain(0);
  }
  EXPECT_TRUE(is_stuck);
}

TEST(WorkerServiceTest, ABrokenStreamLeavesTheEpochAndKeepsTheWeights) {
  TestGroup group(2);
  const std::vector<JoinOutcome> first = group.Join(1);
  for (const JoinOutcome& outcome : first) EXPECT_TRUE(ReadAnything(outcome.progress));
  group.Form(2);
  ASSERT_TRUE(group.Step({}).ok());
  group.CancelStreams();
  const std::vector<JoinOutcome> again = group.Join(3);
  for (const JoinOutcome& outcome : again) {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    EXPECT_FALSE(ReadAnything(outcome.progress)) << "the weights were there";
  }
  group.Form(4);
  const Golden golden("v3_tiny/golden.safetensors");
  std::vector<int32_t> expected = golden.Ints("p7.greedy");
  expected.resize(4);
  EXPECT_EQ(group.Greedy(golden.Ints("p7.tokens"), 4, 512), expected);
}

TEST(WorkerServiceTest, AnotherShardIsLoadedAnew) {
  TestGroup group(1);
  ASSERT_TRUE(group.Join(1)[0].status.ok());
  v1::JoinRequest request = group.JoinOf(0, 2);
  request.mutable_shard()->set_max_model_len(256);
  const JoinOutcome outcome = CallJoin(group.worker(0).stub(), request);
  EXPECT_TRUE(outcome.status.ok());
  EXPECT_TRUE(ReadAnything(outcome.progress));
}

TEST(WorkerServiceTest, AWorkerThatGoesTakesTheStepOfTheOthersWithIt) {
  TestGroup group(2);
  group.Form(1);
  ASSERT_TRUE(group.Step({}).ok());
  v1::StepCommand command;
  AddAdmission(command, 0, {1, 2, 3}).mutable_sampling()->set_temperature(0.0f);
  AddScheduled(command, 0, 3, {1});
  command.set_epoch(1);
  command.set_step(2);
  group.Send(0, command);
  group.Kill(1);
  const grpc::Status status = group.Finish(0);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("rank 1"));
}

TEST(WorkerServiceTest, ALaterJoinEndsAnEarlierOneThatStillWaits) {
  TestGroup group(2);
  JoinOutcome early;
  std::thread joining(
      [&] { early = CallJoin(group.worker(0).stub(), group.JoinOf(0, 1)); });  // without rank 1
  absl::SleepFor(absl::Milliseconds(100));
  for (const JoinOutcome& outcome : group.Join(2)) {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  }
  joining.join();
  // When the second came first after all, the first was too old.
  EXPECT_TRUE(early.status.error_code() == grpc::StatusCode::ABORTED ||
              early.status.error_code() == grpc::StatusCode::FAILED_PRECONDITION)
      << early.status.error_message();
}

TEST(WorkerServiceTest, AbortEndsJoining) {
  TestGroup group(2);
  JoinOutcome outcome;
  std::thread joining([&] { outcome = CallJoin(group.worker(1).stub(), group.JoinOf(1, 3)); });
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_TRUE(CallAbort(group.worker(1).stub(), 3).ok());
  joining.join();
  EXPECT_FALSE(outcome.status.ok());
  // Also when it comes before the Join.
  EXPECT_EQ(CallJoin(group.worker(1).stub(), group.JoinOf(1, 3)).status.error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
}

TEST(WorkerServiceTest, JoiningReportsThatItWaitsAndForWhom) {
  TestGroup group(2);
  group.timeout_ms = 50;
  v1::JoinRequest request = group.JoinOf(1, 1);
  request.set_rank0_address("unix:/tmp/fathom-nobody.sock");
  const JoinOutcome outcome = CallJoin(group.worker(1).stub(), request);
  EXPECT_EQ(outcome.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(outcome.status.error_message(), HasSubstr("fathom-nobody.sock"));
  ASSERT_FALSE(outcome.progress.empty());
  EXPECT_EQ(outcome.progress.back().phase(), v1::JoinProgress::PHASE_CONNECTING);
}

TEST(WorkerServiceTest, PublishedValuesAreFoundOverTheWire) {
  TestGroup group(1);
  v1::Worker::Stub& stub = group.worker(0).stub();
  v1::PublishRequest publish;
  publish.set_epoch(9);
  publish.set_key("key");
  publish.set_value(std::string("\0value", 6));
  v1::PublishResponse published;
  grpc::ClientContext publish_context;
  ASSERT_TRUE(stub.Publish(&publish_context, publish, &published).ok());
  v1::LookupRequest lookup;
  lookup.set_epoch(9);
  lookup.set_key("key");
  v1::LookupResponse found;
  grpc::ClientContext lookup_context;
  ASSERT_TRUE(stub.Lookup(&lookup_context, lookup, &found).ok());
  EXPECT_EQ(found.value(), std::string("\0value", 6));

  lookup.set_key("other");
  grpc::ClientContext short_context;
  short_context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Milliseconds(20)));
  EXPECT_EQ(stub.Lookup(&short_context, lookup, &found).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
}

}  // namespace
}  // namespace fathom
