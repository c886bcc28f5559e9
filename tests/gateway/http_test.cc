// HTTP/1.1 over real sockets: what is refused, what is kept alive, what has limits.
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

constexpr char kBody[] = R"({"prompt":[5]})";

class HttpTest : public GatewayTest {
 protected:
  // Refused with that status and the connection closed; another is served.
  void ExpectClosedWith(int status, std::string_view bytes, std::string_view message = "") {
    SCOPED_TRACE(std::string(bytes.substr(0, 200)));
    HttpClient client(port());
    client.Send(bytes);
    const HttpResponse response = client.Read();
    EXPECT_EQ(response.status, status);
    EXPECT_THAT(response.body, HasSubstr(absl::StrCat(",\"code\":", status, "}}")));
    EXPECT_THAT(response.body, HasSubstr(std::string(message)));
    EXPECT_EQ(response.headers.at("connection"), "close");
    EXPECT_TRUE(client.ReadsEnd());
    EXPECT_EQ(Ask(Get("/version")).status, 200);
  }
};

TEST_F(HttpTest, RefusesMalformedHeads) {
  const std::vector<std::string> heads = {
      "GARBAGE\r\n\r\n",
      "GET\r\n\r\n",
      "GET /version\r\n\r\n",
      "GET /version HTTP/1.1\nHost: a\n\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
      "GET /version HTTP/1.1\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
      "GET version HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET /%4 HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET http://other/version HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
      "GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\nx",
      "GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n"
      "Transfer-Encoding: chunked\r\n\r\n",
      "GET /version HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
      "Transfer-Encoding: chunked\r\n\r\n",
      "GET /version HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
  };
  for (const std::string& head : heads) ExpectClosedWith(400, head);
}

TEST_F(HttpTest, RefusesWhatItDoesNotSpeak) {
  ExpectClosedWith(505, "GET /version HTTP/2.0\r\nHost: a\r\n\r\n");
  ExpectClosedWith(505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  ExpectClosedWith(501, "POST /version HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n");
  ExpectClosedWith(501,
                   "POST /version HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n");
  ExpectClosedWith(417, "POST /version HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\n\r\n");
}

TEST_F(HttpTest, RefusesMalformedChunks) {
  const std::string head =
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n";
  ExpectClosedWith(400, head + "x\r\n");
  ExpectClosedWith(400, head + "5\r\nabcdeXX\r\n");
  ExpectClosedWith(400, head + "fffffffffffffffff\r\n");
  ExpectClosedWith(400, head + "5;" + std::string(2'000, 'x'));
  ExpectClosedWith(400, head + "0\r\n\rX");
  ExpectClosedWith(400, head + "0\r\nX: " + std::string(5'000, 'x'));
  ExpectClosedWith(400, head + "5\nabcde\r\n");
  ExpectClosedWith(400, head + "\r\n");
}

TEST_F(HttpTest, HoldsRequestsToTheirLimits) {
  ExpectClosedWith(431, "GET /version HTTP/1.1\r\nHost: a\r\nX: " + std::string(17'000, 'x'));
  ExpectClosedWith(414, "GET /" + std::string(17'000, 'x'));
  ExpectClosedWith(414, "GET /" + std::string(3'000, 'x') + " HTTP/1.1\r\nHost: a\r\n\r\n", "2048");
  std::string fields;
  for (int i = 0; i < 101; ++i) absl::StrAppend(&fields, "X", i, ": 1\r\n");
  ExpectClosedWith(431, "GET /version HTTP/1.1\r\nHost: a\r\n" + fields + "\r\n", "limit 100");
  ExpectClosedWith(413,
                   "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 8388609\r\n\r\n");
  ExpectClosedWith(413,
                   "POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                   "800001\r\n" +
                       std::string(64 << 10, ' '));
}

TEST_F(HttpTest, ServesManyRequestsOnOneConnection) {
  HttpClient client(port());
  for (int i = 0; i < 20; ++i) {
    client.Send(Get("/version"));
    EXPECT_EQ(client.Read().status, 200);
    client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
    EXPECT_EQ(EventsOf(client.Read()).back(), "[DONE]");
  }
}

TEST_F(HttpTest, AnswersPipelinedRequestsInOrder) {
  HttpClient client(port());
  client.Send(Post("/v1/completions", kBody) + Get("/nowhere") + Get("/version") +
              Post("/v1/completions", R"({"prompt":[5],"stream":true})") + Get("/live"));
  EXPECT_THAT(client.Read().body, HasSubstr("text_completion"));
  EXPECT_EQ(client.Read().status, 404);
  EXPECT_THAT(client.Read().body, HasSubstr("1.2.3"));
  EXPECT_EQ(EventsOf(client.Read()).back(), "[DONE]");
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(HttpTest, TakesRequestsHoweverTheyAreCut) {
  const std::string chunked =
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n5;ext=1\r\n{\"pro\r\n9\r\nmpt\":[5]}\r\n0\r\nX: y\r\n\r\n";
  HttpClient client(port());
  for (const size_t piece : {size_t{1}, size_t{7}, chunked.size()}) {
    for (size_t i = 0; i < chunked.size(); i += piece) client.Send(chunked.substr(i, piece));
    const HttpResponse response = client.Read();
    EXPECT_EQ(response.status, 200) << response.body;
  }
}

TEST_F(HttpTest, SaysContinueBeforeABodyThatWaitsForIt) {
  HttpClient client(port());
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
      "Content-Length: 14\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.Read().status, 100);
  client.Send(kBody);
  EXPECT_EQ(client.Read().status, 200);
  // A body that would be refused is not asked for.
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.Read().status, 413);
}

TEST_F(HttpTest, ClosesWhenAskedAndSpeaksHttp10) {
  HttpClient client(port());
  client.Send("GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(client.Read().headers.at("connection"), "close");
  EXPECT_TRUE(client.ReadsEnd());
  HttpClient old(port());
  old.Send(
      "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
      "Content-Length: 28\r\n\r\n{\"prompt\":[5],\"stream\":true}");
  const HttpResponse response = old.Read();
  EXPECT_EQ(response.headers.count("transfer-encoding"), 0u);
  EXPECT_EQ(EventsOf(response).back(), "[DONE]");
}

TEST_F(HttpTest, KnowsItsRoutesAndMethods) {
  HttpClient client(port());
  client.Send(Get("/nowhere"));
  EXPECT_EQ(client.Read().body,
            R"({"error":{"message":"Not Found","type":"Not Found","param":null,"code":404}})");
  client.Send(Get("/v1/completions"));
  const HttpResponse wrong_method = client.Read();
  EXPECT_EQ(wrong_method.status, 405);
  EXPECT_EQ(wrong_method.headers.at("allow"), "POST");
  EXPECT_EQ(wrong_method.body, R"({"error":{"message":"Method Not Allowed",)"
                               R"("type":"Method Not Allowed","param":null,"code":405}})");
  client.Send("OPTIONS /version HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(client.Read().headers.at("allow"), "GET, HEAD");
  client.Send("BREW /version HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(client.Read().status, 405);
  client.Send("HEAD /version HTTP/1.1\r\nHost: a\r\n\r\n");
  const HttpResponse head = client.ReadHead();
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "19");
  client.Send("GET http://a/version?x=1 HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(HttpTest, HangsUpOnClientsThatDoNotFinishTheirRequest) {
  options_.server.head_timeout = std::chrono::milliseconds(50);
  options_.server.body_timeout = std::chrono::milliseconds(50);
  options_.server.keep_alive_timeout = std::chrono::milliseconds(100);
  for (const char* part :
       {"GET /ver", "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{"}) {
    HttpClient client(port());
    client.Send(part);
    EXPECT_EQ(client.Read().status, 408);
    EXPECT_TRUE(client.ReadsEnd());
  }
  HttpClient idle(port());
  EXPECT_TRUE(idle.ReadsEnd());
  EXPECT_EQ(Ask(Get("/version")).status, 200);
}

TEST_F(HttpTest, TurnsAwayConnectionsBeyondTheLimitWhileAllOthersAreServed) {
  options_.server.max_connections = 2;
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.SendTokens({5});
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  HttpClient first(port()), second(port());
  for (HttpClient* client : {&first, &second}) {
    client->Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
    EXPECT_EQ(client->ReadHead().status, 200);
  }
  HttpClient third(port());
  const HttpResponse response = third.Read();
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(response.headers.at("retry-after"), "1");
  EXPECT_TRUE(third.ReadsEnd());
  EXPECT_TRUE(first.ReadChunk().has_value());
}

}  // namespace
}  // namespace fathom
