#include "gateway/text/stop_matcher.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace fathom {
namespace {

// What the text becomes, by definition: it ends where a stop string first ends.
struct Ending {
  std::string text;
  std::string stop_string;  // "": none
};

Ending EndByDefinition(const std::string& text, const std::vector<std::string>& stop_strings,
                       StopString stop_string) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string longest;
    for (const std::string& stop : stop_strings) {
      const bool ends_here =
          end >= stop.size() && text.compare(end - stop.size(), stop.size(), stop) == 0;
      if (ends_here && stop.size() > longest.size()) longest = stop;
    }
    if (longest.empty()) continue;
    const size_t kept = stop_string == StopString::kInclude ? end : end - longest.size();
    return {text.substr(0, kept), longest};
  }
  return {text, ""};
}

Ending EndWhole(std::vector<std::string> stop_strings, StopString stop_string,
                const std::vector<std::string>& pieces) {
  StopMatcher matcher(std::move(stop_strings), stop_string);
  Ending ending;
  for (const std::string& piece : pieces) ending.text += matcher.Push(piece);
  ending.text += matcher.Finish();
  if (matcher.stopped().has_value()) {
    ending.stop_string = matcher.stop_strings()[*matcher.stopped()];
  }
  return ending;
}

TEST(StopMatcherTest, CutsTheTextAtTheStopString) {
  StopMatcher matcher({"\n\n"}, StopString::kLeaveOut);
  EXPECT_EQ(matcher.Push("one\ntwo\n"), "one\ntwo");
  EXPECT_EQ(matcher.stopped(), std::nullopt);
  EXPECT_EQ(matcher.Push("\nthree"), "");
  EXPECT_EQ(matcher.stopped(), 0u);
  EXPECT_EQ(matcher.Push("more"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, IncludesTheStopStringWhenAsked) {
  StopMatcher matcher({"END"}, StopString::kInclude);
  EXPECT_EQ(matcher.Push("the E"), "the ");
  EXPECT_EQ(matcher.Push("ND of"), "END");
  EXPECT_EQ(matcher.stopped(), 0u);
}

TEST(StopMatcherTest, HoldsBackOnlyWhatMayBecomeAStopString) {
  StopMatcher matcher({"abcd", "cx"}, StopString::kLeaveOut);
  EXPECT_EQ(matcher.Push("zab"), "z");
  EXPECT_EQ(matcher.Push("c"), "");     // "abc" may become "abcd"
  EXPECT_EQ(matcher.Push("c"), "abc");  // now only the last "c" may become "cx"
  EXPECT_EQ(matcher.Push("y"), "cy");
  EXPECT_EQ(matcher.Push("ab"), "");
  EXPECT_EQ(matcher.Finish(), "ab");
}

TEST(StopMatcherTest, TheStopStringThatEndsFirstWins) {
  const std::vector<std::string> stops = {"abcd", "bc", "abc"};
  StopMatcher matcher(stops, StopString::kLeaveOut);
  EXPECT_EQ(matcher.Push("xabcd"), "x");
  EXPECT_EQ(matcher.stopped(), 2u);  // "abc" and "bc" end together: the longer one
}

TEST(StopMatcherTest, WithoutStopStringsTextPassesThrough) {
  StopMatcher matcher({}, StopString::kLeaveOut);
  EXPECT_EQ(matcher.Push("anything"), "anything");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, NeverCutsACharacter) {
  // "é" is C3 A9 and "ê" is C3 AA: the shared byte alone is never shown or held.
  StopMatcher matcher({"éa"}, StopString::kLeaveOut);
  EXPECT_EQ(matcher.Push("ê"), "ê");
  EXPECT_EQ(matcher.Push("xé"), "x");
  EXPECT_EQ(matcher.Push("b"), "éb");
}

TEST(StopMatcherTest, DoesNotDependOnHowTheTextIsCut) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto random_string = [&](size_t min, size_t max) {
    std::string string;
    for (size_t length = min + random() % (max - min + 1); length > 0; --length) {
      string.push_back("aab"[random() % 3]);
    }
    return string;
  };
  for (int trial = 0; trial < 20000; ++trial) {
    std::vector<std::string> stops;
    for (int count = static_cast<int>(random() % 4); count > 0; --count) {
      stops.push_back(random_string(1, 6));
    }
    std::vector<std::string> pieces;
    std::string text;
    for (int count = static_cast<int>(random() % 10); count > 0; --count) {
      pieces.push_back(random_string(0, 4));
      text += pieces.back();
    }
    const StopString mode = random() % 2 == 0 ? StopString::kLeaveOut : StopString::kInclude;
    const Ending expected = EndByDefinition(text, stops, mode);
    const Ending ending = EndWhole(stops, mode, pieces);
    ASSERT_EQ(ending.text, expected.text) << text;
    ASSERT_EQ(ending.stop_string, expected.stop_string) << text;
  }
}

// Comparing every end of the text with every stop string would take 10^11 steps.
TEST(StopMatcherTest, IsLinearInTheTextEvenForLongStopStrings) {
  constexpr size_t kLength = 300000;
  std::vector<std::string> stops;
  for (const char* end : {"b", "c"}) stops.push_back(std::string(kLength, 'a') + end);
  StopMatcher matcher(stops, StopString::kLeaveOut);
  size_t num_shown = 0;
  for (size_t i = 0; i < 2 * kLength; ++i) num_shown += matcher.Push("a").size();
  EXPECT_EQ(num_shown, kLength);
  num_shown += matcher.Push("b").size();
  EXPECT_EQ(matcher.stopped(), 0u);
  EXPECT_EQ(num_shown, kLength);
}

}  // namespace
}  // namespace fathom
