// Clients, the coordinator and the gateway itself come and go while requests run.
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/unique_fd.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

// Its kernel takes connections; it never reads nor writes.
class FrozenPeer {
 public:
  FrozenPeer() : listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const bytes = reinterpret_cast<sockaddr*>(&address);
    CHECK(bind(listener_.get(), bytes, size) == 0 && listen(listener_.get(), 16) == 0);
    CHECK(getsockname(listener_.get(), bytes, &size) == 0);
    port_ = ntohs(address.sin_port);
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

 private:
  const UniqueFd listener_;
  int port_ = 0;
};

class LifetimesTest : public GatewayTest {
 protected:
  // A coordinator that sends a token now and then nothing until it is cancelled.
  void CoordinatorStalls() {
    coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
      stream.SendTokens({100});
      stream.WaitUntilCancelled();
      return grpc::Status::OK;
    });
  }

  void WaitUntilCalled(size_t calls) {
    while (coordinator_.requests().size() < calls) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  static void ExpectShuttingDown(const HttpResponse& response) {
    EXPECT_EQ(response.status, 503);
    EXPECT_THAT(response.body, HasSubstr("the server is shutting down"));
    EXPECT_THAT(response.body, HasSubstr(R"("type":"ServiceUnavailableError")"));
    EXPECT_EQ(response.headers.count("retry-after"), 1u);
  }

  // The next chunks of a stream whose head was read.
  static void ExpectStreamIsShutDown(HttpClient& client) {
    const std::string error = client.ReadChunk().value_or("");
    EXPECT_THAT(error, HasSubstr("data: {\"error\":{\"message\":\"the server is shutting down"));
    EXPECT_THAT(error, HasSubstr(R"("type":"ServiceUnavailableError","param":null,"code":503}})"));
    EXPECT_EQ(client.ReadChunk(), "data: [DONE]\n\n");
    EXPECT_FALSE(client.ReadChunk().has_value());
    EXPECT_TRUE(client.ReadsEnd());
  }

  void ExpectCancelled(int calls) {
    EXPECT_TRUE(CoordinatorGetsIdle());
    EXPECT_EQ(coordinator_.num_cancelled(), calls);
    coordinator_.SetScript(Saying({100}));
    EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").status, 200);
  }
};

TEST_F(LifetimesTest, CancelsTheCallWhenTheClientOfAStreamLeaves) {
  CoordinatorStalls();
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  EXPECT_EQ(client.ReadHead().status, 200);
  EXPECT_THAT(client.ReadChunk().value(), HasSubstr("data: "));
  client.Abort();
  ExpectCancelled(1);
}

TEST_F(LifetimesTest, CancelsTheCallsWhenTheClientOfAWholeAnswerLeaves) {
  CoordinatorStalls();
  {
    HttpClient client(port());
    client.Send(Post("/v1/completions", R"({"prompt":[[5],[6]],"n":2})"));
    WaitUntilCalled(4);
  }  // closes in an orderly way, before anything was written
  ExpectCancelled(4);
}

TEST_F(LifetimesTest, NoticesAClientThatLeftBehindPipelinedRequests) {
  CoordinatorStalls();
  {
    HttpClient client(port());
    client.Send(Post("/v1/completions", R"({"prompt":[5]})") + Get("/version"));
    WaitUntilCalled(1);
  }
  ExpectCancelled(1);
}

TEST_F(LifetimesTest, EndsAStreamWithAnErrorWhenTheCoordinatorDies) {
  CoordinatorStalls();
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  EXPECT_EQ(client.ReadHead().status, 200);
  client.ReadChunk();
  coordinator_.Kill();
  EXPECT_THAT(client.ReadChunk().value(),
              HasSubstr(R"("message":"the connection to the coordinator broke before the request )"
                        R"(was finished; try again","type":"ServiceUnavailableError","param":null,)"
                        R"("code":503}})"));
  EXPECT_EQ(client.ReadChunk().value(), "data: [DONE]\n\n");
  EXPECT_FALSE(client.ReadChunk().has_value());

  // It stays down for a while, then comes back.
  client.Send(Post("/v1/completions", R"({"prompt":[5]})"));
  const HttpResponse refused = client.Read();
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.headers.count("retry-after"), 1u);
  coordinator_.SetScript(Saying({100}));
  coordinator_.Start();
  int status = 0;
  for (int i = 0; i < 1000 && status != 200; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    status = PostCompletion(R"({"prompt":[5]})").status;
  }
  EXPECT_EQ(status, 200);
}

TEST_F(LifetimesTest, AnswersWithAnErrorWhenTheCoordinatorDiesBeforeTheEnd) {
  CoordinatorStalls();
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5]})"));
  WaitUntilCalled(1);
  coordinator_.Kill();
  EXPECT_EQ(client.Read().status, 503);
}

TEST_F(LifetimesTest, SaysSoWhenACallEndsWithoutAReason) {
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.SendTokens({100});
    return grpc::Status::OK;
  });
  EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").status, 500);
  const std::vector<std::string> events =
      EventsOf(PostCompletion(R"({"prompt":[5],"stream":true})"));
  ASSERT_EQ(events.size(), 3u);
  EXPECT_THAT(events[1], HasSubstr("without a finish reason"));
}

TEST_F(LifetimesTest, FailsTheWholeAnswerWhenOneOfItsCallsFails) {
  coordinator_.SetScript([this](const v1::GenerateRequest& request, FakeStream& stream) {
    if (request.prompt_token_ids(0) == 6) {
      WaitUntilCalled(3);
      return grpc::Status(grpc::StatusCode::INTERNAL, "logits of the request were NaN");
    }
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  const HttpResponse response = PostCompletion(R"({"prompt":[[5],[6],[7]]})");
  EXPECT_EQ(response.status, 500);
  EXPECT_THAT(response.body, HasSubstr("NaN"));
  ExpectCancelled(2);
}

TEST_F(LifetimesTest, RefusesFastWithoutACoordinator) {
  coordinator_.Kill();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").status, 503);
  EXPECT_EQ(Ask(Get("/health")).status, 503);
  EXPECT_EQ(Ask(Get("/v1/models")).status, 503);
  EXPECT_EQ(Ask(Get("/metrics")).status, 200);
  EXPECT_EQ(Ask(Get("/live")).status, 200);
  // Not a measurement: each has its own deadline of at most five seconds, and none may hang.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  coordinator_.Start();
}

// Stopped, or on a machine that hangs: the connection is there, and nothing ever comes.
TEST_F(LifetimesTest, ProbesAreAnsweredWhileTheCoordinatorIsFrozen) {
  const FrozenPeer frozen;
  options_.coordinator.address = frozen.address();
  options_.coordinator.health_timeout = std::chrono::milliseconds(50);
  for (const char* probe : {"/health", "/ready", "/ping"}) {
    EXPECT_EQ(Ask(Get(probe)).status, 503) << probe;
  }
  EXPECT_EQ(Ask(Get("/live")).status, 200);
}

TEST_F(LifetimesTest, ReachesACoordinatorOverTcp) {
  options_.coordinator.address = coordinator_.tcp_address();
  EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").status, 200);
  coordinator_.Kill();
  EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").status, 503);
  coordinator_.Start();
  while (PostCompletion(R"({"prompt":[5]})").status != 200) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

// What a slow reader may hold up: itself.
TEST_F(LifetimesTest, DisconnectsAReaderThatTakesNothingAndServesOthersMeanwhile) {
  options_.server.write_timeout = std::chrono::milliseconds(200);
  constexpr int kMany = 100'000;  // events of 200 bytes: more than all socket buffers hold
  coordinator_.SetScript([](const v1::GenerateRequest& request, FakeStream& stream) {
    if (request.max_tokens() == 1) {
      stream.SendEnd({100}, v1::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    }
    for (int i = 0; i < kMany && stream.SendTokens({100}); ++i) {
    }
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  HttpClient::SetReceiveBuffer(4096);
  HttpClient slow(port());
  HttpClient::SetReceiveBuffer(0);
  slow.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true,"max_tokens":100})"));
  WaitUntilCalled(1);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(PostCompletion(R"({"prompt":[5],"max_tokens":1})").status, 200);
  }
  EXPECT_TRUE(CoordinatorGetsIdle());
  EXPECT_EQ(coordinator_.num_cancelled(), 1);
}

// What it has not taken gathers, so that it gets fewer events with more tokens.
TEST_F(LifetimesTest, ResumesAReaderThatPausedLessThanTheLimit) {
  constexpr int kMany = 20'000;
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    for (int i = 0; i + 1 < kMany; ++i) stream.SendTokens({100});
    stream.SendEnd({100}, v1::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  HttpClient::SetReceiveBuffer(4096);
  HttpClient slow(port());
  HttpClient::SetReceiveBuffer(0);
  slow.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true,"max_tokens":100,)"
                                    R"("stream_options":{"include_usage":true}})"));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const std::vector<std::string> events = EventsOf(slow.Read());
  ASSERT_GE(events.size(), 3u);
  EXPECT_LE(events.size(), kMany + 2u);
  EXPECT_THAT(events[events.size() - 2],
              HasSubstr(absl::StrCat(R"("completion_tokens":)", kMany, ",")));
}

class DrainTest : public LifetimesTest {
 protected:
  // `idle` has asked something, and `busy` has had the first of two tokens.
  void Begin(HttpClient& idle, HttpClient& busy) {
    coordinator_.SetScript([this](const v1::GenerateRequest&, FakeStream& stream) {
      stream.SendTokens({100});
      while (!go_ && !stream.cancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      stream.SendEnd({101}, v1::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    });
    idle.Send(Get("/version"));
    EXPECT_EQ(idle.Read().status, 200);
    busy.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
    EXPECT_EQ(busy.ReadHead().status, 200);
    busy.ReadChunk();
  }

  std::atomic<bool> go_{false};
};

TEST_F(DrainTest, FinishesRunningStreamsBeforeItStops) {
  HttpClient idle(port()), busy(port());
  Begin(idle, busy);
  StopOnce();
  EXPECT_TRUE(idle.ReadsEnd());
  go_ = true;
  EXPECT_THAT(busy.ReadChunk().value(), HasSubstr(R"("finish_reason":"length")"));
  EXPECT_EQ(busy.ReadChunk().value(), "data: [DONE]\n\n");
  EXPECT_FALSE(busy.ReadChunk().has_value());
  EXPECT_TRUE(busy.ReadsEnd());
  Join();
}

TEST_F(DrainTest, SaysThatItDrainsWhileItDoes) {
  HttpClient idle(port()), busy(port());
  Begin(idle, busy);
  HttpClient about_to_ask(port());
  StopOnce();
  EXPECT_TRUE(idle.ReadsEnd());
  about_to_ask.Send(Get("/health"));
  EXPECT_THAT(about_to_ask.Read().body, HasSubstr("draining"));
  EXPECT_TRUE(about_to_ask.ReadsEnd());
  for (const std::string& request :
       {Get("/health"), Get("/ready"), Get("/ping"), Get("/v1/models"), Get("/nowhere"),
        Post("/v1/completions", R"({"prompt":[5]})"), Post("/v1/messages", "{}")}) {
    SCOPED_TRACE(request);
    const HttpResponse refused = Ask(request);
    EXPECT_EQ(refused.status, 503);
    EXPECT_THAT(refused.body, HasSubstr("draining"));
    EXPECT_EQ(refused.headers.at("retry-after"), "1");
    EXPECT_EQ(refused.headers.at("connection"), "close");
  }
  for (const char* path : {"/live", "/metrics", "/load", "/version", "/"}) {
    HttpClient client(port());
    client.Send(Get(path));
    const HttpResponse answer = client.Read();
    EXPECT_EQ(answer.status, 200) << path;
    EXPECT_EQ(answer.headers.at("connection"), "close") << path;
    EXPECT_TRUE(client.ReadsEnd()) << path;
  }
  HttpClient silent(port());  // nobody waits for one that asks nothing
  go_ = true;
  EXPECT_THAT(busy.ReadChunk().value(), HasSubstr(R"("finish_reason":"length")"));
  EXPECT_EQ(busy.ReadChunk().value(), "data: [DONE]\n\n");
  EXPECT_FALSE(busy.ReadChunk().has_value());
  Join();
  EXPECT_TRUE(silent.ReadsEnd());
}

TEST_F(LifetimesTest, AnswersWhatOutlastsTheDrainTimeoutWithAnError) {
  options_.drain_timeout = std::chrono::milliseconds(50);
  CoordinatorStalls();
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5]})"));
  WaitUntilCalled(1);
  StopOnce();
  Join();
  ExpectShuttingDown(client.Read());
  EXPECT_TRUE(client.ReadsEnd());
  EXPECT_TRUE(CoordinatorGetsIdle());
  EXPECT_EQ(coordinator_.num_cancelled(), 1);
}

TEST_F(LifetimesTest, EndsStreamsThatOutlastTheDrainTimeoutWithAnError) {
  options_.drain_timeout = std::chrono::milliseconds(50);
  CoordinatorStalls();
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  EXPECT_EQ(client.ReadHead().status, 200);
  client.ReadChunk();
  StopOnce();
  ExpectStreamIsShutDown(client);
  Join();
  EXPECT_TRUE(CoordinatorGetsIdle());
  EXPECT_EQ(coordinator_.num_cancelled(), 1);
}

TEST_F(LifetimesTest, EndsEverythingWithAnErrorWhenToldToStopTwice) {
  CoordinatorStalls();
  HttpClient whole(port()), stream(port());
  whole.Send(Post("/v1/completions", R"({"prompt":[5]})"));
  stream.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  EXPECT_EQ(stream.ReadHead().status, 200);
  stream.ReadChunk();
  WaitUntilCalled(2);
  StopOnce();
  StopOnce();
  ExpectShuttingDown(whole.Read());
  EXPECT_TRUE(whole.ReadsEnd());
  ExpectStreamIsShutDown(stream);
  Join();
  EXPECT_TRUE(CoordinatorGetsIdle());
}

TEST_F(LifetimesTest, ServesManyStreamsAtOnceWithRandomCancels) {
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    for (int i = 0; i < 20; ++i) {
      if (!stream.SendTokens({100})) return grpc::Status::OK;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    stream.SendEnd({1}, v1::FINISH_REASON_STOP);
    return grpc::Status::OK;
  });
  Start();
  std::vector<std::thread> clients;
  std::atomic<int> whole{0};
  for (int i = 0; i < 32; ++i) {
    clients.emplace_back([this, i, &whole] {
      for (int round = 0; round < 4; ++round) {
        HttpClient client(port());
        client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true,"max_tokens":50})"));
        if ((i + round) % 3 == 0) {
          client.ReadHead();
          client.ReadChunk();
          client.Abort();
        } else if (EventsOf(client.Read()).size() == 22) {
          ++whole;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  int expected = 0;
  for (int i = 0; i < 32; ++i) {
    for (int round = 0; round < 4; ++round) expected += (i + round) % 3 != 0;
  }
  EXPECT_EQ(whole, expected);
  EXPECT_TRUE(CoordinatorGetsIdle());
}

TEST_F(LifetimesTest, SaysWhenThePortIsInUse) {
  GatewayOptions options = options_;
  options.server.port = port();
  const absl::StatusOr<std::unique_ptr<Gateway>> second = Gateway::Create(options);
  EXPECT_TRUE(absl::IsAlreadyExists(second.status()));
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr(absl::StrCat("port ", port(), " of 127.0.0.1 is in use")));
}

}  // namespace
}  // namespace fathom
