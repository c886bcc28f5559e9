#include "worker/grammar_masks.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/grammar_fault.h"

namespace fathom {
namespace {

using testing::AllOf;
using testing::AnyOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using testing::SizeIs;

// Of tests/golden/tokenizer_tiny.
constexpr int kVocabSize = 512;
constexpr int kEos = 1;
constexpr int kEndOfThinking = 510;
int TokenOf(char c) { return c - '!' + 3; }

class GrammarMasksTest : public testing::Test {
 protected:
  static SamplingParams ParamsOf(const char* regex) {
    SamplingParams params;
    params.grammar = {.kind = Grammar::Kind::kRegex, .text = regex};
    return params;
  }

  // Of the token to be chosen; {-1}: any.
  std::vector<int> Allowed(int slot) {
    const absl::StatusOr<absl::Span<const uint32_t>> mask = masks_.MaskOf(slot);
    EXPECT_TRUE(mask.ok()) << mask.status();
    if (!mask.ok() || mask->empty()) return {-1};
    std::vector<int> allowed;
    for (int id = 0; id < kVocabSize; ++id) {
      if (((*mask)[id / 32] >> (id % 32) & 1) != 0) allowed.push_back(id);
    }
    return allowed;
  }

  GrammarKeeper keeper_{{.program = FATHOM_GRAMMAR_PROGRAM,
                         .model_directory = "tests/golden/tokenizer_tiny",
                         .vocab_size = kVocabSize,
                         .eos_token_ids = {kEos},
                         .compile_time = absl::Seconds(30),
                         .mask_timeout = absl::Seconds(60)}};
  GrammarMasks masks_{&keeper_, kVocabSize, 4};
};

TEST_F(GrammarMasksTest, FollowsTheTokensOfEachSlot) {
  const SamplingParams ab = ParamsOf("ab"), cd = ParamsOf("cd");
  masks_.Admit(0, ab, {});
  masks_.Admit(1, SamplingParams(), {});
  masks_.Admit(2, cd, {});
  masks_.OnToken(2, TokenOf('c'));
  EXPECT_THAT(Allowed(0), ElementsAre(TokenOf('a')));
  EXPECT_THAT(Allowed(1), ElementsAre(-1));
  EXPECT_THAT(Allowed(2), ElementsAre(TokenOf('d')));
  EXPECT_THAT(Allowed(3), ElementsAre(-1));
  masks_.OnToken(1, TokenOf('z'));
  masks_.Release(0);
  masks_.Admit(0, cd, {});
  EXPECT_THAT(Allowed(0), ElementsAre(TokenOf('c')));
}

TEST_F(GrammarMasksTest, ASequenceThatComesBackGoesOnWhereItWas) {
  const SamplingParams params = ParamsOf("abc");
  const std::vector<int32_t> output = {TokenOf('a'), TokenOf('b')};
  masks_.Admit(0, params, output);
  EXPECT_THAT(Allowed(0), ElementsAre(TokenOf('c')));
}

TEST_F(GrammarMasksTest, BeginsAfterTheThinking) {
  SamplingParams params = ParamsOf("ab");
  params.grammar_begins_after = kEndOfThinking;
  params.stop_token_ids = {kEos, TokenOf('s'), kEndOfThinking};
  const auto anything_but_the_end =
      AllOf(SizeIs(kVocabSize - 2), Not(Contains(AnyOf(kEos, TokenOf('s')))));
  masks_.Admit(0, params, {});
  EXPECT_THAT(Allowed(0), anything_but_the_end);
  masks_.OnToken(0, TokenOf('z'));
  EXPECT_THAT(Allowed(0), anything_but_the_end);
  masks_.OnToken(0, kEndOfThinking);
  EXPECT_THAT(Allowed(0), ElementsAre(TokenOf('a')));

  masks_.Admit(1, params, std::vector<int32_t>{TokenOf('z')});
  EXPECT_THAT(Allowed(1), anything_but_the_end);
  masks_.Admit(2, params, std::vector<int32_t>{TokenOf('z'), kEndOfThinking, TokenOf('a')});
  EXPECT_THAT(Allowed(2), ElementsAre(TokenOf('b')));
  masks_.Admit(3, params, std::vector<int32_t>{kEndOfThinking});
  EXPECT_THAT(Allowed(3), ElementsAre(TokenOf('a')));
}

TEST_F(GrammarMasksTest, WhatGoesWrongIsTheSequencesFault) {
  const SamplingParams wrong = ParamsOf("a(");
  const SamplingParams right = ParamsOf("ab");
  masks_.Admit(0, wrong, {});
  masks_.Admit(1, right, {});
  masks_.Admit(2, right, std::vector<int32_t>{TokenOf('z')});
  EXPECT_TRUE(absl::IsInvalidArgument(masks_.MaskOf(0).status()));
  EXPECT_TRUE(IsOfGrammar(masks_.MaskOf(0).status()));
  EXPECT_THAT(std::string(masks_.MaskOf(2).status().message()),
              HasSubstr("structured output: the grammar does not allow token"));
  EXPECT_THAT(Allowed(1), ElementsAre(TokenOf('a')));

  GrammarMasks without(nullptr, kVocabSize, 4);
  without.Admit(0, right, {});
  EXPECT_TRUE(absl::IsInternal(without.MaskOf(0).status()));
  EXPECT_FALSE(IsOfGrammar(without.MaskOf(0).status()));
}

}  // namespace
}  // namespace fathom
