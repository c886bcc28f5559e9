#include "gateway/text/tokenizer.h"

#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "gateway/text/detokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/gateway/text/golden.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string DecodeAll(const Tokenizer& tokenizer, const std::vector<uint32_t>& ids) {
  return Decode(tokenizer, ids, {.skip_special_tokens = false});
}

void ExpectGoldenIds(const Tokenizer& tokenizer, const char* model_dir, size_t num_vectors) {
  const std::vector<TextVector> vectors = ReadTextVectors(model_dir);
  ASSERT_EQ(vectors.size(), num_vectors);
  for (const TextVector& vector : vectors) {
    EXPECT_EQ(tokenizer.Encode(vector.text, BosPolicy::kNone), vector.ids) << vector.text;
    EXPECT_EQ(DecodeAll(tokenizer, vector.ids), vector.text);
    EXPECT_EQ(Decode(tokenizer, vector.ids, {}), vector.decoded_skip_special.value_or(vector.text));
  }
}

TEST(TokenizerTest, GivesHuggingFacesIdsForDeepSeekV3) {
  ExpectGoldenIds(V3Tokenizer(), kGoldenV3, 1681);
}

TEST(TokenizerTest, GivesHuggingFacesIdsForTheTinyModel) {
  ExpectGoldenIds(TinyTokenizer(), kGoldenTiny, 381);
}

TEST(TokenizerTest, AddsBosOnlyWhereItIsConfiguredAndWanted) {
  const Tokenizer& tokenizer = V3Tokenizer();
  EXPECT_THAT(tokenizer.Encode("Hello", BosPolicy::kNone), ElementsAre(19923));
  EXPECT_THAT(tokenizer.Encode("Hello", BosPolicy::kAsConfigured), ElementsAre(0, 19923));
  EXPECT_THAT(tokenizer.Encode("", BosPolicy::kAsConfigured), ElementsAre(0));
  EXPECT_THAT(tokenizer.Encode("", BosPolicy::kNone), IsEmpty());
}

TEST(TokenizerTest, KnowsItsSpecialTokens) {
  const Tokenizer& tokenizer = V3Tokenizer();
  EXPECT_EQ(tokenizer.vocab_size(), 128815u);
  EXPECT_EQ(tokenizer.bos(), 0u);
  EXPECT_EQ(tokenizer.eos(), 1u);
  EXPECT_TRUE(tokenizer.IsSpecial(0));
  EXPECT_FALSE(tokenizer.IsSpecial(128803));
  EXPECT_FALSE(tokenizer.IsSpecial(129279));  // the model pads its vocabulary
  EXPECT_EQ(tokenizer.BytesOf(129279), "");
  EXPECT_EQ(tokenizer.BytesOf(128803), "<｜User｜>");
  EXPECT_EQ(tokenizer.FindAddedToken("<｜User｜>"), 128803u);
  EXPECT_EQ(tokenizer.FindAddedToken("<｜User"), std::nullopt);
  EXPECT_EQ(tokenizer.FindAddedToken("Hello"), std::nullopt);
}

TEST(TokenizerTest, ReadsBytesThatAreNotUtf8AsReplacementCharacters) {
  const Tokenizer& tokenizer = V3Tokenizer();
  EXPECT_EQ(tokenizer.Encode("a\xFF\xE4\xBDz", BosPolicy::kNone),
            tokenizer.Encode("a\uFFFD\uFFFDz", BosPolicy::kNone));
}

TEST(TokenizerTest, EveryTokenDecodesToTheBytesItSays) {
  const Tokenizer& tokenizer = TinyTokenizer();
  for (uint32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string bytes(tokenizer.BytesOf(id));
    EXPECT_FALSE(bytes.empty()) << id;
    std::string text;
    Utf8Decoder decoder;
    decoder.Push(bytes, text);
    decoder.Finish(text);
    EXPECT_EQ(DecodeAll(tokenizer, {id}), text) << id;
  }
}

// A quadratic step anywhere takes hours on a megabyte; ctest's limit is two minutes.
TEST(TokenizerTest, TakesAMegabyteOfAnythingInItsStride) {
  const Tokenizer& tokenizer = V3Tokenizer();
  constexpr size_t kBytes = 1 << 20;
  const std::vector<std::string> units = {
      " ",   "\n", "\t \n", "7",  "a", "aB",  "\u0301",     "中", "かな",
      "中1", "!",  "! ",    ".a", "<", "<｜", "<｜User｜>", "😀",  std::string(1, '\0')};
  for (const std::string& unit : units) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    EXPECT_EQ(DecodeAll(tokenizer, tokenizer.Encode(text, BosPolicy::kNone)), text) << unit;
  }
  EXPECT_FALSE(tokenizer.Encode(std::string(kBytes, '\xFF'), BosPolicy::kNone).empty());
}

TEST(TokenizerTest, ThreadsShareOneTokenizer) {
  const Tokenizer& tokenizer = TinyTokenizer();
  const std::vector<TextVector> vectors = ReadTextVectors(kGoldenTiny);
  std::vector<int> num_wrong(4);
  std::vector<std::thread> threads;
  for (int& wrong : num_wrong) {
    threads.emplace_back([&] {
      for (const TextVector& vector : vectors) {
        wrong += tokenizer.Encode(vector.text, BosPolicy::kNone) != vector.ids;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(num_wrong, ElementsAre(0, 0, 0, 0));
}

TEST(TokenizerTest, SaysThatAFolderHasNoTokenizer) {
  const auto tokenizer = Tokenizer::Load("tests/golden");
  EXPECT_TRUE(absl::IsNotFound(tokenizer.status())) << tokenizer.status();
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr("tests/golden/tokenizer.json"));
}

TEST(TokenizerTest, NamesTheFolderOfAFileItRefuses) {
  const std::filesystem::path folder =
      std::filesystem::path(testing::TempDir()) / "fathom_tokenizer_test_XXXXXX";
  std::string name = folder.string();
  ASSERT_NE(mkdtemp(name.data()), nullptr);
  std::filesystem::copy_file(std::string(kGoldenChatV3_0324) + "/tokenizer_config.json",
                             name + "/tokenizer.json");
  const auto tokenizer = Tokenizer::Load(name);
  std::filesystem::remove_all(name);
  EXPECT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(name + "/tokenizer.json: "));
}

}  // namespace
}  // namespace fathom
