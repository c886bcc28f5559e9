// What an operator relies on: keys, request ids, the access log, the status page, room for whoever
// asks when others only hold connections open.
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gateway/access_log.h"
#include "gateway/http/request_id.h"
#include "gateway/openai/load_history.h"
#include "gateway/openai/status_page.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// `printf %s sesame | sha256sum`
constexpr char kSesameHash[] = "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272";

class OperationsTest : public GatewayTest {
 protected:
  OperationsTest() {
    folder_ = std::filesystem::temp_directory_path() /
              absl::StrCat("fathom-operations-", getpid(), "-", RandomHex());
    std::filesystem::create_directory(folder_);
  }
  ~OperationsTest() override { std::filesystem::remove_all(folder_); }

  std::string File(std::string_view name) const { return folder_ / std::string(name); }
  void Write(std::string_view name, std::string_view text) const {
    std::ofstream(File(name)) << text;
  }
  std::string Read(std::string_view name) const {
    std::ostringstream text;
    text << std::ifstream(File(name)).rdbuf();
    return text.str();
  }

  static std::string With(std::string_view header, std::string request) {
    request.insert(request.find("\r\n") + 2, absl::StrCat(std::string(header), "\r\n"));
    return request;
  }
  int StatusOf(const std::string& request) { return Ask(request).status; }

 private:
  std::filesystem::path folder_;
};

TEST_F(OperationsTest, WithKeysEveryRouteButProbesWantsOne) {
  options_.api_keys.keys = {"one", "two"};
  const std::string post = Post("/v1/completions", R"({"prompt":[5]})");
  for (const std::string& request :
       {post, Get("/v1/models"), Get("/metrics"), Get("/version"), Get("/load"), Get("/"),
        Get("/nowhere"), Post("/tokenize", "{}"), Post("/v1/messages", "{}")}) {
    SCOPED_TRACE(request);
    const HttpResponse refused = Ask(request);
    EXPECT_EQ(refused.status, 401);
    EXPECT_THAT(refused.body, HasSubstr(R"("type":"AuthenticationError","param":null,"code":401)"));
    EXPECT_EQ(refused.headers.count("www-authenticate"), 1u);
    EXPECT_EQ(refused.headers.at("connection"), "close");
  }
  for (const char* probe : {"/health", "/ready", "/live", "/ping"}) {
    EXPECT_EQ(StatusOf(Get(probe)), 200) << probe;
  }
  EXPECT_EQ(StatusOf(With("Authorization: Bearer one", post)), 200);
  EXPECT_EQ(StatusOf(With("authorization: bearer two", post)), 200);
  EXPECT_EQ(StatusOf(With("x-api-key: two", post)), 200);
  const std::string basic = absl::Base64Escape("anybody:one");
  EXPECT_EQ(StatusOf(With(absl::StrCat("Authorization: Basic ", basic), Get("/"))), 200);
  EXPECT_EQ(Ask(Get("/")).headers.at("www-authenticate"), "Basic realm=\"fathom\"");
  for (const char* wrong :
       {"Authorization: Bearer on", "Authorization: Bearer onee", "Authorization: Bearer",
        "Authorization: one", "Authorization: Basic !", "x-api-key: three"}) {
    EXPECT_EQ(StatusOf(With(wrong, post)), 401) << wrong;
  }
}

TEST_F(OperationsTest, WhoMayNotAskMakesTheServerReadNoBody) {
  options_.api_keys.keys = {"one"};
  HttpClient client(port());
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
      "Content-Length: 8000000\r\n\r\n");
  EXPECT_EQ(client.Read().status, 401);
  EXPECT_TRUE(client.ReadsEnd());
}

constexpr char kPreflight[] =
    "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAccess-Control-Request-Method: POST\r\n"
    "Access-Control-Request-Headers: authorization, content-type\r\n";

std::string PreflightFrom(const std::string& origin) {
  return absl::StrCat(kPreflight, "Origin: ", origin, "\r\n\r\n");
}

TEST_F(OperationsTest, WebPagesOfOtherOriginsMayNotAskUnlessTheyAreNamed) {
  EXPECT_EQ(StatusOf(PreflightFrom("https://evil.example")), 405);
  const HttpResponse response = Ask(With("Origin: https://evil.example", Get("/v1/models")));
  EXPECT_EQ(response.headers.count("access-control-allow-origin"), 0u);
}

TEST_F(OperationsTest, NamedWebPagesMayAskAndSayBeforehandThatTheyWillWithoutAKey) {
  options_.api_keys.keys = {"one"};
  options_.server.cross_origin.origins = {"https://app.example"};
  options_.server.cross_origin.headers = {"Authorization", "Content-Type"};
  options_.server.cross_origin.credentials = true;
  const HttpResponse allowed = Ask(PreflightFrom("https://app.example"));
  EXPECT_EQ(allowed.status, 204);
  EXPECT_EQ(allowed.headers.at("access-control-allow-origin"), "https://app.example");
  EXPECT_EQ(allowed.headers.at("access-control-allow-methods"), "GET, HEAD, POST");
  EXPECT_EQ(allowed.headers.at("access-control-allow-headers"), "Authorization, Content-Type");
  EXPECT_EQ(allowed.headers.at("access-control-allow-credentials"), "true");
  EXPECT_EQ(allowed.headers.at("vary"), "Origin");
  const HttpResponse refused = Ask(PreflightFrom("https://evil.example"));
  EXPECT_EQ(refused.status, 403);
  EXPECT_THAT(refused.body, HasSubstr("not among --allowed-origins"));
  EXPECT_EQ(refused.headers.count("access-control-allow-origin"), 0u);
  // What follows wants the key, and can be read whatever it says.
  const std::string post = Post("/v1/completions", R"({"prompt":[5],"stream":true})");
  const HttpResponse without = Ask(With("Origin: https://app.example", post));
  EXPECT_EQ(without.status, 401);
  EXPECT_EQ(without.headers.at("access-control-allow-origin"), "https://app.example");
  const HttpResponse with =
      Ask(With("Origin: https://app.example\r\nAuthorization: Bearer one", post));
  EXPECT_EQ(with.status, 200);
  EXPECT_EQ(with.headers.at("access-control-allow-origin"), "https://app.example");
  EXPECT_THAT(with.headers.at("access-control-expose-headers"), HasSubstr("X-Request-Id"));
}

TEST_F(OperationsTest, AStarLetsEveryWebPageAskAndMirrorsTheHeadersItWants) {
  options_.server.cross_origin.origins = {"*"};
  const HttpResponse allowed = Ask(PreflightFrom("https://any.example"));
  EXPECT_EQ(allowed.status, 204);
  EXPECT_EQ(allowed.headers.at("access-control-allow-origin"), "*");
  EXPECT_EQ(allowed.headers.at("access-control-allow-headers"), "authorization, content-type");
}

TEST_F(OperationsTest, OriginsThatNoBrowserSendsKeepTheGatewayFromStarting) {
  const auto message_of = [&](CrossOriginOptions options) {
    options_.server.cross_origin = std::move(options);
    return std::string(Gateway::Create(options_).status().message());
  };
  for (const char* wrong : {"https://app.example/", "app.example", "https://App.example", ""}) {
    EXPECT_THAT(message_of({.origins = {wrong}}), HasSubstr("is no origin")) << wrong;
  }
  EXPECT_THAT(message_of({.origins = {"*"}, .credentials = true}), HasSubstr("name the pages"));
  EXPECT_THAT(message_of({.origins = {"*"}, .methods = {"A B"}}), HasSubstr("'A B' is no name"));
  EXPECT_THAT(message_of({.origins = {"*"}, .methods = {"get"}}),
              HasSubstr("'get' is no method, expected the like of GET"));
}

TEST_F(OperationsTest, AKeyFileHoldsHashesAndIsReadAgain) {
  Write("keys", absl::StrCat("# ours\n\n", kSesameHash, " ali\n"));
  options_.api_keys.file = File("keys");
  options_.access_log_file = File("log");
  const std::string post = Post("/v1/completions", R"({"prompt":[5]})");
  EXPECT_EQ(StatusOf(post), 401);
  EXPECT_EQ(StatusOf(With("Authorization: Bearer sesame", post)), 200);
  EXPECT_EQ(StatusOf(With(absl::StrCat("Authorization: Bearer ", kSesameHash), post)), 401);
  EXPECT_THAT(Read("log"), HasSubstr(R"("caller":"ali")"));
  EXPECT_THAT(Read("log"), Not(HasSubstr("sesame")));

  const auto status_after = [&](std::string_view text) {
    Write("keys", text);
    Reload();
    return StatusOf(With("Authorization: Bearer sesame", post));
  };
  EXPECT_EQ(status_after("sesame ali\n"), 200) << "what cannot be read changes nothing";
  EXPECT_EQ(status_after(""), 200) << "nobody could ask";
  EXPECT_EQ(status_after(absl::StrCat(std::string(64, 'a'), " bo\n")), 401);
  EXPECT_EQ(status_after(absl::StrCat(kSesameHash, " ali\n")), 200);
}

TEST_F(OperationsTest, ABadKeyFileKeepsTheGatewayFromStarting) {
  options_.api_keys.file = File("keys");
  const auto refusal = [this] {
    const absl::Status status = Gateway::Create(options_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(refusal(), HasSubstr("cannot read --api-key-file"));
  Write("keys", "# nothing\n");
  EXPECT_THAT(refusal(), HasSubstr("has no key"));
  Write("keys", absl::StrCat(kSesameHash, " ali\nhush-hush bo\n"));
  EXPECT_THAT(refusal(), HasSubstr("line 2 of --api-key-file"));
  EXPECT_THAT(refusal(), Not(HasSubstr("hush")));
  Write("keys", absl::StrCat(kSesameHash, "\n"));
  EXPECT_THAT(refusal(), HasSubstr("and a name"));
}

TEST_F(OperationsTest, EveryResponseHasTheIdOfItsRequest) {
  EXPECT_EQ(Ask(With("X-Request-Id: job-7", Get("/version"))).headers.at("x-request-id"), "job-7");
  for (const char* id : {"a b", "x\x7f", "<script>", "a,b"}) {
    const HttpResponse response = Ask(With(absl::StrCat("X-Request-Id: ", id), Get("/version")));
    if (response.status != 200) continue;  // no header at all
    EXPECT_EQ(response.headers.at("x-request-id").size(), 32u) << id;
  }
  EXPECT_NE(Ask(Get("/live")).headers.at("x-request-id"),
            Ask(Get("/live")).headers.at("x-request-id"));
  EXPECT_EQ(Ask(Get("/nowhere")).headers.at("x-request-id").size(), 32u);
}

TEST_F(OperationsTest, TraceIdsAreTakenOnlyFromWellFormedHeaders) {
  const std::string trace = "4bf92f3577b34da6a3ce929d0e0e4736", parent = "00f067aa0ba902b7";
  const auto header = [](const std::string& version, const std::string& trace_id,
                         const std::string& parent_id, const std::string& end) {
    return absl::StrCat(version, "-", trace_id, "-", parent_id, "-", end);
  };
  EXPECT_EQ(TraceIdOf(header("00", trace, parent, "01")), trace);
  EXPECT_EQ(TraceIdOf(header("cc", trace, parent, "01-more")), trace);
  for (const std::string& wrong :
       {std::string(), header("00", trace, parent, "0"), header("00", trace, parent, "01-more"),
        header("ff", trace, parent, "01"), header("00", std::string(32, '0'), parent, "01"),
        header("00", trace, std::string(16, '0'), "01"),
        header("00", "4BF92F3577B34DA6A3CE929D0E0E4736", parent, "01"),
        header("0x", trace, parent, "01"), std::string(55, '-')}) {
    EXPECT_EQ(TraceIdOf(wrong), "") << wrong;
  }
}

TEST_F(OperationsTest, TheAccessLogHasALineOfJsonForEachRequest) {
  options_.access_log_file = File("log");
  Ask(With("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
           Post("/v1/completions", R"({"prompt":[5,6],"max_tokens":1})")));
  Ask("GET /a%0a%22b?secret=1 HTTP/1.1\r\nHost: x\r\n\r\n");
  Ask(Get("/live"));  // a probe that succeeds is nobody's business
  const std::string log = Read("log");
  const std::vector<std::string> lines = absl::StrSplit(log, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 2u) << log;
  EXPECT_THAT(lines[0],
              ::testing::MatchesRegex(
                  "\\{\"time\":\"20..-..-..T..:..:..\\....Z\",\"request_id\":\"test\","
                  "\"trace_id\":\"4bf92f3577b34da6a3ce929d0e0e4736\",\"client\":\"127.0.0.1"
                  ":[0-9]+\",\"method\":\"POST\",\"path\":\"/v1/completions\",\"route\":"
                  "\"/v1/completions\",\"status\":200,\"duration_ms\":[0-9.e-]+,"
                  "\"complete\":true,\"response_id\":\"cmpl-test\",\"prompt_tokens\":2,"
                  "\"completion_tokens\":1\\}"));
  EXPECT_THAT(lines[1], HasSubstr(R"("path":"/a\n\"b","route":"","status":404)"));
  EXPECT_THAT(log, Not(HasSubstr("secret")));
}

TEST_F(OperationsTest, NothingInTheAccessLogLooksLikeTheEndOfALine) {
  options_.access_log_file = File("log");
  // Next line, CSI, line separator, paragraph separator, DEL; and a dash that is none of them.
  Ask("GET /%C2%85%C2%9B%E2%80%A8%E2%80%A9%7F%E2%80%94 HTTP/1.1\r\nHost: x\r\n\r\n");
  Ask(Get("/live"));
  EXPECT_THAT(Read("log"), HasSubstr(R"("path":"/\u0085\u009b\u2028\u2029\u007f—","route":"")"));
}

TEST_F(OperationsTest, TheAccessLogFollowsAFileThatWasMovedAway) {
  options_.access_log_file = File("log");
  Ask(Get("/nowhere"));
  std::filesystem::rename(File("log"), File("log.1"));
  Ask(Get("/nowhere"));
  Reload();
  Ask(Get("/elsewhere"));
  Ask(Get("/live"));  // by now the line is written
  EXPECT_THAT(Read("log.1"), Not(HasSubstr("elsewhere")));
  EXPECT_THAT(Read("log"), HasSubstr("elsewhere"));
}

TEST_F(OperationsTest, ALogOnAFullDiskDropsLinesAndCountsThem) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  options_.access_log_file = "/dev/full";
  EXPECT_EQ(StatusOf(Post("/v1/completions", R"({"prompt":[5]})")), 200);
  EXPECT_THAT(Ask(Get("/metrics")).body, HasSubstr("fathom:access_log_lines_dropped 1"));
}

TEST_F(OperationsTest, AFurtherConnectionReplacesTheOneThatHasWaitedLongest) {
  options_.server.max_connections = 3;
  HttpClient oldest(port()), busy(port()), newest(port());
  oldest.Send("GET /version HT");  // never goes on
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.SendTokens({100});
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  busy.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  EXPECT_EQ(busy.ReadHead().status, 200);
  newest.Send(Get("/version"));
  EXPECT_EQ(newest.Read().status, 200);

  EXPECT_EQ(StatusOf(Get("/version")), 200);
  EXPECT_TRUE(oldest.ReadsEnd());
  EXPECT_THAT(busy.ReadChunk().value(), HasSubstr("data: "));
}

TEST_F(OperationsTest, TwoThousandSlowClientsKeepNobodyFromBeingServed) {
  rlimit files;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
  files.rlim_cur = files.rlim_max;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &files), 0);
  constexpr size_t kSlowClients = 2'000;
  if (files.rlim_cur < 2 * kSlowClients + 200) GTEST_SKIP() << "too few file descriptors";
  options_.server.head_timeout = std::chrono::seconds(2);
  options_.server.body_timeout = std::chrono::seconds(2);
  std::vector<std::unique_ptr<HttpClient>> slow;
  for (size_t i = 0; i < kSlowClients; ++i) {
    slow.push_back(std::make_unique<HttpClient>(port()));
    slow.back()->Send(i % 2 == 0 ? "GET /version HTTP/1.1\r\nHost: a\r\nX: "
                                 : "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: "
                                   "application/json\r\nContent-Length: 100\r\n\r\n{");
  }
  CoordinatorSays("hello");
  EXPECT_THAT(PostCompletion(R"({"prompt":[5]})").body, HasSubstr("hello"));
  const HttpResponse streamed = PostCompletion(R"({"prompt":[5],"stream":true})");
  EXPECT_EQ(EventsOf(streamed).back(), "[DONE]");
  // Each is told why, and let go of.
  for (const std::unique_ptr<HttpClient>& client : slow) {
    ASSERT_EQ(client->Read().status, 408);
    ASSERT_TRUE(client->ReadsEnd());
  }
}

TEST_F(OperationsTest, SaysHowManyRequestsItIsAnswering) {
  EXPECT_EQ(Ask(Get("/load")).body, R"({"server_load":0})");
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.SendTokens({100});
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  HttpClient client(port());
  client.Send(Post("/v1/completions", R"({"prompt":[5],"stream":true})"));
  client.ReadHead();
  EXPECT_TRUE(client.ReadChunk().has_value());
  EXPECT_EQ(Ask(Get("/load")).body, R"({"server_load":1})");
  client.Abort();
  EXPECT_TRUE(CoordinatorGetsIdle());
}

TEST_F(OperationsTest, TheStatusPageNeedsNothingFromElsewhereAndEscapesWhatItShows) {
  options_.model.names = {"<script>alert(1)</script>"};
  const HttpResponse page = Ask(Get("/"));
  EXPECT_EQ(page.status, 200);
  EXPECT_EQ(page.headers.at("content-type"), "text/html; charset=utf-8");
  EXPECT_THAT(page.headers.at("content-security-policy"), HasSubstr("default-src 'none'"));
  EXPECT_THAT(page.body, HasSubstr("&lt;script&gt;alert(1)&lt;/script&gt;"));
  for (const char* foreign : {"<script", "http://", "https://", "src=", "@import", "url("}) {
    EXPECT_THAT(page.body, Not(HasSubstr(foreign)));
  }
}

TEST(StatusPageTest, ShowsTheStateTheMemoryPlanAndTheLoad) {
  StatusPageData data;
  data.model_names = {"deepseek", "alias"};
  data.server.emplace();
  data.server->set_state(v1::ServerInfo::STATE_STARTING);
  data.server->set_state_detail("loading weights: 43 %");
  data.server->set_num_workers(2);
  data.metrics_text =
      "fathom:worker_memory_bytes{engine=\"0\",kind=\"budget\",worker=\"1\"} 1073741824\n"
      "fathom:worker_memory_bytes{engine=\"0\",kind=\"weights\",worker=\"1\"} 536870912\n";
  data.history = {{.prompt_tokens_per_second = 10,
                   .generated_tokens_per_second = 2345.6,
                   .num_running = 7,
                   .num_waiting = 1,
                   .kv_cache_usage = 0.5}};
  const std::string page = StatusPage(data);
  for (const char* shown : {"starting", "loading weights: 43 %", "2,346", "deepseek, alias",
                            "worker 1", "512 MiB", "1.0 GiB"}) {
    EXPECT_THAT(page, HasSubstr(shown));
  }
  EXPECT_THAT(page, Not(HasSubstr("worker 0")));
  data.metrics_text +=
      "fathom:worker_memory_bytes{engine=\"0\",kind=\"budget\",worker=\"0\"} 1073741824\n"
      "fathom:worker_memory_bytes{engine=\"0\",kind=\"weights\",worker=\"0\"} 536870912\n";
  EXPECT_THAT(StatusPage(data), HasSubstr("workers 0 to 1"));
  data.server.reset();
  EXPECT_THAT(StatusPage(data), HasSubstr("unreachable"));
}

TEST(LoadHistoryTest, MakesRatesOfCounters) {
  const auto text = [](int generated) {
    return absl::StrCat("# HELP vllm:generation_tokens_total x\n",
                        "vllm:generation_tokens_total{engine=\"0\"} ", generated, "\n",
                        "vllm:generation_tokens_total_of_others 9\n",
                        "vllm:num_requests_running{engine=\"0\"} 3\n");
  };
  LoadHistory history;
  const std::chrono::steady_clock::time_point start;
  history.Add(start, text(1000));
  history.Add(start + std::chrono::seconds(5), text(1500));
  history.Add(start + std::chrono::seconds(10), "");
  history.Add(start + std::chrono::seconds(15), text(100));
  ASSERT_EQ(history.samples().size(), 4u);
  EXPECT_EQ(history.samples()[0].generated_tokens_per_second, 0) << "nothing to compare with";
  EXPECT_EQ(history.samples()[1].generated_tokens_per_second, 100);
  EXPECT_EQ(history.samples()[1].num_running, 3);
  EXPECT_EQ(history.samples()[2].num_running, 0) << "the coordinator was away";
  EXPECT_EQ(history.samples()[3].generated_tokens_per_second, 0) << "it began anew";
  for (int i = 0; i < 200; ++i) history.Add(start, "");
  EXPECT_EQ(history.samples().size(), LoadHistory::kMaxSamples);
}

TEST(RecentValuesTest, KnowsTheQuantilesOfTheLastMinute) {
  RecentValues values;
  const RecentValues::TimePoint start;
  for (int i = 1; i <= 100; ++i) values.Add(start, 1000 + i);
  for (int i = 1; i <= 100; ++i) values.Add(start + std::chrono::seconds(60), i);
  const RecentValues::Quantiles quantiles = values.Since(start + std::chrono::seconds(1));
  EXPECT_EQ(quantiles.count, 100u);
  EXPECT_EQ(quantiles.p50, 51);
  EXPECT_EQ(quantiles.p99, 100);
  EXPECT_EQ(values.Since(start + std::chrono::seconds(61)).count, 0u);
  for (int i = 0; i < 10'000; ++i) values.Add(start + std::chrono::seconds(70), 5);
  EXPECT_EQ(values.Since(start).p99, 5) << "old ones are forgotten";
}

}  // namespace
}  // namespace fathom
