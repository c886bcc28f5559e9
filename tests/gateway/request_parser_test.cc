#include "gateway/http/request_parser.h"

#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

// What became of the bytes: the request, or why it was refused, and how many bytes it took.
struct Outcome {
  int status = 0;  // 0: incomplete, 200: done, else the problem's
  std::string method, path, query, body;
  std::vector<std::pair<std::string, std::string>> headers;
  size_t taken = 0;

  bool operator==(const Outcome&) const = default;
};

// Feeds the parser pieces of at most `piece` bytes.
Outcome Parse(std::string_view bytes, size_t piece) {
  RequestParser parser({.head_bytes = 1000, .fields = 10, .target_bytes = 100, .body_bytes = 200});
  Outcome outcome;
  std::string waiting;
  size_t arrived = 0;
  while (!parser.done() && !parser.problem() && arrived < bytes.size()) {
    waiting += bytes.substr(arrived, piece);
    arrived = std::min(arrived + piece, bytes.size());
    const size_t taken = parser.Parse(waiting);
    outcome.taken += taken;
    waiting.erase(0, taken);
  }
  if (parser.problem()) outcome.status = parser.problem()->status;
  if (!parser.done()) return outcome;
  outcome.status = 200;
  const HttpRequest& request = parser.request();
  outcome.method = request.method;
  outcome.path = request.path;
  outcome.query = request.query;
  outcome.body = request.body;
  outcome.headers = request.headers;
  return outcome;
}

const std::vector<std::string>& GoodRequests() {
  static const std::vector<std::string> requests = {
      "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
      "GET /a%20b/%e6%9d%ad?x=%41&y HTTP/1.1\r\nHost: a\r\nX-Y:  spaced \r\n\r\n",
      "POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
      "POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
      "3\r\nhel\r\n2;x=\"y\"\r\nlo\r\n0\r\nTrailer: z\r\n\r\n",
      "PUT http://a/p HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
      "GET /old HTTP/1.0\r\n\r\n",
  };
  return requests;
}

TEST(RequestParserTest, DecodesTargetsAndHeaders) {
  const Outcome outcome = Parse(GoodRequests()[1], 1000);
  EXPECT_EQ(outcome.status, 200);
  EXPECT_EQ(outcome.path, "/a b/杭");
  EXPECT_EQ(outcome.query, "x=%41&y");
  EXPECT_THAT(outcome.headers, ::testing::Contains(::testing::Pair("x-y", "spaced")));
}

TEST(RequestParserTest, JoinsChunks) { EXPECT_EQ(Parse(GoodRequests()[3], 1000).body, "hello"); }

TEST(RequestParserTest, TakesExactlyOneRequestHoweverItArrives) {
  for (const std::string& request : GoodRequests()) {
    const Outcome whole = Parse(request, request.size());
    EXPECT_EQ(whole.status, 200) << request;
    EXPECT_EQ(whole.taken, request.size());
    for (size_t piece = 1; piece < request.size(); ++piece) {
      EXPECT_EQ(Parse(request, piece), whole) << piece << " bytes at a time: " << request;
    }
    // What follows belongs to the next.
    EXPECT_EQ(Parse(request + "GET /next HTTP/1.1\r\n", 10'000), whole);
  }
}

TEST(RequestParserTest, ForgivesAnEmptyLineBeforeARequest) {
  EXPECT_EQ(Parse("\r\n" + GoodRequests()[0], 1000).status, 200);
}

TEST(RequestParserTest, TheWholeServerIsATargetOfOptionsAlone) {
  EXPECT_EQ(Parse("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 1000).status, 200);
  EXPECT_EQ(Parse("GET * HTTP/1.1\r\nHost: a\r\n\r\n", 1000).status, 400);
}

TEST(RequestParserTest, HoldsBodiesToTheirLimit) {
  const std::string head = "POST / HTTP/1.1\r\nHost: a\r\n";
  EXPECT_EQ(Parse(head + "Content-Length: 201\r\n\r\n", 1000).status, 413);
  EXPECT_EQ(Parse(head + "Content-Length: 200\r\n\r\n" + std::string(200, 'x'), 1000).status, 200);
  EXPECT_EQ(Parse(head + "Transfer-Encoding: chunked\r\n\r\n65\r\n" + std::string(101, 'x') +
                      "\r\n64\r\n" + std::string(100, 'x') + "\r\n0\r\n\r\n",
                  1000)
                .status,
            413);
}

TEST(RequestParserTest, RefusesABodyBeyondTheLimitBeforeItArrives) {
  RequestParser parser({.body_bytes = 1'000});
  parser.Parse("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n");
  ASSERT_TRUE(parser.problem().has_value());
  EXPECT_EQ(parser.problem()->status, 413);
  EXPECT_THAT(parser.problem()->message, ::testing::HasSubstr("larger than 1000 bytes"));
  EXPECT_EQ(parser.request().path, "/v1/completions");
}

TEST(RequestParserTest, RefusesAnotherProtocolAtItsFirstByte) {
  RequestParser parser({});
  parser.Parse("\x16\x03\x01");  // a TLS client's hello
  ASSERT_TRUE(parser.problem().has_value());
  EXPECT_EQ(parser.problem()->status, 400);
}

// Whatever arrives, it is refused or parsed, and the pieces it arrives in do not matter.
TEST(RequestParserTest, SurvivesRandomDamage) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto below = [&random](size_t n) { return random() % n; };
  const std::string spice(
      "\r\n :;,%/?\0\t\xff"
      "0159afHTP",
      20);
  for (int round = 0; round < 20'000; ++round) {
    std::string request = GoodRequests()[below(GoodRequests().size())];
    for (size_t edits = 1 + below(3); edits > 0; --edits) {
      const size_t at = below(request.size());
      switch (below(4)) {
        case 0:
          request[at] = spice[below(spice.size())];
          break;
        case 1:
          request.insert(at, 1, spice[below(spice.size())]);
          break;
        case 2:
          request.erase(at, 1 + below(3));
          break;
        default:
          request.insert(at, request.substr(below(request.size()), below(20)));
      }
      if (request.empty()) request = " ";
    }
    const Outcome whole = Parse(request, request.size());
    const Outcome pieces = Parse(request, 1 + below(5));
    EXPECT_TRUE(whole.status == 0 || whole.status == 200 ||
                (whole.status >= 400 && whole.status < 600));
    EXPECT_EQ(whole.status == 200, pieces.status == 200) << request;
    if (whole.status == 200) {
      EXPECT_EQ(pieces, whole) << request;
    }
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace fathom
