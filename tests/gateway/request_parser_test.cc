#include "gateway/http/request_parser.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

TEST(RequestParserTest, RefusesABodyBeyondTheLimitBeforeItArrives) {
  RequestParser parser({.body_bytes = 1'000});
  parser.Parse("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n");
  ASSERT_TRUE(parser.problem().has_value());
  EXPECT_EQ(parser.problem()->status, 413);
  EXPECT_THAT(parser.problem()->message, HasSubstr("larger than 1000 bytes"));
  EXPECT_EQ(parser.request().path, "/v1/completions");
}

TEST(RequestParserTest, RefusesAnotherProtocolAtItsFirstByte) {
  RequestParser parser({});
  parser.Parse("\x16\x03\x01");  // a TLS client's hello
  ASSERT_TRUE(parser.problem().has_value());
  EXPECT_EQ(parser.problem()->status, 400);
}

TEST(RequestParserTest, TakesARequestByteByByte) {
  const std::string bytes =
      "\r\nPOST /a%20b?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";
  RequestParser parser({});
  std::string buffer;
  for (const char byte : bytes) {
    buffer.push_back(byte);
    buffer.erase(0, parser.Parse(buffer));
    ASSERT_FALSE(parser.problem().has_value()) << parser.problem()->message;
  }
  ASSERT_TRUE(parser.done());
  EXPECT_EQ(parser.request().path, "/a b");
  EXPECT_EQ(parser.request().query, "c=d");
  EXPECT_EQ(parser.request().body, "{}");
}

}  // namespace
}  // namespace fathom
