#include "gateway/text/pre_tokenizer.h"

#include <random>
#include <string>
#include <vector>

#include "gateway/text/unicode.h"
#include "gateway/text/utf8.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;

std::vector<std::string> Words(std::string_view text) {
  std::vector<std::string> words;
  PreTokenizeDeepSeekV3(text, [&](std::string_view word) { words.emplace_back(word); });
  return words;
}

TEST(PreTokenizerTest, AWordTakesTheSpaceOrSignBeforeIt) {
  EXPECT_THAT(Words("Hello, world!"), ElementsAre("Hello", ",", " world", "!"));
  EXPECT_THAT(Words("don't .Net ..Net"), ElementsAre("don", "'t", " .", "Net", " ..", "Net"));
  EXPECT_THAT(Words("a_b\tc\u00a0d"), ElementsAre("a", "_b", "\tc", "\u00a0d"));
  EXPECT_THAT(Words("'é ’s"), ElementsAre("'", "é", " ’", "s"));
}

TEST(PreTokenizerTest, DigitsComeInThrees) {
  EXPECT_THAT(Words("1234567"), ElementsAre("123", "456", "7"));
  EXPECT_THAT(Words("x1 2½Ⅷ٣"), ElementsAre("x", "1", " ", "2½Ⅷ", "٣"));
}

TEST(PreTokenizerTest, IdeographsStandApart) {
  EXPECT_THAT(Words("abc中文def"), ElementsAre("abc", "中文", "def"));
  EXPECT_THAT(Words(" 中文。カー・ド"), ElementsAre(" ", "中文", "。", "カー", "・", "ド"));
}

TEST(PreTokenizerTest, TheLastSpaceGoesWithTheNextWord) {
  EXPECT_THAT(Words("a   b"), ElementsAre("a", "  ", " b"));
  EXPECT_THAT(Words("a   1"), ElementsAre("a", "   ", "1"));  // a piece of its own ends there
  EXPECT_THAT(Words("a   "), ElementsAre("a", "   "));
  EXPECT_THAT(Words("a \t!"), ElementsAre("a", " ", "\t", "!"));
}

TEST(PreTokenizerTest, NewlinesEndWhiteSpaceAndSigns) {
  EXPECT_THAT(Words("a \n \r\n  b"), ElementsAre("a", " \n \r\n", " ", " b"));
  EXPECT_THAT(Words("};\n\n x"), ElementsAre("};\n\n", " x"));
}

TEST(PreTokenizerTest, WhatNothingMatchesStaysTogether) {
  EXPECT_THAT(Words(std::string("\0\1\2", 3)), ElementsAre(std::string("\0\1\2", 3)));
  EXPECT_THAT(Words("\1\2a"), ElementsAre("\1", "\2a"));
  EXPECT_THAT(Words("\u0301\u0301"), ElementsAre("\u0301\u0301"));
}

TEST(PreTokenizerTest, WordsJoinedAreTheText) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const std::vector<std::string> units = {"a",  "Z",  " ", "  ", "\n", "\r", "\t",     "1", "½",
                                          "中", "ー", "!", "$",  "é",  "😀",  "\u0301", "\1"};
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (int length = static_cast<int>(random() % 30); length > 0; --length) {
      text += units[random() % units.size()];
    }
    std::string joined;
    for (const std::string& word : Words(text)) {
      EXPECT_FALSE(word.empty());
      joined += word;
    }
    EXPECT_EQ(joined, text);
  }
}

TEST(UnicodeTest, KnowsTheClassesOfUnicode16) {
  EXPECT_EQ(ClassOf('a'), CharacterClass::kLetter);
  EXPECT_EQ(ClassOf(U'Ↄ'), CharacterClass::kLetter);
  EXPECT_EQ(ClassOf(U'Ⅷ'), CharacterClass::kNumber);
  EXPECT_EQ(ClassOf(0x0301), CharacterClass::kMark);
  EXPECT_EQ(ClassOf('_'), CharacterClass::kPunctuation);
  EXPECT_EQ(ClassOf('+'), CharacterClass::kSymbol);
  EXPECT_EQ(ClassOf(0x85), CharacterClass::kSpace);
  EXPECT_EQ(ClassOf(0x180E), CharacterClass::kOther);   // a format character, no longer a space
  EXPECT_EQ(ClassOf(0x1C89), CharacterClass::kLetter);  // new in 16.0
  EXPECT_EQ(ClassOf(0x88F), CharacterClass::kOther);    // new in 17.0
  EXPECT_EQ(ClassOf(0x10FFFF), CharacterClass::kOther);
}

TEST(Utf8Test, ReplacesEachMaximalPart) {
  // Unicode 15 §3.9, tables 3-8 to 3-11.
  EXPECT_EQ(ReplaceInvalidUtf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41");
  EXPECT_EQ(ReplaceInvalidUtf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41");
  EXPECT_EQ(ReplaceInvalidUtf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41\uFFFD\uFFFD\x42");
  EXPECT_EQ(ReplaceInvalidUtf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\x41");
}

}  // namespace
}  // namespace fathom
