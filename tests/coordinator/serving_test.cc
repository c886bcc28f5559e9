// Clients, coordinator and workers end to end, while nothing breaks.
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/serving_fixture.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

TEST_F(ServingTest, StreamsTokensThatFollowFromTheWholePrefix) {
  StartAndWait();
  for (const int num_prompt_tokens : {1, 3, 4, 5, 63, 64, 65, 200}) {
    ExpectServed(Asking(num_prompt_tokens, 20, num_prompt_tokens));
  }
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(ServingTest, TellsWhichModelItServesAndHow) {
  StartAndWait();
  grpc::ClientContext context;
  v1::ModelInfo model;
  ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &model).ok());
  EXPECT_EQ(model.architecture(), "DeepseekV3ForCausalLM");
  EXPECT_EQ(model.vocab_size(), FakeWorker::kVocabSize);
  EXPECT_EQ(model.max_model_len(), FakeWorker::kMaxPositionEmbeddings);
  const v1::ServerInfo info = ServerInfo();
  EXPECT_EQ(info.num_workers(), static_cast<uint32_t>(kNumWorkers));
  EXPECT_EQ(info.block_size(), 4u);
  EXPECT_EQ(info.num_kv_blocks(), 2000u) << "what the workers have room for";
}

TEST_F(ServingTest, ReportsLogprobsOfPromptAndOutput) {
  StartAndWait();
  v1::GenerateRequest request = Asking(100, 10);
  request.mutable_sampling()->set_num_logprobs(3);
  request.mutable_sampling()->set_num_prompt_logprobs(0);
  ExpectServed(request);
  request.set_max_tokens(0);
  request.mutable_sampling()->clear_num_logprobs();
  ExpectServed(request);
  ExpectNoViolations();
}

TEST_F(ServingTest, EndsAtStopTokensAndSaysWhich) {
  StartAndWait();
  v1::GenerateRequest request = Asking(5, 50);
  request.set_ignore_eos(true);
  const uint32_t third = ExpectedTokens(request)[2];
  request.mutable_sampling()->add_stop_token_ids(third);
  const Answer answer = Generate(request);
  EXPECT_THAT(answer.token_ids, SizeIs(3));
  EXPECT_EQ(answer.last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(answer.last.stop_token_id(), third);

  request.mutable_sampling()->set_min_tokens(30);
  EXPECT_EQ(ExpectedTokens(request).size() < 30, false);
  ExpectServed(request);
}

TEST_F(ServingTest, GeneratesUpToTheModelsLengthWhenMaxTokensIsLeftOut) {
  StartAndWait();
  v1::GenerateRequest request = Asking(500, 0);
  request.clear_max_tokens();
  request.set_ignore_eos(true);
  const Answer answer = Generate(request);
  EXPECT_THAT(answer.token_ids, SizeIs(12));
  EXPECT_EQ(answer.last.finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(ServingTest, DrawsSeedsReproduciblyForRequestsWithoutOne) {
  v1::GenerateRequest request = Asking(5, 8);
  request.mutable_sampling()->clear_seed();
  std::vector<std::vector<uint32_t>> runs;
  for (const uint64_t seed : {5, 5, 6}) {
    seed_ = seed;
    StartAndWait();
    for (int i = 0; i < 2; ++i) runs.push_back(Generate(request).token_ids);
    StopServer();
  }
  EXPECT_EQ(runs[0], runs[2]);
  EXPECT_EQ(runs[1], runs[3]);
  EXPECT_NE(runs[0], runs[1]);
  EXPECT_NE(runs[0], runs[4]);
}

TEST_F(ServingTest, RefusesAnInvalidRequestAndGoesOn) {
  StartAndWait();
  v1::GenerateRequest request = Asking(5, 5);
  request.add_prompt_token_ids(FakeWorker::kVocabSize);
  const Answer answer = Generate(request);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("prompt_token_ids[5]"));
  ExpectServed(Asking(5, 5));
}

TEST_F(ServingTest, EndsAFaultyRequestAndNoOther) {
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(1);
  std::thread neighbour([this] { ExpectServed(Asking(30, 60)); });
  v1::GenerateRequest poison = Asking(5, 5);
  poison.set_prompt_token_ids(0, FakeWorker::kPoisonTokenId);
  const Answer answer = Generate(poison);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("logits are not finite"));
  neighbour.join();
  WaitUntilAllIsFree();
}

TEST_F(ServingTest, GivesTheSameTokensAfterPreemption) {
  for (auto& worker : workers_) {
    worker->ChangeDescription(
        [](v1::DescribeResponse& d) { d.mutable_plan()->set_kv_block_capacity(40); });
  }
  StartAndWait();
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i] {
      v1::GenerateRequest request = Asking(10 + i, 80, i + 1);
      request.set_ignore_eos(true);
      request.mutable_sampling()->set_num_prompt_logprobs(1);
      ExpectServed(request);
    });
  }
  for (std::thread& client : clients) client.join();
  WaitUntilAllIsFree();
  EXPECT_THAT(metrics_->Text(), ::testing::Not(HasSubstr("num_preemptions_total{engine=\"0\","
                                                         "model_name=\"a-model\"} 0")))
      << "the story needs a preemption";
  ExpectNoViolations();
}

TEST_F(ServingTest, KeepsItsBooksWith64ClientsAndRandomCancels) {
  const uint64_t base_seed = std::random_device()();
  std::cout << "seed " << base_seed << "\n";
  for (auto& worker : workers_) {
    worker->ChangeDescription(
        [](v1::DescribeResponse& d) { d.mutable_plan()->set_kv_block_capacity(300); });
  }
  StartAndWait();
  std::vector<std::thread> clients;
  for (int c = 0; c < 64; ++c) {
    clients.emplace_back([this, seed = base_seed + c] {
      std::mt19937_64 random(seed);
      for (int i = 0; i < 4; ++i) {
        const auto request = Asking(1 + random() % 150, 1 + random() % 60, random());
        if (random() % 3 != 0) {
          ExpectServed(request);
          continue;
        }
        const int num_messages_wanted = static_cast<int>(random() % 5);
        int num_messages = 0;
        const Answer answer = Generate(request, [&](const v1::GenerateResponse&) {
          return ++num_messages < num_messages_wanted;
        });
        // What came before the cancellation is right.
        std::vector<uint32_t> expected = ExpectedTokens(request);
        ASSERT_LE(answer.token_ids.size(), expected.size());
        expected.resize(answer.token_ids.size());
        EXPECT_EQ(answer.token_ids, expected);
        EXPECT_TRUE(answer.status.ok() || answer.status.error_code() == grpc::StatusCode::CANCELLED)
            << answer.status.error_message();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(ServingTest, LetsASlowClientHaveItsTokensInFewerMessages) {
  StartAndWait();
  v1::GenerateRequest request = Asking(5, 400);
  request.set_ignore_eos(true);
  bool is_first = true;
  const Answer answer = Generate(request, [&](const v1::GenerateResponse&) {
    // Reads nothing until the server has made all steps.
    if (std::exchange(is_first, false)) {
      WaitUntil("the request is done", [this] { return ServerInfo().num_running() == 0; });
    }
    return true;
  });
  EXPECT_TRUE(answer.status.ok());
  EXPECT_EQ(answer.token_ids, ExpectedTokens(request));
  EXPECT_EQ(answer.last.usage().completion_tokens(), 400u);
}

TEST_F(ServingTest, RefusesRequestsAtOnceWhenTheQueueIsFull) {
  options_.max_queued_requests = 2;
  options_.group.max_sequences = 1;
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(5);
  std::vector<std::thread> clients;
  for (uint32_t num_queued = 0; num_queued < 3; ++num_queued) {
    clients.emplace_back([this] { ExpectServed(Asking(3, 100)); });
    WaitUntil("the request has arrived", [this, num_queued] {
      return ServerInfo().num_running() == 1 && ServerInfo().num_waiting() == num_queued;
    });
  }
  const Answer answer = Generate(Asking(3, 100));
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("the queue is full: 2 requests"));
  int retry_after = 0;
  EXPECT_TRUE(absl::SimpleAtoi(answer.status.error_details(), &retry_after));
  EXPECT_GE(retry_after, 1);
  for (auto& worker : workers_) worker->SetStepDelay(0);
  for (std::thread& client : clients) client.join();
  ExpectServed(Asking(3, 10));
}

TEST_F(ServingTest, EndsARequestThatHasWaitedForTooLong) {
  options_.group.max_sequences = 1;
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(5);
  std::thread client([this] { ExpectServed(Asking(3, 100)); });
  WaitUntil("the request has arrived", [this] { return ServerInfo().num_running() == 1; });
  v1::GenerateRequest impatient = Asking(3, 100);
  impatient.set_max_queue_ms(1);
  const Answer answer = Generate(impatient);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("max_queue_ms"));
  for (auto& worker : workers_) worker->SetStepDelay(0);
  client.join();
  impatient.set_max_queue_ms(60'000);
  ExpectServed(impatient);
  EXPECT_THAT(metrics_->Text(), HasSubstr("fathom:requests_expired_total{engine=\"0\","
                                          "model_name=\"a-model\"} 1"));
}

TEST_F(ServingTest, FreesTheBlocksOfACancelledRequest) {
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(2);
  v1::GenerateRequest request = Asking(100, 400);
  request.set_ignore_eos(true);
  const Answer answer = Generate(request, [](const v1::GenerateResponse&) { return false; });
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::CANCELLED);
  WaitUntilAllIsFree();
  EXPECT_LT(workers_[0]->num_steps(), 400);
  EXPECT_THAT(metrics_->Text(), HasSubstr("fathom:requests_cancelled_total{engine=\"0\","
                                          "model_name=\"a-model\"} 1"));
}

TEST_F(ServingTest, DrainsRunningRequestsAndRefusesNewOnes) {
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(2);
  std::thread client([this] { ExpectServed(Asking(10, 100)); });
  WaitUntil("it runs", [this] { return ServerInfo().num_running() == 1; });
  router_->Drain();
  EXPECT_EQ(ServerInfo().state(), v1::ServerInfo::STATE_DRAINING);
  EXPECT_EQ(Health(""), "NOT_SERVING");
  const Answer refused = Generate(Asking(3, 3));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("draining"));
  client.join();
  router_->Join();
}

TEST_F(ServingTest, EndsRequestsWhenItMustStopAtOnce) {
  StartAndWait();
  for (auto& worker : workers_) worker->SetStepDelay(2);
  Answer answer;
  std::thread client([&] {
    v1::GenerateRequest request = Asking(10, 400);
    request.set_ignore_eos(true);
    answer = Generate(request);
  });
  WaitUntil("it runs", [this] { return ServerInfo().num_running() == 1; });
  router_->Stop();
  router_->Join();
  client.join();
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("the server is stopping; try again"));
}

TEST_F(ServingTest, DrainsAtOnceWhenNothingRunsOrNoGroupExists) {
  StartAndWait();
  router_->Drain();
  router_->Join();
  StopServer();
  workers_[1]->Die();
  Start();
  router_->Drain();
  router_->Join();
}

TEST_F(ServingTest, AnswersTheStandardHealthCheck) {
  workers_[2]->Die();
  Start();
  EXPECT_EQ(Health(""), "NOT_SERVING");
  EXPECT_EQ(Health("fathom.v1.Generate"), "NOT_SERVING");
  workers_[2]->ComeBack();
  WaitUntilServing();
  EXPECT_EQ(Health(""), "SERVING");
  EXPECT_EQ(Health("fathom.v1.Generate"), "SERVING");
  EXPECT_THAT(Health("another"), Not(AllOf(HasSubstr("SERVING"))));
}

TEST_F(ServingTest, SharesPrefixesAndSaysHowMuchWasFound) {
  StartAndWait();
  v1::GenerateRequest request = Asking(41, 12);
  ExpectServed(request);
  uint32_t cached_at_first = 0;
  const Answer again = Generate(request, [&](const v1::GenerateResponse& message) {
    if (cached_at_first == 0) cached_at_first = message.usage().cached_tokens();
    return true;
  });
  EXPECT_EQ(again.token_ids, ExpectedTokens(request));
  EXPECT_EQ(cached_at_first, 40u) << "ten blocks of four";
  EXPECT_EQ(again.last.usage().cached_tokens(), 40u);

  // Another end, another seed, another salt: the tokens are those of a request that shares nothing.
  request.add_prompt_token_ids(100);
  request.mutable_sampling()->set_seed(77);
  ExpectServed(request);
  request.set_cache_salt("mine");
  EXPECT_EQ(Generate(request).last.usage().cached_tokens(), 0u);
  EXPECT_EQ(Generate(request).last.usage().cached_tokens(), 40u);
  WaitUntilAllIsFree();
  ExpectNoViolations();

  grpc::ClientContext context;
  v1::MetricsText metrics;
  ASSERT_TRUE(stub_->GetMetrics(&context, {}, &metrics).ok());
  const std::string labels = "{engine=\"0\",model_name=\"a-model\"} ";
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:prefix_cache_queries_total" + labels + "208"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:prefix_cache_hits_total" + labels + "120"));
}

TEST_F(ServingTest, CountsInMetricsThatDashboardsKnow) {
  StartAndWait();
  ExpectServed(Asking(10, 5));
  WaitUntilAllIsFree();
  grpc::ClientContext context;
  v1::MetricsText metrics;
  ASSERT_TRUE(stub_->GetMetrics(&context, {}, &metrics).ok());
  const std::string labels = "{engine=\"0\",model_name=\"a-model\"} ";
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:prompt_tokens_total" + labels + "10"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:generation_tokens_total" + labels + "5"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:num_requests_running" + labels + "0"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:num_requests_waiting" + labels + "0"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:kv_cache_usage_perc" + labels + "0"));
  EXPECT_THAT(metrics.text(), HasSubstr("vllm:iteration_tokens_total_bucket"));
  EXPECT_THAT(metrics.text(), HasSubstr("fathom:serving" + labels + "1"));
}

TEST_F(ServingTest, RefusesToListenWhereAnotherServerDoes) {
  StartAndWait();
  GenerateServer::Options options;
  options.addresses = {"unix:" + folder_ + "/coordinator"};
  EXPECT_EQ(GenerateServer::Start(options, *service_).status().code(),
            absl::StatusCode::kAlreadyExists);
  ExpectServed(Asking(3, 3));

  GenerateService other(*admission_, *router_, *metrics_);
  options.addresses = {"127.0.0.1:0"};
  const auto first = GenerateServer::Start(options, other);
  ASSERT_TRUE(first.ok());
  GenerateService third(*admission_, *router_, *metrics_);
  options.addresses = {"127.0.0.1:" + std::to_string((*first)->port())};
  const absl::Status status = GenerateServer::Start(options, third).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the port is in use"));
}

TEST_F(ServingTest, ListensInSeveralPlaces) {
  StartAndWait();
  GenerateService service(*admission_, *router_, *metrics_);
  GenerateServer::Options options;
  options.addresses = {"unix:" + folder_ + "/another", "127.0.0.1:0"};
  const auto server = GenerateServer::Start(options, service);
  ASSERT_TRUE(server.ok()) << server.status();
  for (const std::string& address :
       {options.addresses[0], "127.0.0.1:" + std::to_string((*server)->port())}) {
    const auto channel = ConnectTo(address, {});
    ASSERT_TRUE(channel.ok());
    grpc::ClientContext context;
    v1::ServerInfo info;
    const auto stub = v1::Generate::NewStub(*channel);
    EXPECT_TRUE(stub->GetServerInfo(&context, {}, &info).ok()) << address;
  }
}

TEST_F(ServingTest, AGrammarIsCompiledBeforeItsRequestIsQueued) {
  StartAndWait();
  v1::GenerateRequest request = Asking(5, 20);
  v1::Grammar& grammar = *request.mutable_sampling()->mutable_grammar();
  grammar.set_kind(v1::Grammar::KIND_JSON_SCHEMA);
  grammar.set_text("{}");
  ExpectServed(request);

  grammar.set_text("refused");
  const Answer refused = Generate(request);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(refused.status.error_message(), "the grammar is wrong at #/a");
  EXPECT_THAT(refused.token_ids, IsEmpty());
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(ServingTest, OthersAreServedWhileAGrammarIsCompiled) {
  StartAndWait();
  v1::GenerateRequest slow = Asking(5, 20);
  slow.mutable_sampling()->mutable_grammar()->set_kind(v1::Grammar::KIND_REGEX);
  slow.mutable_sampling()->mutable_grammar()->set_text("slow");
  std::thread client([&] { ExpectServed(slow); });
  ExpectServed(Asking(5, 20, 2));
  workers_[0]->LetSlowGrammarsPass();
  client.join();
  WaitUntilAllIsFree();
}

TEST_F(ServingTest, ARequestThatWaitsForItsGrammarCanBeCancelled) {
  StartAndWait();
  v1::GenerateRequest slow = Asking(5, 20);
  slow.mutable_sampling()->mutable_grammar()->set_kind(v1::Grammar::KIND_REGEX);
  slow.mutable_sampling()->mutable_grammar()->set_text("slow");
  {
    grpc::ClientContext context;
    const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader =
        stub_->Generate(&context, slow);
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  workers_[0]->LetSlowGrammarsPass();
  ExpectServed(Asking(5, 20, 2));
  WaitUntilAllIsFree();
  // It never ran, though its grammar was compiled in the end.
  EXPECT_THAT(metrics_->Text(),
              HasSubstr("vllm:prompt_tokens_total{engine=\"0\",model_name=\"a-model\"} 5"));
  ExpectNoViolations();
}

TEST_F(ServingTest, RefusesGrammarsOutOfRange) {
  StartAndWait();
  v1::GenerateRequest request = Asking(5, 20);
  v1::Grammar& grammar = *request.mutable_sampling()->mutable_grammar();
  const auto expect_refused = [&](const std::string& message) {
    const grpc::Status status = Generate(request).status;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
  };
  grammar.set_text("a");
  expect_refused("grammar.kind must be");
  grammar.set_kind(static_cast<v1::Grammar::Kind>(9));
  expect_refused("grammar.kind must be");
  grammar.set_kind(v1::Grammar::KIND_EBNF);
  grammar.set_text("");
  expect_refused("grammar.text must have 1 to 65536 bytes, got 0");
  grammar.set_text(std::string(65537, 'a'));
  expect_refused("got 65537");
  grammar.set_text("a");
  grammar.set_begins_after_token_id(FakeWorker::kVocabSize);
  expect_refused("grammar.begins_after_token_id must be in");
}

}  // namespace
}  // namespace fathom
