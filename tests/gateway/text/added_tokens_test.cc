#include "gateway/text/added_tokens.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;

// Pieces as "text" and tokens as "#id".
std::vector<std::string> Split(const AddedTokens& tokens, std::string_view text) {
  std::vector<std::string> pieces;
  tokens.Split(
      text, [&](std::string_view piece) { pieces.emplace_back(piece); },
      [&](uint32_t id) { pieces.push_back("#" + std::to_string(id)); });
  return pieces;
}

TEST(AddedTokensTest, TheLongestAtTheLeftmostPlaceWins) {
  const AddedTokens tokens(
      {{.id = 1, .content = "<a"}, {.id = 2, .content = "<a>"}, {.id = 3, .content = "a>b"}});
  EXPECT_THAT(Split(tokens, "x<a>b<a<"), ElementsAre("x", "#2", "b", "#1", "<"));
  EXPECT_THAT(Split(tokens, "a>b"), ElementsAre("#3"));
  EXPECT_THAT(Split(tokens, ""), ElementsAre());
}

TEST(AddedTokensTest, NormalizedTokensComeSecond) {
  const AddedTokens tokens(
      {{.id = 1, .content = "abc", .normalized = true}, {.id = 2, .content = "bc"}});
  EXPECT_THAT(Split(tokens, "abcabc"), ElementsAre("a", "#2", "a", "#2"));
}

TEST(AddedTokensTest, StripTakesWhiteSpaceOfAnyKind) {
  const AddedTokens tokens(
      {{.id = 1, .content = "<l>", .lstrip = true}, {.id = 2, .content = "<r>", .rstrip = true}});
  EXPECT_THAT(Split(tokens, "x \u3000\n<l> y"), ElementsAre("x", "#1", " y"));
  EXPECT_THAT(Split(tokens, "x <r> \u3000\ny"), ElementsAre("x ", "#2", "y"));
  EXPECT_THAT(Split(tokens, "<r>  <l>  <l>"), ElementsAre("#2", "#1", "#1"));
}

}  // namespace
}  // namespace fathom
