#include "gateway/openai/choice.h"

#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace fathom {
namespace {

constexpr uint32_t kEos = 1;

class ChoiceTest : public ::testing::Test {
 protected:
  ChoiceTest() : tokenizer_(*Tokenizer::Load("tests/golden/tokenizer_tiny")) {}

  std::vector<uint32_t> Ids(std::string_view text) const {
    return tokenizer_->Encode(text, BosPolicy::kNone);
  }

  static v1::GenerateResponse Response(absl::Span<const uint32_t> ids,
                                       v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED) {
    v1::GenerateResponse response;
    for (const uint32_t id : ids) {
      response.add_token_ids(id);
      response.add_logprobs()->set_token_id(id);
    }
    response.set_finish_reason(reason);
    return response;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(ChoiceTest, LeavesTheEndOfSequenceOutOfTheTextButNotOutOfTheTokens) {
  std::vector<uint32_t> ids = Ids("hello");
  ids.push_back(kEos);
  ChoiceOptions options;
  options.detokenizer.skip_special_tokens = false;
  Choice choice(tokenizer_.get(), options);
  const ChoiceDelta delta = choice.Take(Response(ids, v1::FINISH_REASON_STOP));
  EXPECT_EQ(delta.text, "hello");
  EXPECT_EQ(delta.token_ids, ids);
  EXPECT_EQ(delta.finish_reason, "stop");
  EXPECT_TRUE(std::holds_alternative<std::monostate>(delta.stop_reason));
}

TEST_F(ChoiceTest, DropsTheTokensAfterAStopString) {
  const std::vector<uint32_t> ids = Ids("one two three");
  Choice choice(tokenizer_.get(), {.stop = {"two"}});
  const ChoiceDelta delta = choice.Take(Response(ids));
  EXPECT_TRUE(choice.finished());
  EXPECT_EQ(delta.text, "one ");
  EXPECT_EQ(delta.token_ids.size(), delta.logprobs.size());
  EXPECT_LT(delta.token_ids.size(), ids.size());
  EXPECT_EQ(std::get<std::string>(delta.stop_reason), "two");
  EXPECT_TRUE(choice.Take(Response(ids)).token_ids.empty());
}

TEST_F(ChoiceTest, SeesNoStopStringBeforeMinTokens) {
  const std::vector<uint32_t> ids = Ids("abababab");
  ASSERT_GT(ids.size(), 3u);
  Choice choice(tokenizer_.get(), {.stop = {"a"}, .min_tokens = 2});
  const ChoiceDelta delta = choice.Take(Response(ids));
  EXPECT_EQ(delta.finish_reason, "stop");
  EXPECT_GE(choice.num_tokens(), 3u);
  EXPECT_EQ(delta.text.substr(0, 2), "ab");
}

TEST_F(ChoiceTest, EmitsWhatWasHeldBackWhenTheLengthIsReached) {
  const std::vector<uint32_t> ids = Ids("x STO");
  Choice choice(tokenizer_.get(), {.stop = {"STOP"}});
  ChoiceDelta delta = choice.Take(Response(ids));
  EXPECT_EQ(delta.text, "x ");
  delta.Append(choice.Take(Response({}, v1::FINISH_REASON_LENGTH)));
  EXPECT_EQ(delta.text, "x STO");
  EXPECT_EQ(delta.finish_reason, "length");
}

TEST_F(ChoiceTest, GivesTheSameHoweverTheStreamIsCut) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 500; ++round) {
    std::vector<uint32_t> ids(1 + random() % 40);
    for (uint32_t& id : ids) id = random() % 512;
    ChoiceOptions options;
    options.detokenizer.skip_special_tokens = random() % 2 == 0;
    options.min_tokens = random() % 4;
    const Tokenizer& tokenizer = *tokenizer_;
    const std::string_view stop = tokenizer.BytesOf(ids[random() % ids.size()]);
    const std::string text = Decode(tokenizer, ids, {.skip_special_tokens = false});
    if (!stop.empty() && text.find(stop) != std::string::npos) options.stop = {std::string(stop)};
    if (random() % 2 == 0) options.stop_string = StopString::kInclude;
    const v1::FinishReason reason =
        random() % 2 == 0 ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH;

    Choice at_once(tokenizer_.get(), options);
    const ChoiceDelta expected = at_once.Take(Response(ids, reason));
    Choice cut(tokenizer_.get(), options);
    ChoiceDelta joined;
    for (size_t i = 0; i < ids.size() && !cut.finished();) {
      const size_t count = std::min<size_t>(1 + random() % 5, ids.size() - i);
      const bool last = i + count == ids.size();
      joined.Append(cut.Take(Response(absl::MakeSpan(ids).subspan(i, count),
                                      last ? reason : v1::FINISH_REASON_UNSPECIFIED)));
      i += count;
    }
    EXPECT_EQ(joined.text, expected.text);
    EXPECT_EQ(joined.token_ids, expected.token_ids);
    EXPECT_EQ(joined.logprobs.size(), expected.logprobs.size());
    EXPECT_EQ(joined.finish_reason, expected.finish_reason);
    EXPECT_EQ(joined.stop_reason, expected.stop_reason);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace fathom
