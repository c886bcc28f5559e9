// Several groups of workers behind one coordinator, and requests that outlive their group.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/serving_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

class GroupRouterTest : public ServingTest {
 protected:
  static constexpr int kSecondGroup = kNumWorkers;  // its first worker

  static v1::GenerateRequest Long(uint64_t seed) {
    v1::GenerateRequest request = Asking(10, 400, seed);
    request.set_ignore_eos(true);
    return request;
  }
  static v1::GenerateRequest WithGrammar(v1::GenerateRequest request, const std::string& text) {
    request.mutable_sampling()->mutable_grammar()->set_kind(v1::Grammar::KIND_REGEX);
    request.mutable_sampling()->mutable_grammar()->set_text(text);
    return request;
  }
  void MakeWorkersSlow() {
    for (auto& worker : workers_) worker->SetStepDelay(2);
  }
  void WaitUntilAllGroupsServe() {
    WaitUntil("all groups serve", [this] {
      const auto serving = [this](int engine) {
        return metrics_->Text().find("fathom:serving{engine=\"" + std::to_string(engine) +
                                     "\",model_name=\"a-model\"} 1") != std::string::npos;
      };
      for (size_t i = 0; i < workers_.size() / kNumWorkers; ++i) {
        if (!serving(static_cast<int>(i))) return false;
      }
      return true;
    });
  }
  void StartTwoGroups() {
    AddGroup();
    Start();
    WaitUntilAllGroupsServe();
  }
  void WaitUntilRunning(uint32_t count) {
    WaitUntil("they run", [this, count] { return ServerInfo().num_running() == count; });
  }
  int StepsOfGroup(int group) const { return workers_[group * kNumWorkers]->num_steps(); }
};

TEST_F(GroupRouterTest, SpreadsRequestsOverGroups) {
  StartTwoGroups();
  EXPECT_EQ(ServerInfo().num_workers(), 2u * kNumWorkers);
  EXPECT_EQ(ServerInfo().num_kv_blocks(), 2u * 2000);
  for (uint64_t seed = 1; seed <= 6; ++seed) ExpectServed(Asking(10, 10, seed));
  EXPECT_GT(StepsOfGroup(0), 0);
  EXPECT_GT(StepsOfGroup(1), 0);
  const std::string metrics = metrics_->Text();
  EXPECT_THAT(metrics,
              HasSubstr("vllm:prompt_tokens_total{engine=\"0\",model_name=\"a-model\"} 30"));
  EXPECT_THAT(metrics,
              HasSubstr("vllm:prompt_tokens_total{engine=\"1\",model_name=\"a-model\"} 30"));
  ExpectNoViolations();
}

TEST_F(GroupRouterTest, SendsARequestWhereTheBeginningOfItsPromptIs) {
  StartTwoGroups();
  for (uint64_t seed = 1; seed <= 9; ++seed) {  // an odd number, so that taking turns would miss
    EXPECT_EQ(Generate(Asking(200, 3, seed)).last.usage().cached_tokens(), 0u);
  }
  for (uint64_t seed = 1; seed <= 9; ++seed) {
    v1::GenerateRequest request = Asking(200, 3, seed);
    request.add_prompt_token_ids(99);
    EXPECT_EQ(Generate(request).last.usage().cached_tokens(), 200u) << seed;
  }
  WaitUntilAllIsFree();
}

TEST_F(GroupRouterTest, LeavesAGroupThatIsLoaded) {
  options_.group.max_sequences = 64;
  StartTwoGroups();
  const v1::GenerateRequest first = Asking(200, 3);
  ExpectServed(first);
  const int busy = StepsOfGroup(0) > 0 ? 0 : 1;
  ASSERT_EQ(StepsOfGroup(1 - busy), 0);
  for (auto& worker : workers_) worker->SetStepDelay(20);  // until all have come
  std::vector<std::thread> clients;
  const auto add_client = [&] {
    clients.emplace_back([this, first, index = clients.size()] {
      v1::GenerateRequest request = first;
      request.set_max_tokens(200);
      request.set_ignore_eos(true);
      request.mutable_sampling()->set_seed(100 + index);
      ExpectServed(request);
    });
    WaitUntilRunning(static_cast<uint32_t>(clients.size()));
  };
  while (clients.size() < GroupRouter::kSlackRequests + 1) add_client();
  EXPECT_EQ(StepsOfGroup(1 - busy), 0) << "it was not loaded yet";
  add_client();
  WaitUntil("the other one computes", [&] { return StepsOfGroup(1 - busy) > 0; });
  for (auto& worker : workers_) worker->SetStepDelay(0);
  for (std::thread& client : clients) client.join();
}

TEST_F(GroupRouterTest, GoesOnInAnotherGroupWithTheSameTokens) {
  StartTwoGroups();
  MakeWorkersSlow();
  std::vector<std::thread> clients;
  for (uint64_t i = 1; i <= 8; ++i) {
    clients.emplace_back([this, i] {
      v1::GenerateRequest request = Long(i);
      request.mutable_sampling()->set_num_prompt_logprobs(1);
      request.mutable_sampling()->set_num_logprobs(2);
      ExpectServed(request);
    });
  }
  WaitUntilRunning(8);
  workers_[kSecondGroup + 1]->Die();
  for (std::thread& client : clients) client.join();
  EXPECT_THAT(metrics_->Text(), HasSubstr("fathom:requests_resumed_total{engine=\"0\","
                                          "model_name=\"a-model\"} 4"));
  EXPECT_EQ(ServerInfo().state(), v1::ServerInfo::STATE_SERVING);
  EXPECT_THAT(ServerInfo().state_detail(), HasSubstr("group 1: "));
  EXPECT_EQ(Health(""), "SERVING");
  ExpectServed(Asking(5, 5));
  workers_[kSecondGroup + 1]->ComeBack();
  WaitUntilAllGroupsServe();
  for (uint64_t seed = 1; seed <= 4; ++seed) ExpectServed(Asking(10, 10, seed));
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

// FakeWorker says when it is given a grammar that it was not asked for.
TEST_F(GroupRouterTest, PreparesAGrammarWhereverItsRequestGoesOn) {
  AddGroup();
  Start();
  WaitUntilAllGroupsServe();
  MakeWorkersSlow();
  std::vector<std::thread> clients;
  for (uint64_t i = 1; i <= 6; ++i) {
    clients.emplace_back([this, i] { ExpectServed(WithGrammar(Long(i), std::to_string(i))); });
  }
  WaitUntilRunning(6);
  workers_[kSecondGroup]->Die();
  for (std::thread& client : clients) client.join();
  EXPECT_THAT(metrics_->Text(), HasSubstr("fathom:requests_resumed_total{engine=\"0\","
                                          "model_name=\"a-model\"} 3"));
  workers_[kSecondGroup]->ComeBack();
  WaitUntilAllGroupsServe();
  for (uint64_t i = 1; i <= 6; ++i) {
    ExpectServed(WithGrammar(Asking(5, 5, i), std::to_string(i)));
  }
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(GroupRouterTest, AGroupThatIsLostWhileItPreparesAGrammarIsNotWaitedFor) {
  AddGroup();
  Start();
  WaitUntilAllGroupsServe();
  std::vector<std::thread> clients;
  for (uint64_t i = 1; i <= 4; ++i) {
    clients.emplace_back([this, i] { ExpectServed(WithGrammar(Asking(10, 20, i), "slow")); });
  }
  WaitUntil("both groups prepare", [this] {
    return workers_[0]->num_grammars_waiting() == 2 &&
           workers_[kSecondGroup]->num_grammars_waiting() == 2;
  });
  EXPECT_EQ(ServerInfo().num_waiting(), 4u);
  workers_[kSecondGroup]->LetSlowGrammarsPass();
  workers_[0]->Die();
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(StepsOfGroup(0), 0);
  WaitUntil("nothing waits", [this] { return ServerInfo().num_waiting() == 0; });
  workers_[0]->ComeBack();
  WaitUntilAllGroupsServe();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(GroupRouterTest, WaitsForAGroupWhenNoneIsLeft) {
  StartTwoGroups();
  MakeWorkersSlow();
  std::vector<std::thread> clients;
  for (uint64_t i = 1; i <= 6; ++i) {
    clients.emplace_back([this, i] { ExpectServed(Long(i)); });
  }
  WaitUntilRunning(6);
  workers_[0]->Die();
  workers_[kSecondGroup]->Die();
  WaitUntil("all wait", [this] { return ServerInfo().num_waiting() == 6; });
  EXPECT_EQ(Health(""), "NOT_SERVING");
  for (uint64_t i = 7; i <= 9; ++i) {
    clients.emplace_back([this, i] { ExpectServed(Long(i)); });
  }
  WaitUntil("new ones wait too", [this] { return ServerInfo().num_waiting() == 9; });
  workers_[kSecondGroup]->ComeBack();
  for (std::thread& client : clients) client.join();
  workers_[0]->ComeBack();
  WaitUntilAllGroupsServe();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(GroupRouterTest, EndsWhatWaitedTooLongAndThenRefuses) {
  recovery_timeout_ = absl::Milliseconds(300);
  StartAndWait();
  MakeWorkersSlow();
  Answer answer;
  std::thread client([&] { answer = Generate(Long(1)); });
  WaitUntilRunning(1);
  workers_[1]->Die();
  client.join();
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("--recovery-timeout-seconds"));
  WaitUntil("requests are refused", [this] {
    return Generate(Asking(3, 3)).status.error_message().find("until the workers are back") !=
           std::string::npos;
  });
  workers_[1]->ComeBack();
  WaitUntilServing();
  ExpectServed(Asking(3, 3));
}

TEST_F(GroupRouterTest, ForgetsWhatIsCancelledWhileItWaits) {
  StartAndWait();
  MakeWorkersSlow();
  v1::GenerateRequest request = Long(1);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  WaitUntilRunning(1);
  workers_[1]->Die();
  WaitUntil("it waits", [this] { return ServerInfo().num_waiting() == 1; });
  context.TryCancel();
  WaitUntil("it is forgotten", [this] { return ServerInfo().num_waiting() == 0; });
  workers_[1]->ComeBack();
  WaitUntilServing();
  ExpectServed(Asking(3, 3));
  WaitUntilAllIsFree();
}

TEST_F(GroupRouterTest, EndsWhatWaitsWhenToldToDrain) {
  StartAndWait();
  MakeWorkersSlow();
  Answer answer;
  std::thread client([&] { answer = Generate(Long(1)); });
  WaitUntilRunning(1);
  workers_[1]->Die();
  WaitUntil("it waits", [this] { return ServerInfo().num_waiting() == 1; });
  router_->Drain();
  client.join();
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("draining"));
  router_->Join();
}

TEST_F(GroupRouterTest, BoundsWhatWaitsForAGroup) {
  options_.max_queued_requests = 3;
  StartAndWait();
  workers_[1]->Die();
  WaitUntil("it is noticed",
            [this] { return ServerInfo().state() == v1::ServerInfo::STATE_STARTING; });
  std::vector<std::thread> clients;
  for (uint64_t i = 1; i <= 3; ++i) {
    clients.emplace_back([this, i] { ExpectServed(Asking(3, 3, i)); });
  }
  WaitUntil("they wait", [this] { return ServerInfo().num_waiting() == 3; });
  const Answer refused = Generate(Asking(3, 3));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  workers_[1]->ComeBack();
  for (std::thread& client : clients) client.join();
}

TEST_F(GroupRouterTest, GivesUpARequestThatBreaksTheWorkersEveryTime) {
  StartAndWait();
  const uint64_t first_epoch = ServerInfo().epoch();
  workers_[1]->BreakAtNextStep(grpc::Status(grpc::StatusCode::INTERNAL, "poisoned"),
                               GroupRouter::kMaxFutileLosses);
  const Answer answer = Generate(Long(1));
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(answer.status.error_message(), HasSubstr("lost 3 times while they computed it"));
  EXPECT_THAT(Log(), HasSubstr("poisoned"));
  WaitUntilServing();
  EXPECT_EQ(ServerInfo().epoch(), first_epoch + GroupRouter::kMaxFutileLosses);
  ExpectServed(Long(2));
}

TEST_F(GroupRouterTest, LosesNothingWhileGroupsBreakAtRandom) {
  const uint64_t seed = std::random_device()();
  std::cout << "seed " << seed << "\n";
  StartTwoGroups();
  for (auto& worker : workers_) worker->SetStepDelay(1);
  std::atomic<int> num_served = 0;
  std::vector<std::thread> clients;
  for (int c = 0; c < 12; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937_64 random(seed + c);
      while (num_served < 300) {
        v1::GenerateRequest request = Asking(1 + random() % 30, 1 + random() % 100, random());
        if (random() % 4 == 0) request = WithGrammar(request, std::to_string(random() % 50));
        if (random() % 8 == 0) {
          Generate(request, [&](const v1::GenerateResponse&) { return false; });
        } else {
          ExpectServed(request);
          ++num_served;
        }
      }
    });
  }
  std::mt19937_64 random(seed);
  while (num_served < 300) {
    workers_[random() % workers_.size()]->BreakAtNextStep(
        grpc::Status(grpc::StatusCode::INTERNAL, "broken at random"));
    const int until = std::min(300, num_served + 12);  // about one each: they make progress
    while (num_served < until) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (std::thread& client : clients) client.join();
  WaitUntilAllGroupsServe();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

}  // namespace
}  // namespace fathom
