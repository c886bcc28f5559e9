// What is refused in tokenizer.json and tokenizer_config.json. Each case is the tiny tokenizer
// with one thing changed.

#include "gateway/text/tokenizer_file.h"

#include <random>
#include <string>

#include "absl/strings/str_replace.h"
#include "gateway/text/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/gateway/text/golden.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string& TinyJson() {
  static const std::string& json =
      *new std::string(ReadGoldenFile(std::string(kGoldenTiny) + "/tokenizer.json"));
  return json;
}

// The tiny tokenizer.json with the first `from` replaced.
std::string Changed(const std::string& from, const std::string& to) {
  std::string json = TinyJson();
  const size_t position = json.find(from);
  EXPECT_NE(position, std::string::npos) << from;
  return json.replace(position, from.size(), to);
}

std::string Error(std::string_view json, std::string_view config = "") {
  const auto tokenizer = Tokenizer::Parse(json, config, "");
  EXPECT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
  return std::string(tokenizer.status().message());
}

struct Refusal {
  const char* name;
  const char* from;
  const char* to;
  const char* message;
};

class RefusedTokenizerFile : public testing::TestWithParam<Refusal> {};

TEST_P(RefusedTokenizerFile, NamesWhatIsWrong) {
  EXPECT_THAT(Error(Changed(GetParam().from, GetParam().to)), HasSubstr(GetParam().message));
}

const Refusal kRefusals[] = {
    {"Truncated", "\"model\": {", "\"model\": ", "tokenizer.json is not valid JSON"},
    {"WordPiece", "\"type\": \"BPE\"", "\"type\": \"WordPiece\"",
     R"(tokenizer.json: model has type "WordPiece", only "BPE" is supported)"},
    {"ModelWithoutType", "\"type\": \"BPE\",", "", "tokenizer.json: model.type is missing"},
    {"ModelIsAList", "\"model\": {", "\"model\": [], \"other\": {",
     "tokenizer.json: model is an array, expected an object"},
    {"ModelTwice", "\"model\": {", "\"model\": {}, \"model\": {", "model is there twice"},
    {"Dropout", "\"dropout\": null", "\"dropout\": 0.1", "model.dropout is 0.1"},
    {"SubwordPrefix", "\"continuing_subword_prefix\": null",
     "\"continuing_subword_prefix\": \"##\"", "model.continuing_subword_prefix is \"##\""},
    {"WordSuffix", "\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"</w>\"",
     "model.end_of_word_suffix is \"</w>\""},
    {"ByteFallback", "\"byte_fallback\": false", "\"byte_fallback\": true",
     "model .byte_fallback is true, which is not supported"},
    {"IgnoreMerges", "\"byte_fallback\": false", "\"ignore_merges\": true",
     "model .ignore_merges is true"},
    {"Normalizer", "\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFKC\"}]",
     R"(normalizer.normalizers has the normalizer "NFKC", none is supported)"},
    {"OneNormalizer", "\"normalizer\": {\n  \"type\": \"Sequence\"",
     "\"normalizer\": {\n  \"type\": \"Lowercase\"", "normalizer has type \"Lowercase\""},
    {"PreTokenizer", "\"pre_tokenizer\": {\n  \"type\": \"Sequence\"",
     "\"pre_tokenizer\": {\n  \"type\": \"Metaspace\"", "pre_tokenizer has type \"Metaspace\""},
    {"NoPreTokenizer", "\"pre_tokenizer\"", "\"elsewhere\"", "pre_tokenizer is missing"},
    {"OtherNumbers", "{1,3}", "{1,4}", "pretokenizers[0].pattern.Regex is"},
    {"OtherWords", "|\\\\s+(?!\\\\S)", "", "which is not DeepSeek-V3's pre-tokenizer"},
    {"SplitOnAString", "\"Regex\": \"\\\\p{N}", "\"String\": \"\\\\p{N}",
     "pretokenizers[0].pattern.Regex is missing"},
    {"SplitRemoves", "\"Isolated\"", "\"Removed\"", "behavior is \"Removed\""},
    {"SplitInverts", "\"invert\": false", "\"invert\": true", ".invert is true"},
    {"DigitsInstead", "\"type\": \"Split\"", "\"type\": \"Digits\"",
     R"(pretokenizers[0] has type "Digits", only "Split" is supported)"},
    {"PrefixSpace", "\"add_prefix_space\": false", "\"add_prefix_space\": true",
     "pretokenizers[3] .add_prefix_space is true"},
    {"ByteLevelRegex", "\"use_regex\": false", "\"use_regex\": true", ".use_regex is true"},
    {"FifthStep", "\"pretokenizers\": [", "\"pretokenizers\": [], \"x\": [",
     "pretokenizers has 0 steps"},
    {"Decoder", "\"decoder\": {\n  \"type\": \"ByteLevel\"",
     "\"decoder\": {\n  \"type\": \"Metaspace\"", "decoder has type \"Metaspace\""},
    {"PostProcessor", "\"post_processor\": {\n  \"type\": \"ByteLevel\"",
     "\"post_processor\": {\n  \"type\": \"BertProcessing\"",
     "post_processor has type \"BertProcessing\""},
    {"IdIsText", "\"!\": 3,", "\"!\": \"3\",", "model.vocab.! is \"3\", expected a number"},
    {"IdIsNegative", "\"!\": 3,", "\"!\": -3,", "model.vocab.! is -3, expected a number"},
    {"IdIsAFraction", "\"!\": 3,", "\"!\": 3.5,", "model.vocab.! is 3.5, expected a number"},
    {"IdIsHuge", "\"!\": 3,", "\"!\": 4000000000,", "ids must be below 4194304"},
    {"IdTwice", "\"!\": 3,", "\"!\": 4,", "has id 4, which another token has too"},
    {"TokenTwice", "\"\\\"\": 4,", "\"!\": 4,", "model.vocab.! is there twice"},
    {"TokenWithoutText", "\"!\": 3,", "\"\": 3,", "is a token without text"},
    {"ByteWithoutToken", "\"!\": 3,", "\"!!!!\": 3,", "has no token for byte 33 (\"!\")"},
    {"MergeOfUnknown", "\"½ł å\"", "\"½ł 中\"", "needs the token \"中\", which model.vocab"},
    {"MergeIntoUnknown", "\"½ł å\"", "\"! å\"", "needs the token \"!å\", which model.vocab"},
    {"MergeOfOne", "\"½ł å\"", "\"½łå\"", "expected two tokens"},
    {"MergeOfThree", "\"½ł å\"", "\"½ ł å\"", "expected two tokens"},
    {"MergeIsANumber", "\"½ł å\"", "7", "is 7, expected an array"},
    {"MergeListOfThree", "\"½ł å\"", "[\"½\", \"ł\", \"å\"]", "is not two tokens"},
    {"MergeTwice", "\"½ł å\"", "\"½ ł\"", "is there twice"},
    {"AddedWithoutId", "\"id\": 508,", "", "added_tokens[3].id is missing"},
    {"AddedWithoutContent", "\"content\": \"<think>\",", "", "added_tokens[5].content is missing"},
    {"AddedEmpty", "\"<think>\"", "\"\"", "content has 0 bytes, expected 1 to 512"},
    {"AddedTwice", "\"<think>\"", "\"</think>\"", "(\"</think>\") is there twice"},
    {"AddedWithIdOfAnother", "\"id\": 508", "\"id\": 509", "has id 509, which another token"},
    {"AddedContradictsVocab", "\"id\": 2,", "\"id\": 600,", "has id 600, but model.vocab says 2"},
    {"SingleWord", "\"single_word\": false", "\"single_word\": true",
     "added_tokens[0] .single_word is true"},
};

INSTANTIATE_TEST_SUITE_P(TokenizerFileTest, RefusedTokenizerFile, testing::ValuesIn(kRefusals),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(TokenizerFileTest, RefusesIdsWithAHole) {
  EXPECT_THAT(Error(Changed("\"id\": 511", "\"id\": 512")),
              HasSubstr("has no token with id 511, but one with id 512"));
}

TEST(TokenizerFileTest, RefusesWhatIsNoJsonAtAll) {
  for (const std::string& json : {std::string(), std::string("{"), std::string("\xFF\xFE"),
                                  std::string(100000, '['), std::string("{\"a\":\"\xC0\"}")}) {
    EXPECT_THAT(Error(json), HasSubstr("tokenizer.json is not valid JSON"));
  }
  EXPECT_THAT(Error("[]"), HasSubstr("tokenizer.json is an array, expected an object"));
}

TEST(TokenizerFileTest, RefusesLongTokens) {
  const std::string long_token(kMaxTokenBytes + 1, 'a');
  EXPECT_THAT(Error(Changed("\"!\": 3,", "\"!\": 3, \"" + long_token + "\": 600,")),
              HasSubstr("has 65537 bytes, limit 65536"));
  EXPECT_THAT(Error(Changed("<think>", std::string(AddedToken::kMaxBytes + 1, 'a'))),
              HasSubstr("content has 513 bytes"));
}

TEST(TokenizerFileTest, SurvivesEveryTruncation) {
  const std::string& json = TinyJson();
  for (size_t size = 0; size < json.size(); size += 97) Error(json.substr(0, size));
}

TEST(TokenizerFileTest, SurvivesRandomDamage) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int trial = 0; trial < 500; ++trial) {
    std::string json = TinyJson();
    for (int changes = 1 + static_cast<int>(random() % 3); changes > 0; --changes) {
      const size_t from = random() % json.size();
      const size_t to = random() % json.size();
      const size_t length = 1 + random() % 40;
      if (random() % 2 == 0) {
        json[from] = "0-\"{}[],:\\ n\xFF"[random() % 13];
      } else {
        json.replace(from, length, json.substr(to, length));
      }
    }
    const auto tokenizer = Tokenizer::Parse(json, "", "");
    if (tokenizer.ok()) {
      (*tokenizer)->Encode("Hello, 世界! 1234 <think>", BosPolicy::kAsConfigured);
    } else {
      EXPECT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
    }
  }
}

TEST(TokenizerFileTest, TakesMergesAsPairsAndUnknownFields) {
  const auto tokenizer = Tokenizer::Parse(Changed("\"½ł å\"", "[\"½ł\", \"å\"]"), "", "");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE(
      Tokenizer::Parse(Changed("\"version\": ", "\"new\": {}, \"version\": "), "", "").ok());
}

TEST(TokenizerFileTest, ATemplateAddsItsTokensUnlessTheConfigSpeaks) {
  const std::string json = Changed("\"post_processor\": {\n  \"type\": \"ByteLevel\"", R"(
    "post_processor": {"type": "Sequence", "processors": [
      {"type": "ByteLevel"},
      {"type": "TemplateProcessing",
       "single": [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A"}},
                  {"SpecialToken": {"id": "E", "type_id": 0}}],
       "special_tokens": {"B": {"id": "B", "ids": [0]}, "E": {"id": "E", "ids": [1, 2]}}}],
    "type": "Sequence")");
  // "type" would be there twice: the replaced text leaves the old object's other fields behind.
  const std::string fixed =
      absl::StrReplaceAll(json, {{"}}}],\n    \"type\": \"Sequence\"", "}}}]"}});
  const auto by_template = Tokenizer::Parse(fixed, "", "");
  ASSERT_TRUE(by_template.ok()) << by_template.status();
  EXPECT_THAT((*by_template)->Encode("!", BosPolicy::kAsConfigured), ElementsAre(0, 3, 1, 2));
  EXPECT_THAT((*by_template)->Encode("!", BosPolicy::kNone), ElementsAre(3));

  const auto by_config = Tokenizer::Parse(
      fixed, R"({"add_bos_token": false, "add_eos_token": true, "eos_token": "<think>"})", "");
  ASSERT_TRUE(by_config.ok()) << by_config.status();
  EXPECT_THAT((*by_config)->Encode("!", BosPolicy::kAsConfigured), ElementsAre(3, 510));

  EXPECT_THAT(Error(absl::StrReplaceAll(fixed, {{"[1, 2]", "[1, 700]"}})),
              HasSubstr("post_processor names id 700"));
  EXPECT_THAT(
      Error(absl::StrReplaceAll(fixed, {{"{\"id\": \"E\", \"type", "{\"id\": \"F\", \"type"}})),
      HasSubstr("special_tokens.F is missing"));
  EXPECT_THAT(Error(absl::StrReplaceAll(fixed, {{"{\"Sequence\": {\"id\": \"A\"}},", ""}})),
              HasSubstr("has the text 0 times"));
}

TEST(TokenizerConfigTest, TakesTokensAsTextOrObject) {
  const auto tokenizer = Tokenizer::Parse(
      TinyJson(), R"({"bos_token": {"content": "<think>", "lstrip": false}, "eos_token": "!",
                      "add_bos_token": true, "pad_token": null, "anything": [1]})",
      "");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos(), 510u);
  EXPECT_EQ((*tokenizer)->eos(), 3u);
  EXPECT_THAT((*tokenizer)->Encode("!", BosPolicy::kAsConfigured), ElementsAre(510, 3));
}

TEST(TokenizerConfigTest, FindsTheChatTemplate) {
  const auto text_of = [](std::string_view config, std::string file) {
    const auto tokenizer = Tokenizer::Parse(TinyJson(), config, std::move(file));
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return (*tokenizer)->chat_template();
  };
  EXPECT_EQ(text_of("", ""), "");
  EXPECT_EQ(text_of(R"({"chat_template": "x"})", ""), "x");
  EXPECT_EQ(text_of(R"({"chat_template": "x"})", "the file wins"), "the file wins");
  EXPECT_EQ(text_of(R"({"chat_template": [{"name": "tool_use", "template": "t"},
                                          {"name": "default", "template": "d"}]})",
                    ""),
            "d");
}

TEST(TokenizerConfigTest, RefusesWhatItCannotFollow) {
  const auto error = [](std::string_view config) { return Error(TinyJson(), config); };
  EXPECT_THAT(error("{"), HasSubstr("tokenizer_config.json is not valid JSON"));
  EXPECT_THAT(error("7"), HasSubstr("tokenizer_config.json is 7, expected an object"));
  EXPECT_THAT(error(R"({"bos_token": 1})"), HasSubstr("bos_token is 1, expected an object"));
  EXPECT_THAT(error(R"({"bos_token": {}})"), HasSubstr("bos_token.content is missing"));
  EXPECT_THAT(error(R"({"bos_token": "<s>"})"),
              HasSubstr("bos_token is \"<s>\", which tokenizer.json does not have"));
  EXPECT_THAT(error(R"({"add_bos_token": "yes"})"), HasSubstr("add_bos_token is \"yes\""));
  EXPECT_THAT(error(R"({"add_bos_token": true})"),
              HasSubstr("add_bos_token is true, but there is no bos_token"));
  EXPECT_THAT(error(R"({"chat_template": 3})"), HasSubstr("chat_template is 3"));
}

}  // namespace
}  // namespace fathom
