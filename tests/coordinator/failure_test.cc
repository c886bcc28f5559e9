// What clients see when workers break, hang, die or do not fit together.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
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

using ::testing::AllOf;
using ::testing::HasSubstr;

class FailureTest : public ServingTest {
 protected:
  // Runs eight clients and does `harm` while they are being served; what they got.
  std::vector<Answer> AnswersDespite(const std::function<void()>& harm) {
    for (auto& worker : workers_) worker->SetStepDelay(2);
    std::vector<Answer> answers(8);
    std::vector<std::thread> clients;
    for (size_t i = 0; i < answers.size(); ++i) {
      clients.emplace_back([this, i, &answers] { answers[i] = Generate(RequestOf(i)); });
    }
    WaitUntil("all run", [&] { return ServerInfo().num_running() == answers.size(); });
    const uint64_t epoch = ServerInfo().epoch();
    harm();
    for (std::thread& client : clients) client.join();
    for (auto& worker : workers_) worker->SetStepDelay(0);
    WaitUntil("a new group serves", [&] {
      return ServerInfo().epoch() > epoch && ServerInfo().state() == v1::ServerInfo::STATE_SERVING;
    });
    ExpectServed(Asking(20, 20));
    WaitUntilAllIsFree();
    ExpectNoViolations();
    return answers;
  }
  static v1::GenerateRequest RequestOf(size_t client) {
    v1::GenerateRequest request = Asking(10, 480, client + 1);
    request.set_ignore_eos(true);
    return request;
  }

  // The clients see a pause, no more.
  void ExpectAllGoOn(const std::function<void()>& harm) {
    const std::vector<Answer> answers = AnswersDespite(harm);
    for (size_t i = 0; i < answers.size(); ++i) {
      EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
      EXPECT_EQ(answers[i].token_ids, ExpectedTokens(RequestOf(i)));
    }
  }

  // For servers whose requests do not wait for the workers to come back. The cause, which names
  // addresses, is for the operator.
  void ExpectAllAreTold(const std::function<void()>& harm, const std::string& cause) {
    const std::vector<Answer> answers = AnswersDespite(harm);
    for (size_t i = 0; i < answers.size(); ++i) {
      EXPECT_EQ(answers[i].status.error_code(), grpc::StatusCode::UNAVAILABLE);
      EXPECT_EQ(answers[i].status.error_message(),
                "the request was not finished: the workers were lost; try again");
      std::vector<uint32_t> expected = ExpectedTokens(RequestOf(i));
      expected.resize(answers[i].token_ids.size());
      EXPECT_EQ(answers[i].token_ids, expected) << "what came before is right";
    }
    EXPECT_THAT(Log(), HasSubstr(cause));
  }
};

TEST_F(FailureTest, GoesOnWhenAWorkerBreaksItsStream) {
  StartAndWait();
  ExpectAllGoOn([this] {
    workers_[1]->BreakAtNextStep(grpc::Status(grpc::StatusCode::INTERNAL, "out of luck"));
  });
}

TEST_F(FailureTest, GoesOnWhenAWorkerDiesAndComesBack) {
  StartAndWait();
  std::thread newcomer;
  ExpectAllGoOn([&] {
    workers_[2]->Die();
    WaitUntil("it is noticed",
              [this] { return ServerInfo().state() == v1::ServerInfo::STATE_STARTING; });
    EXPECT_EQ(Health("fathom.v1.Generate"), "NOT_SERVING");
    newcomer = std::thread([this] { ExpectServed(Asking(3, 3)); });
    WaitUntil("all wait", [this] { return ServerInfo().num_waiting() == 9; });
    workers_[2]->ComeBack();
  });
  newcomer.join();
}

TEST_F(FailureTest, GoesOnWhenAWorkerHangs) {
  options_.group.step_timeout = absl::Milliseconds(500);
  options_.group.abort_timeout = absl::Milliseconds(200);
  StartAndWait();
  ExpectAllGoOn([this] { workers_[1]->HangAtNextStep(); });
}

TEST_F(FailureTest, TellsAllClientsWhenAWorkerBreaksItsStream) {
  recovery_timeout_ = absl::ZeroDuration();
  StartAndWait();
  ExpectAllAreTold(
      [this] {
        workers_[1]->BreakAtNextStep(grpc::Status(grpc::StatusCode::INTERNAL, "out of luck"));
      },
      "worker 1 (" + workers_[1]->address() + ") failed: out of luck");
}

TEST_F(FailureTest, TellsAllClientsWhenRank0LeavesQuietly) {
  recovery_timeout_ = absl::ZeroDuration();
  StartAndWait();
  ExpectAllAreTold(
      [this] {
        workers_[0]->BreakAtNextStep(grpc::Status(grpc::StatusCode::UNAVAILABLE, "going down"));
      },
      "worker 0 (" + workers_[0]->address() + ") was lost: going down");
}

TEST_F(FailureTest, TellsAllClientsWhenAWorkerDiesAndServesAgainWhenItIsBack) {
  recovery_timeout_ = absl::ZeroDuration();
  StartAndWait();
  ExpectAllAreTold(
      [this] {
        workers_[2]->Die();
        WaitUntil("it is noticed",
                  [this] { return ServerInfo().state() == v1::ServerInfo::STATE_STARTING; });
        EXPECT_EQ(Health("fathom.v1.Generate"), "NOT_SERVING");
        const Answer refused = Generate(Asking(3, 3));
        EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
        EXPECT_EQ(refused.status.error_message(),
                  "no steps can be made until the workers are back; try again");
        workers_[2]->ComeBack();
      },
      "worker 2 (" + workers_[2]->address() + ") was lost");
}

TEST_F(FailureTest, TellsAllClientsWhenAWorkerHangs) {
  recovery_timeout_ = absl::ZeroDuration();
  options_.group.step_timeout = absl::Milliseconds(500);
  options_.group.abort_timeout = absl::Milliseconds(200);
  StartAndWait();
  ExpectAllAreTold([this] { workers_[1]->HangAtNextStep(); },
                   "worker 1 (" + workers_[1]->address() + ") did not finish step");
}

TEST_F(FailureTest, DoesNotTrustAWorkerWhoseResultCannotBe) {
  recovery_timeout_ = absl::ZeroDuration();
  StartAndWait();
  ExpectAllAreTold(
      [this] {
        workers_[0]->SpoilNextResult([](v1::StepResult& result) {
          result.set_sampled_token_ids(0, FakeWorker::kVocabSize);
        });
      },
      "has token 1000 for slot");
  ExpectAllAreTold(
      [this] { workers_[2]->SpoilNextResult([](v1::StepResult& result) { result.set_step(1); }); },
      "worker 2 (" + workers_[2]->address() + ") answered step 1");
}

TEST_F(FailureTest, NoticesALostWorkerWhileNothingRuns) {
  StartAndWait();
  ExpectServed(Asking(5, 5));
  workers_[1]->Die();
  WaitUntil("it is noticed",
            [this] { return ServerInfo().state() == v1::ServerInfo::STATE_STARTING; });
  WaitUntil("the operator is told whom it waits for",
            [this] { return ServerInfo().state_detail().find("worker 1") != std::string::npos; });
  workers_[1]->ComeBack();
  WaitUntilServing();
  ExpectServed(Asking(5, 5));
}

TEST_F(FailureTest, SurvivesTheSameFailureManyTimes) {
  StartAndWait();
  for (int i = 0; i < 10; ++i) {
    workers_[i % kNumWorkers]->BreakAtNextStep(grpc::Status(grpc::StatusCode::ABORTED, "again"));
    ExpectServed(Asking(5, 50));
  }
  ExpectNoViolations();
}

TEST_F(FailureTest, TellsEveryClientTheTruthWhileWorkersBreakAtRandom) {
  const uint64_t seed = std::random_device()();
  std::cout << "seed " << seed << "\n";
  StartAndWait();
  std::atomic<int> num_served = 0;
  std::vector<std::thread> clients;
  for (int c = 0; c < 12; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937_64 random(seed + c);
      while (num_served < 100) {
        const auto request = Asking(1 + random() % 100, 1 + random() % 40, random());
        const bool must_cancel = random() % 4 == 0;
        const Answer answer =
            Generate(request, [&](const v1::GenerateResponse&) { return !must_cancel; });
        std::vector<uint32_t> expected = ExpectedTokens(request);
        if (answer.status.ok()) {
          ++num_served;
        } else {
          // A long prompt may meet three faults before its first token.
          EXPECT_TRUE((must_cancel && answer.status.error_code() == grpc::StatusCode::CANCELLED) ||
                      answer.status.error_message().find("while they computed it") !=
                          std::string::npos)
              << answer.status.error_message();
          ASSERT_LE(answer.token_ids.size(), expected.size());
          expected.resize(answer.token_ids.size());
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        EXPECT_EQ(answer.token_ids, expected);
      }
    });
  }
  // Between two faults somebody is served: groups that break before their first step, one after the
  // other, would only test the backoff.
  std::mt19937_64 random(seed);
  while (num_served < 100) {
    workers_[random() % kNumWorkers]->BreakAtNextStep(
        grpc::Status(grpc::StatusCode::INTERNAL, "broken at random"));
    const int num_served_before = num_served;
    const int num_more = 1 + static_cast<int>(random() % 15);
    while (num_served < std::min(100, num_served_before + num_more)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  for (std::thread& client : clients) client.join();
  WaitUntilServing();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(FailureTest, WaitsForWorkersThatAreNotThereYet) {
  workers_[1]->Die();
  Start();
  grpc::ClientContext context;
  v1::ModelInfo model;
  const grpc::Status status = stub_->GetModelInfo(&context, {}, &model);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("not known yet"));
  EXPECT_EQ(Generate(Asking(3, 3)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  workers_[1]->ComeBack();
  WaitUntilServing();
  ExpectServed(Asking(3, 3));
}

TEST_F(FailureTest, NamesTheWorkerWhoseModelIsAnother) {
  workers_[2]->ChangeDescription(
      [](v1::DescribeResponse& d) { d.set_model_fingerprint("another model"); });
  Start();
  WaitUntil("the operator is told", [this] { return !ServerInfo().state_detail().empty(); });
  EXPECT_THAT(ServerInfo().state_detail(),
              AllOf(HasSubstr("worker 2"), HasSubstr("'another model'"), HasSubstr("'a model'")));
  EXPECT_EQ(workers_[0]->num_joins(), 0);
  workers_[2]->ChangeDescription(
      [](v1::DescribeResponse& d) { d.set_model_fingerprint("a model"); });
  WaitUntilServing();
}

TEST_F(FailureTest, ARestartedCoordinatorGoesOnWithLaterEpochs) {
  StartAndWait();
  EXPECT_EQ(ServerInfo().epoch(), 1u);
  StopServer();
  StartAndWait();
  EXPECT_EQ(ServerInfo().epoch(), 2u);
  StopServer();
  workers_[0]->Die();
  workers_[0]->ComeBack();  // it has forgotten, the others have not
  StartAndWait();
  EXPECT_EQ(ServerInfo().epoch(), 3u);
  ExpectServed(Asking(3, 3));
  ExpectNoViolations();
}

TEST_F(FailureTest, TriesAgainWhenAWorkerCannotJoin) {
  workers_[1]->FailNextJoin(grpc::Status(grpc::StatusCode::NOT_FOUND, "no such tensor"));
  options_.engine.min_backoff = absl::Milliseconds(500);
  Start();
  WaitUntil("the operator is told", [this] {
    return ServerInfo().state_detail().find("no such tensor") != std::string::npos;
  });
  WaitUntilServing();
  EXPECT_EQ(workers_[1]->num_joins(), 2);
  ExpectServed(Asking(3, 3));
  ExpectNoViolations();
}

}  // namespace
}  // namespace fathom
