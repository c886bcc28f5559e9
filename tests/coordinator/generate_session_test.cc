// Many requests in one GenerateMany call.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <map>
#include <memory>
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

// A gateway, as far as the coordinator can tell.
class Session {
 public:
  explicit Session(v1::Generate::Stub& stub) : call_(stub.GenerateMany(&context_)) {}

  void Start(uint64_t stream, const v1::GenerateRequest& request) {
    Expect(stream);
    Send(StartOf(stream, request));
  }
  static v1::GenerateCommand StartOf(uint64_t stream, const v1::GenerateRequest& request) {
    v1::GenerateCommand command;
    command.set_stream(stream);
    *command.mutable_start() = request;
    return command;
  }
  void Expect(uint64_t stream) {
    answers_[stream];
    ++num_running_;
  }
  void CancelStream(uint64_t stream) {
    v1::GenerateCommand command;
    command.set_stream(stream);
    command.mutable_cancel();
    call_->Write(command);
    --num_running_;
  }
  void Send(const v1::GenerateCommand& command) { call_->Write(command); }
  void StartNoMore() { call_->WritesDone(); }
  void CancelCall() { context_.TryCancel(); }

  // False at the end of the call.
  bool ReadMessage() {
    v1::GenerateEvents events;
    if (!call_->Read(&events)) return false;
    ++num_messages_;
    for (int i = 0; i < events.streams_size(); ++i) {
      answers_.at(events.streams(i)).token_ids.push_back(events.token_ids(i));
    }
    for (const v1::StreamEvent& event : events.others()) Take(event);
    return true;
  }
  void ReadUntilAllHaveEnded() {
    while (num_running_ > 0) ASSERT_TRUE(ReadMessage()) << call_->Finish().error_message();
  }
  grpc::Status ReadToTheEnd() {
    while (ReadMessage()) {
    }
    return call_->Finish();
  }

  const Answer& answer(uint64_t stream) const { return answers_.at(stream); }
  int num_messages() const { return num_messages_; }

 private:
  void Take(const v1::StreamEvent& event) {
    Answer& answer = answers_.at(event.stream());
    if (event.has_failure()) {
      answer.status = grpc::Status(static_cast<grpc::StatusCode>(event.failure().code()),
                                   event.failure().message());
      answer.is_of_grammar = event.failure().is_of_grammar();
      --num_running_;
      return;
    }
    const v1::GenerateResponse& response = event.response();
    answer.token_ids.insert(answer.token_ids.end(), response.token_ids().begin(),
                            response.token_ids().end());
    answer.last = response;
    if (response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) --num_running_;
  }

  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::GenerateCommand, v1::GenerateEvents>> call_;
  std::map<uint64_t, Answer> answers_;
  int num_running_ = 0;
  int num_messages_ = 0;
};

class GenerateSessionTest : public ServingTest {
 protected:
  static v1::GenerateRequest Endless(uint64_t seed) {
    v1::GenerateRequest request = Asking(5, 480, seed);
    request.set_ignore_eos(true);
    return request;
  }
  void MakeWorkersSlow() {
    for (auto& worker : workers_) worker->SetStepDelay(2);
  }
};

TEST_F(GenerateSessionTest, SendsWhatAStepAddsToAllStreamsInOneMessage) {
  StartAndWait();
  Session session(*stub_);
  for (uint64_t i = 1; i <= 40; ++i) session.Start(i, Asking(static_cast<int>(i), 60, i));
  session.ReadUntilAllHaveEnded();
  for (uint64_t i = 1; i <= 40; ++i) {
    const Answer& answer = session.answer(i);
    EXPECT_EQ(answer.token_ids, ExpectedTokens(Asking(static_cast<int>(i), 60, i)));
    EXPECT_EQ(answer.last.usage().prompt_tokens(), i);
    EXPECT_EQ(answer.last.usage().completion_tokens(), answer.token_ids.size());
  }
  EXPECT_LE(session.num_messages(), workers_[0]->num_steps());
  session.StartNoMore();
  EXPECT_TRUE(session.ReadToTheEnd().ok());
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(GenerateSessionTest, GathersWhatASlowReaderHasNotTaken) {
  StartAndWait();
  Session session(*stub_);
  for (uint64_t i = 1; i <= 8; ++i) session.Start(i, Endless(i));
  WaitUntil("all steps are made",
            [this] { return workers_[0]->num_steps() >= 480 && ServerInfo().num_running() == 0; });
  session.ReadUntilAllHaveEnded();
  for (uint64_t i = 1; i <= 8; ++i) {
    EXPECT_EQ(session.answer(i).token_ids, ExpectedTokens(Endless(i)));
  }
}

TEST_F(GenerateSessionTest, CancelsOneStreamAndNoOther) {
  StartAndWait();
  MakeWorkersSlow();
  Session session(*stub_);
  session.Start(7, Endless(1));
  session.Start(9, Asking(5, 200, 2));
  while (session.answer(7).token_ids.empty()) ASSERT_TRUE(session.ReadMessage());
  session.CancelStream(7);
  session.CancelStream(12345);  // nobody's: it may have ended a moment ago
  session.Start(12, Asking(3, 3, 3));
  session.CancelStream(12);
  WaitUntil("they are forgotten", [this] { return ServerInfo().num_running() <= 1; });
  session.StartNoMore();
  EXPECT_TRUE(session.ReadToTheEnd().ok());
  EXPECT_EQ(session.answer(9).token_ids, ExpectedTokens(Asking(5, 200, 2)));
  WaitUntilAllIsFree();
}

TEST_F(GenerateSessionTest, RefusesOneRequestAndServesTheOthers) {
  StartAndWait();
  Session session(*stub_);
  v1::GenerateRequest invalid = Asking(5, 5);
  invalid.mutable_sampling()->set_temperature(-1);
  session.Start(1, Asking(5, 50, 1));
  session.Start(2, invalid);
  session.Start(3, Asking(5, 50, 3));
  session.ReadUntilAllHaveEnded();
  EXPECT_EQ(session.answer(2).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(session.answer(2).status.error_message(), HasSubstr("temperature"));
  EXPECT_EQ(session.answer(1).token_ids, ExpectedTokens(Asking(5, 50, 1)));
  EXPECT_EQ(session.answer(3).token_ids, ExpectedTokens(Asking(5, 50, 3)));
}

TEST_F(GenerateSessionTest, SaysWhenItIsTheGrammarThatIsRefused) {
  StartAndWait();
  Session session(*stub_);
  const auto asking_for = [](v1::Grammar::Kind kind, const char* text) {
    v1::GenerateRequest request = Asking(5, 5);
    request.mutable_sampling()->mutable_grammar()->set_kind(kind);
    request.mutable_sampling()->mutable_grammar()->set_text(text);
    return request;
  };
  session.Start(1, asking_for(v1::Grammar::KIND_REGEX, "refused"));  // by FakeWorker
  session.Start(2, asking_for(v1::Grammar::KIND_UNSPECIFIED, "a"));
  v1::GenerateRequest hot = asking_for(v1::Grammar::KIND_REGEX, "a");
  hot.mutable_sampling()->set_temperature(-1);
  session.Start(3, hot);
  session.ReadUntilAllHaveEnded();
  for (const uint64_t stream : {1, 2, 3}) {
    EXPECT_EQ(session.answer(stream).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(session.answer(stream).is_of_grammar, stream != 3) << stream;
  }
}

TEST_F(GenerateSessionTest, ReadsNoFurtherWhileManyRefusalsAreUnread) {
  StartAndWait();
  Session session(*stub_);
  v1::GenerateRequest invalid = Asking(5, 5);
  invalid.set_max_tokens(0);
  constexpr uint64_t kMany = 50 * GenerateSession::kMaxUnsentEnds;
  for (uint64_t i = 1; i <= kMany + 1; ++i) session.Expect(i);
  std::atomic<uint64_t> num_sent = 0;
  std::thread writer([&] {
    for (uint64_t i = 1; i <= kMany; ++i) {
      session.Send(Session::StartOf(i, invalid));
      ++num_sent;
    }
    session.Send(Session::StartOf(kMany + 1, Asking(5, 5, 1)));
  });
  // Time enough to send them all, if the server would read them.
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(num_sent, kMany);
  session.ReadUntilAllHaveEnded();
  writer.join();
  EXPECT_EQ(session.answer(kMany).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(session.answer(kMany + 1).token_ids, ExpectedTokens(Asking(5, 5, 1)));
}

TEST_F(GenerateSessionTest, EndsTheCallOfAClientThatBreaksTheProtocol) {
  StartAndWait();
  MakeWorkersSlow();
  Session twice(*stub_);
  twice.Start(1, Endless(1));
  twice.Start(1, Endless(2));
  const grpc::Status status = twice.ReadToTheEnd();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("stream 1 was started a second time"));
  Session empty(*stub_);
  empty.Start(1, Endless(1));
  empty.Send({});
  EXPECT_EQ(empty.ReadToTheEnd().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  WaitUntilAllIsFree();
}

TEST_F(GenerateSessionTest, ForgetsAllRequestsOfAClientThatIsGone) {
  StartAndWait();
  MakeWorkersSlow();
  Session session(*stub_);
  for (uint64_t i = 1; i <= 30; ++i) session.Start(i, Endless(i));
  ASSERT_TRUE(session.ReadMessage());
  session.CancelCall();
  EXPECT_EQ(session.ReadToTheEnd().error_code(), grpc::StatusCode::CANCELLED);
  WaitUntilAllIsFree();
}

TEST_F(GenerateSessionTest, ServesSeveralClientsWithRandomCancels) {
  const uint64_t seed = std::random_device()();
  std::cout << "seed " << seed << "\n";
  StartAndWait();
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([this, seed, c] {
      std::mt19937_64 random(seed + c);
      Session session(*stub_);
      std::map<uint64_t, v1::GenerateRequest> kept;
      for (uint64_t i = 1; i <= 100; ++i) {
        const v1::GenerateRequest request = Asking(1 + random() % 100, 1 + random() % 40, random());
        session.Start(i, request);
        if (random() % 4 == 0) {
          Session another(*stub_);  // leaves without a word
          another.Start(i, request);
          another.CancelCall();
          another.ReadToTheEnd();
        }
        kept[i] = request;
      }
      session.StartNoMore();
      EXPECT_TRUE(session.ReadToTheEnd().ok());
      for (const auto& [stream, request] : kept) {
        EXPECT_EQ(session.answer(stream).token_ids, ExpectedTokens(request));
      }
    });
  }
  for (std::thread& client : clients) client.join();
  WaitUntilAllIsFree();
  ExpectNoViolations();
}

TEST_F(GenerateSessionTest, EndsWhenTheServerStops) {
  StartAndWait();
  Session session(*stub_);
  session.Start(1, Asking(5, 5));
  session.ReadUntilAllHaveEnded();
  router_->Drain();
  router_->Join();
  session.Start(2, Asking(5, 5));
  session.ReadUntilAllHaveEnded();
  EXPECT_THAT(session.answer(2).status.error_message(), HasSubstr("draining"));
  service_->Close();
  const grpc::Status status = session.ReadToTheEnd();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is stopping; try again");
}

}  // namespace
}  // namespace fathom
