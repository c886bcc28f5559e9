#include "gateway/openai/json_writer.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "gateway/openai/json_fields.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

TEST(JsonWriterTest, PutsCommasWhereTheyBelong) {
  JsonWriter json;
  json.BeginObject().Key("a").BeginArray().Int(1).Int(-2).BeginObject().EndObject().EndArray();
  json.Key("b").BeginObject().Key("c").Null().Key("d").Bool(true).EndObject();
  json.Key("e").BeginArray().EndArray().EndObject();
  EXPECT_EQ(json.text(), R"({"a":[1,-2,{}],"b":{"c":null,"d":true},"e":[]})");
}

TEST(JsonWriterTest, EscapesWhatJsonForbids) {
  JsonWriter json;
  json.String(std::string("\"\\/\b\f\n\r\t\0\x1f\x7f", 11));
  EXPECT_EQ(json.text(), "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\x7f\"");
}

TEST(JsonWriterTest, ReplacesWhatIsNoUtf8) {
  const auto quoted = [](std::string_view text) {
    JsonWriter json;
    json.String(text);
    return json.Take();
  };
  EXPECT_EQ(quoted("杭州🙂"), "\"杭州🙂\"");
  EXPECT_EQ(quoted("a\xff"
                   "b"),
            "\"a\uFFFDb\"");
  EXPECT_EQ(quoted("\xc0\x80"), "\"\uFFFD\uFFFD\"");            // overlong
  EXPECT_EQ(quoted("\xed\xa0\x80"), "\"\uFFFD\uFFFD\uFFFD\"");  // a surrogate
  EXPECT_EQ(quoted("\xf4\x90\x80\x80"), "\"\uFFFD\uFFFD\uFFFD\uFFFD\"");
  EXPECT_EQ(quoted("\xe6\x9d"), "\"\uFFFD\uFFFD\"");  // cut off
}

TEST(JsonWriterTest, WritesTheShortestNumberThatReadsBack) {
  const auto written = [](float number) {
    JsonWriter json;
    json.Float(number);
    return json.Take();
  };
  EXPECT_EQ(written(-0.1f), "-0.1");
  EXPECT_EQ(written(0.0f), "0.0");
  EXPECT_EQ(written(-9999.0f), "-9999.0");
  EXPECT_EQ(written(1e-30f), "1e-30");
  EXPECT_EQ(written(std::numeric_limits<float>::infinity()), "null");
  EXPECT_EQ(written(std::numeric_limits<float>::quiet_NaN()), "null");
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int i = 0; i < 10'000; ++i) {
    float number;
    const uint32_t bits = random();
    static_assert(sizeof(bits) == sizeof(number));
    std::memcpy(&number, &bits, sizeof(number));
    if (!std::isfinite(number)) continue;
    EXPECT_EQ(std::strtof(written(number).c_str(), nullptr), number);
  }
}

TEST(JsonWriterTest, WritesWhatAParserReadsBack) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 5'000; ++round) {
    std::string bytes;
    for (size_t size = random() % 20; size > 0; --size) {
      // Mostly bytes that matter to UTF-8 and to JSON.
      constexpr uint8_t kEdges[] = {0,    0x1f, '"',  '\\', 0x7f, 0x80, 0x8f, 0x90, 0x9f,
                                    0xa0, 0xbf, 0xc2, 0xe0, 0xed, 0xef, 0xf0, 0xf4, 0xff};
      bytes += static_cast<char>(random() % 3 == 0 ? random() : kEdges[random() % sizeof(kEdges)]);
    }
    JsonWriter once;
    once.BeginArray().String(bytes).EndArray();
    const absl::StatusOr<JsonDocument> read = JsonDocument::Parse(once.text(), 4);
    ASSERT_TRUE(read.ok()) << once.text();
    JsonWriter twice;
    const std::string_view text = simdjson::dom::array(read->root()).at(0);
    twice.BeginArray().String(text).EndArray();
    EXPECT_EQ(once.text(), twice.text());
  }
}

}  // namespace
}  // namespace fathom
