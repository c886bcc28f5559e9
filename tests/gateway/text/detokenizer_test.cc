#include "gateway/text/detokenizer.h"

#include <random>
#include <string>
#include <vector>

#include "gateway/text/utf8.h"
#include "gtest/gtest.h"
#include "simdjson.h"
#include "tests/gateway/text/golden.h"

namespace fathom {
namespace {

class DetokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    seed_ = std::random_device()();
    random_.seed(seed_);
  }

  // Decodes in random pieces, each of which must be whole characters.
  std::string Stream(const Tokenizer& tokenizer, const std::vector<uint32_t>& ids,
                     DetokenizerOptions options) {
    StreamingDetokenizer detokenizer(tokenizer, options);
    std::string text;
    for (size_t begin = 0; begin < ids.size();) {
      const size_t count = std::min<size_t>(random_() % 4, ids.size() - begin);
      const std::string piece = detokenizer.Push(absl::MakeConstSpan(ids).subspan(begin, count));
      EXPECT_TRUE(simdjson::validate_utf8(piece)) << "seed " << seed_;
      text += piece;
      begin += count;
    }
    return text + detokenizer.Finish();
  }

  unsigned seed_;
  std::mt19937 random_;
};

TEST_F(DetokenizerTest, StreamsGoldenTextHoweverItIsCut) {
  for (const TextVector& vector : ReadTextVectors(kGoldenTiny)) {
    EXPECT_EQ(Stream(TinyTokenizer(), vector.ids, {.skip_special_tokens = false}), vector.text);
    EXPECT_EQ(Stream(TinyTokenizer(), vector.ids, {}),
              vector.decoded_skip_special.value_or(vector.text));
  }
}

TEST_F(DetokenizerTest, StreamsRandomTokensAsItDecodesThem) {
  // Random ids are mostly broken characters; the definition is to join the bytes and repair them.
  const Tokenizer& tokenizer = TinyTokenizer();
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<uint32_t> ids(random_() % 30);
    std::string bytes;
    for (uint32_t& id : ids) {
      id = random_() % (tokenizer.vocab_size() + 5);
      bytes += tokenizer.BytesOf(id);
    }
    const DetokenizerOptions options = {.skip_special_tokens = false};
    const std::string expected = ReplaceInvalidUtf8(bytes);
    ASSERT_EQ(Decode(tokenizer, ids, options), expected) << "seed " << seed_;
    ASSERT_EQ(Stream(tokenizer, ids, options), expected) << "seed " << seed_;
  }
}

TEST_F(DetokenizerTest, HoldsACharacterBackUntilItIsWhole) {
  const Tokenizer& tokenizer = TinyTokenizer();
  const std::vector<uint32_t> ids = tokenizer.Encode("😀", BosPolicy::kNone);
  ASSERT_GT(ids.size(), 1u);
  StreamingDetokenizer detokenizer(tokenizer, {});
  for (size_t i = 0; i + 1 < ids.size(); ++i) EXPECT_EQ(detokenizer.Push({ids[i]}), "");
  EXPECT_EQ(detokenizer.Push({ids.back()}), "😀");
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST_F(DetokenizerTest, AnUnfinishedCharacterEndsAsOneReplacement) {
  const Tokenizer& tokenizer = TinyTokenizer();
  std::vector<uint32_t> ids = tokenizer.Encode("a😀", BosPolicy::kNone);
  ids.pop_back();
  StreamingDetokenizer detokenizer(tokenizer, {});
  EXPECT_EQ(detokenizer.Push(ids), "a");
  EXPECT_EQ(detokenizer.Finish(), "\uFFFD");
  EXPECT_EQ(detokenizer.Finish(), "");
}

TEST_F(DetokenizerTest, SpecialTokensDoNotInterruptACharacterWhenSkipped) {
  const Tokenizer& tokenizer = TinyTokenizer();
  std::vector<uint32_t> ids = tokenizer.Encode("😀", BosPolicy::kNone);
  ids.insert(ids.begin() + 1, *tokenizer.eos());
  EXPECT_EQ(Decode(tokenizer, ids, {}), "😀");
  const std::string eos(tokenizer.BytesOf(*tokenizer.eos()));
  const std::string kept = Decode(tokenizer, ids, {.skip_special_tokens = false});
  EXPECT_EQ(kept.substr(0, 3 + eos.size()), "\uFFFD" + eos);
}

TEST_F(DetokenizerTest, DecodesBytesInPiecesAsAtOnce) {
  const std::string alphabet = "a\x80\xBF\xC2\xE0\xA0\xED\xE4\xF0\x90\xF4\x8F\xFF";
  for (int trial = 0; trial < 20000; ++trial) {
    std::string bytes;
    for (int length = static_cast<int>(random_() % 12); length > 0; --length) {
      bytes.push_back(alphabet[random_() % alphabet.size()]);
    }
    Utf8Decoder decoder;
    std::string text;
    for (size_t begin = 0; begin < bytes.size();) {
      const size_t count = 1 + random_() % 3;
      decoder.Push(std::string_view(bytes).substr(begin, count), text);
      ASSERT_TRUE(simdjson::validate_utf8(text)) << "seed " << seed_;
      begin += count;
    }
    decoder.Finish(text);
    ASSERT_EQ(text, ReplaceInvalidUtf8(bytes)) << "seed " << seed_;
  }
}

}  // namespace
}  // namespace fathom
