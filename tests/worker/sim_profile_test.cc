#include "worker/sim_profile.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/safetensors.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

SimProfile Shipped(const std::string& name) {
  const auto json = ReadTextFile("bench/profiles/" + name, 1 << 20);
  EXPECT_TRUE(json.ok()) << json.status();
  const auto profile = ParseSimProfile(*json);
  EXPECT_TRUE(profile.ok()) << profile.status();
  return *profile;
}

// `sequences` of them, each with one token to compute, the last of `context`.
SimStep Decoding(double sequences, double context) {
  return {.tokens = sequences,
          .sequences = sequences,
          .context_tokens = sequences * context,
          .attention_pairs = sequences * context};
}

SimStep Prefill(double tokens) {
  return {.tokens = tokens,
          .sequences = 1,
          .context_tokens = tokens,
          .attention_pairs = tokens * (tokens + 1) / 2};
}

std::string Refusal(const std::string& json) {
  const auto profile = ParseSimProfile(json);
  EXPECT_FALSE(profile.ok()) << json;
  const std::string message(profile.status().message());
  EXPECT_THAT(message, Not(HasSubstr("\n")));
  return message;
}

constexpr char kConstant[] =
    R"("kv_cache_tokens": 1000, "fixed_us": 500, "us_per_token": 2, "us_per_sequence": 30,
       "us_per_context_token": 0.25)";

std::string With(const std::string& more) {
  return "{" + std::string(kConstant) + (more.empty() ? "" : ", ") + more + "}";
}

TEST(SimProfileTest, ALinearProfileAddsUp) {
  const auto profile = ParseSimProfile(With(""));
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->kv_cache_tokens, 1000);
  EXPECT_DOUBLE_EQ(StepMicroseconds(*profile, Decoding(4, 100)), 500 + 4 * 2 + 4 * 30 + 400 * 0.25);
}

// The figures were computed apart from the profile, by a roofline with all-reduces as they were
// published for each size; the profile has one line for all sizes, which is 1.5 % off at most.
TEST(SimProfileTest, TheH200ProfileIsTheRooflineOfTheReference) {
  const SimProfile profile = Shipped("h200.json");
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(1, 2304)), 2340, 0.015 * 2340);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(8, 2304)), 6400, 0.015 * 6400);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(64, 2304)), 21400, 0.015 * 21400);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(256, 2304)), 32600, 0.015 * 32600);
  EXPECT_NEAR(StepMicroseconds(profile, Prefill(2048)), 42000, 0.03 * 42000);
  EXPECT_NEAR(profile.kv_cache_tokens, 677000, 1000);
}

// The reference takes the H200's all-reduces for decoding on the B200, and faster ones for prefill.
TEST(SimProfileTest, TheB200ProfileIsTheRooflineOfTheReference) {
  const SimProfile profile = Shipped("b200.json");
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(1, 2304)), 1710, 0.045 * 1710);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(8, 2304)), 3950, 0.045 * 3950);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(64, 2304)), 12300, 0.045 * 12300);
  EXPECT_NEAR(StepMicroseconds(profile, Decoding(256, 2304)), 19000, 0.045 * 19000);
  EXPECT_NEAR(StepMicroseconds(profile, Prefill(2048)), 25000, 0.03 * 25000);
}

TEST(SimProfileTest, AConstantProfileTakesTheSameTimeForEverything) {
  for (const int milliseconds : {2, 5, 20}) {
    const SimProfile profile = Shipped("constant-" + std::to_string(milliseconds) + "ms.json");
    EXPECT_EQ(StepMicroseconds(profile, Decoding(1, 1)), 1000 * milliseconds);
    EXPECT_EQ(StepMicroseconds(profile, Prefill(8192)), 1000 * milliseconds);
  }
}

TEST(SimProfileTest, WhatIsWrongIsNamed) {
  EXPECT_EQ(Refusal("{"), "it is not valid JSON");
  EXPECT_EQ(Refusal("[1]"), "it is [1], expected an object");
  EXPECT_EQ(Refusal(R"({"kv_cache_tokens": 10})"),
            "fixed_us is missing, expected a number from 0 to 1e+18");
  EXPECT_EQ(Refusal(R"({"kv_cache_tokens": 0})"),
            "kv_cache_tokens is 0, expected a number from 1 to 1.07374e+09");
  EXPECT_THAT(Refusal(R"({"kv_cache_tokens": 10, "fixed_us": -1})"), HasSubstr("fixed_us is -1"));
  EXPECT_THAT(Refusal(R"({"kv_cache_tokens": "10"})"), HasSubstr(R"(kv_cache_tokens is "10")"));
  EXPECT_EQ(Refusal(With(R"("fixed_ms": 3)")), "fixed_ms is no key of a profile");
  EXPECT_EQ(Refusal(With(R"("fixed_us": 3)")), "fixed_us occurs twice");
  EXPECT_EQ(Refusal(With(R"("roofline": 7)")), "roofline is 7, expected an object");
  EXPECT_EQ(Refusal(With(R"("roofline": {"memory_bytes_per_second": 0})")),
            "roofline.memory_bytes_per_second is 0, expected a number from 1 to 1e+18");
}

}  // namespace
}  // namespace fathom
