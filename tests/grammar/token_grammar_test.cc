#include "grammar/compiler/token_grammar.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "gmock/gmock.h"
#include "grammar/protocol.h"
#include "gtest/gtest.h"
#include "simdjson.h"

namespace fathom {
namespace {

using testing::HasSubstr;

// A token for each byte, some words, one that no grammar allows, and the end of the sequence.
constexpr int kVocabSize = 300;
constexpr int kNoText = 298;
constexpr int kEos = 299;

std::vector<std::string> Tokens() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* word : {"\": \"", "{\"", "\"}", "true", "null", ", \"", "\xe4\xbd", "\xa0", "ab",
                           "\":", "12", "0.5", "\\u00"}) {
    tokens.emplace_back(word);
  }
  tokens.resize(kVocabSize);
  return tokens;
}

class TokenGrammarTest : public testing::Test {
 protected:
  std::unique_ptr<TokenMatcher> MatcherOf(Grammar::Kind kind, const std::string& text) {
    const absl::StatusOr<TokenGrammar> grammar =
        TokenGrammar::Compile(vocabulary_, {.kind = kind, .text = text});
    CHECK(grammar.ok()) << text << ": " << grammar.status();
    absl::StatusOr<std::unique_ptr<TokenMatcher>> matcher = grammar->NewMatcher();
    CHECK(matcher.ok()) << matcher.status();
    return *std::move(matcher);
  }

  // Whether exactly `output` obeys the grammar.
  bool Allows(Grammar::Kind kind, const std::string& text, std::string_view output) {
    const std::unique_ptr<TokenMatcher> matcher = MatcherOf(kind, text);
    for (const char c : output) {
      if (!*matcher->Accept(static_cast<unsigned char>(c))) return false;
    }
    return *matcher->Accept(kEos) && matcher->HasEnded();
  }
  bool SchemaAllows(const std::string& schema, std::string_view output) {
    return Allows(Grammar::Kind::kJsonSchema, schema, output);
  }

  std::string RefusalOf(Grammar::Kind kind, const std::string& text) {
    const absl::StatusOr<TokenGrammar> grammar =
        TokenGrammar::Compile(vocabulary_, {.kind = kind, .text = text});
    EXPECT_TRUE(grammar.ok() || absl::IsInvalidArgument(grammar.status())) << grammar.status();
    return std::string(grammar.status().message());
  }

  // What tokens at random come to. Empty when it does not end.
  std::string Draw(TokenMatcher& matcher, std::mt19937& random) {
    std::string output;
    std::vector<uint32_t> mask(GrammarMaskWords(kVocabSize));
    for (int step = 0; step < 2000; ++step) {
      EXPECT_TRUE(matcher.FillMask(absl::MakeSpan(mask)).ok());
      std::vector<int> allowed;
      for (int id = 0; id < kVocabSize; ++id) {
        if ((mask[id / 32] >> (id % 32) & 1) != 0) allowed.push_back(id);
      }
      EXPECT_FALSE(allowed.empty()) << output;
      if (allowed.empty()) return "";
      EXPECT_NE(allowed.back(), kNoText);
      // Ends of strings and lists are a few among many tokens; they come more often here.
      int chosen = allowed[random() % allowed.size()];
      for (const int end : {int{'"'}, int{']'}, int{'}'}, kEos}) {
        if (random() % 4 == 0 && (mask[end / 32] >> (end % 32) & 1) != 0) chosen = end;
      }
      EXPECT_TRUE(*matcher.Accept(chosen));
      if (matcher.HasEnded()) return output;
      output += tokens_[chosen];
    }
    return "";
  }

  const std::vector<std::string> tokens_ = Tokens();
  const TokenVocabulary vocabulary_{tokens_, kVocabSize, {kEos}};
};

TEST_F(TokenGrammarTest, KnowsRegularExpressionsRulesAndSchemas) {
  EXPECT_TRUE(Allows(Grammar::Kind::kRegex, "a(b|c)+", "abcb"));
  EXPECT_FALSE(Allows(Grammar::Kind::kRegex, "a(b|c)+", "a"));
  EXPECT_TRUE(Allows(Grammar::Kind::kEbnf, "root ::= \"x\" rest\nrest ::= [0-9]*", "x12"));
  EXPECT_FALSE(Allows(Grammar::Kind::kEbnf, "root ::= \"x\" rest\nrest ::= [0-9]*", "y"));
  EXPECT_TRUE(SchemaAllows(R"({"type": "object"})", R"({"a": [1, {"b": null}]})"));
  EXPECT_FALSE(SchemaAllows(R"({"type": "object"})", "[]"));
}

TEST_F(TokenGrammarTest, EndsWhereTheGrammarMayEndAndNothingFollows) {
  const std::unique_ptr<TokenMatcher> matcher = MatcherOf(Grammar::Kind::kRegex, "ab?");
  EXPECT_FALSE(*matcher->Accept(kEos));
  EXPECT_TRUE(*matcher->Accept('a'));
  EXPECT_FALSE(matcher->HasEnded());
  EXPECT_TRUE(*matcher->Accept(kEos));
  EXPECT_TRUE(matcher->HasEnded());
  std::vector<uint32_t> mask(GrammarMaskWords(kVocabSize), ~uint32_t{0});
  EXPECT_TRUE(matcher->FillMask(absl::MakeSpan(mask)).ok());
  for (int id = 0; id < kVocabSize; ++id) EXPECT_EQ(mask[id / 32] >> (id % 32) & 1, id == kEos);
}

TEST_F(TokenGrammarTest, AllowsTokensThatCrossTheGrammarsParts) {
  const std::unique_ptr<TokenMatcher> matcher =
      MatcherOf(Grammar::Kind::kJsonSchema,
                R"({"type": "object", "properties": {"ab": {"type": "string"}},
                    "required": ["ab"]})");
  for (const char* token : {"{\"", "ab", "\": \"", "\xe4\xbd", "\xa0", "\"}"}) {
    const auto id = std::find(tokens_.begin(), tokens_.end(), token) - tokens_.begin();
    EXPECT_TRUE(*matcher->Accept(static_cast<int32_t>(id))) << token;
  }
  EXPECT_TRUE(*matcher->Accept(kEos));
}

// What a schema says holds, also where its parts meet.
TEST_F(TokenGrammarTest, MeansBySchemasWhatTheyMean) {
  struct Case {
    const char* schema;
    std::vector<const char*> valid;
    std::vector<const char*> invalid;
  };
  for (const Case& c : std::vector<Case>{
           {R"({"type": "integer", "minimum": -3, "exclusiveMaximum": 12})",
            {"-3", "0", "11"},
            {"-4", "12", "1.5", "01"}},
           {R"({"type": "number", "minimum": 0.5, "maximum": 2})",
            {"0.5", "1.25", "2"},
            {"0.4", "2.1", "-1"}},
           {R"({"type": "string", "minLength": 2, "maxLength": 3})",
            {R"("ab")", "\"\xe4\xbd\xa0\xe4\xbd\xa0\xe4\xbd\xa0\""},
            {R"("a")", R"("abcd")"}},
           {R"({"type": "string", "pattern": "^[a-c]+$"})", {R"("abc")"}, {R"("abd")", R"("")"}},
           {R"({"type": "string", "pattern": "^[^@]+@.*$"})",
            {R"("a@b")", R"("你@")"},
            {R"("@")", R"("a"@b")", R"("a@"")", "\"a@\t\"", R"("a@\")"}},
           {R"({"type": "string", "pattern": "^\\S+\\d$"})",
            {R"("x1")"},
            {R"(""1")", R"("\1")", R"("x 1")"}},
           {R"({"type": "string", "format": "date"})", {R"("2026-11-29")"}, {R"("2026-13-01")"}},
           {R"({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2})",
            {"[true]", "[true, false]"},
            {"[]", "[1]", "[true,true,true]"}},
           {R"({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]})",
            {R"([1, "a"])"},
            {R"(["a"])"}},
           {R"({"type": "object", "properties": {"a": {"type": "integer"}},
                "additionalProperties": {"type": "string"}})",
            {R"({"a": 1, "b": "c"})", "{}"},
            {R"({"a": "c"})", R"({"b": 1})"}},
           {R"({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]})",
            {R"({"b": 1})", R"({"a": [], "b": {}})"},
            {R"({"a": 1})", "{}", R"({"b": 1, "c": 1})"}},
           {R"({"type": "object", "additionalProperties": {"type": "integer"},
                "minProperties": 1, "maxProperties": 2})",
            {R"({"a": 1})", R"({"a": 1, "b": 2})"},
            {"{}", R"({"a": 1, "b": 2, "c": 3})"}},
           {R"({"enum": ["a", 1, null, {"b": [2]}]})", {R"("a")", "1", "null"}, {"2", R"("b")"}},
           {R"({"const": "x\"y"})", {R"("x\"y")"}, {R"("xy")"}},
           {R"({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]})",
            {"null", "[]", "[null, [null]]"},
            {"1"}},
           {R"({"type": ["string", "null"]})", {"null", R"("")"}, {"1"}},
       }) {
    for (const char* output : c.valid) {
      EXPECT_TRUE(SchemaAllows(c.schema, output)) << c.schema << " and " << output;
    }
    for (const char* output : c.invalid) {
      EXPECT_FALSE(SchemaAllows(c.schema, output)) << c.schema << " and " << output;
    }
  }
}

// RFC 8259 lets one half of a surrogate pair stand alone; many readers refuse the whole text.
TEST_F(TokenGrammarTest, StringsEscapeWholeCharacters) {
  constexpr Grammar::Kind kSchema = Grammar::Kind::kJsonSchema;
  struct Place {
    Grammar::Kind kind;
    const char* grammar;
    const char* before;
    const char* after;
  };
  for (const Place& place : {
           Place{kSchema, R"({"type": "string"})", "\"", "\""},
           Place{kSchema, R"({"type": "object"})", R"({"a": [")", R"("]})"},
           Place{kSchema, R"({"type": "object"})", R"({")", R"(": 1})"},
           Place{kSchema, R"({"type": "object", "additionalProperties": {"type": "integer"}})",
                 R"({")", R"(": 1})"},
           Place{kSchema,
                 R"({"type": "object", "properties": {"d": {}}, "additionalProperties": true})",
                 R"({")", R"(": 1})"},
           Place{kSchema, R"({"type": "object", "propertyNames": {"type": "string"}})", R"({")",
                 R"(": 1})"},
           Place{Grammar::Kind::kStructuralTag,
                 R"({"type": "structural_tag", "format": {"type": "json_schema",
                     "json_schema": {"type": "string"}, "excludes": ["<end>"]}})",
                 "\"", "\""},
       }) {
    const auto allows = [&](const char* text) {
      return Allows(place.kind, place.grammar, absl::StrCat(place.before, text, place.after));
    };
    for (const char* text :
         {R"(\u00e9)", R"(\u0000)", R"(\uD7ff)", R"(\ue000)", R"(\uffff)", R"(\"\\\/\b)",
          R"(\ud83d\ude00)", R"(\ud800\udc00)", R"(\uDBFF\uDFFF)", R"(\n\uD83D\uDE00\u00e9)"}) {
      EXPECT_TRUE(allows(text)) << place.grammar << " and " << text;
    }
    for (const char* text : {R"(\udeff)", R"(\uDC00)", R"(\udfff)", R"(\ud83d)", R"(\uDBFF)",
                             R"(\ud83da)", R"(\ud83d\n)", R"(\ud83d\u00e9)", R"(\ud83d\ue000)",
                             R"(\ud83d\ud83d)", R"(\ud83d\\ude00)", R"(\ud83d\ud83d\ude00)",
                             R"(\ude00\ud83d)", R"(\ud83d\ude00\ude00)"}) {
      EXPECT_FALSE(allows(text)) << place.grammar << " and " << text;
    }
  }
}

TEST_F(TokenGrammarTest, StringsEscapeNothingWhereCharactersAreCountedOrMatched) {
  for (const char* schema :
       {R"({"type": "string", "maxLength": 30})", R"({"type": "string", "minLength": 1})",
        R"({"type": "string", "pattern": "^[^a]*$"})"}) {
    for (const char* text : {R"(\n)", R"(\u00e9)", R"(\ud83d\ude00)", R"(\udeff)", R"(\ud83d)"}) {
      EXPECT_FALSE(SchemaAllows(schema, absl::StrCat("\"", text, "\""))) << schema << text;
    }
  }
}

// Marks are tokens without text: no text spells them, and no schema allows them.
TEST_F(TokenGrammarTest, AStructuralTagPutsTokensBetweenTexts) {
  const std::string tag = R"({"type":"structural_tag","format":{"type":"sequence","elements":[
      {"type":"token","token":298},{"type":"const_string","value":"ab"},
      {"type":"json_schema","json_schema":{"type":"boolean"}},{"type":"token","token":298}]}})";
  const std::unique_ptr<TokenMatcher> matcher = MatcherOf(Grammar::Kind::kStructuralTag, tag);
  std::vector<uint32_t> mask(GrammarMaskWords(kVocabSize));
  const auto allowed = [&] {
    EXPECT_TRUE(matcher->FillMask(absl::MakeSpan(mask)).ok());
    std::vector<std::string> tokens;
    for (int id = 0; id < kVocabSize; ++id) {
      if ((mask[id / 32] >> (id % 32) & 1) == 0) continue;
      tokens.push_back(id == kNoText ? "MARK" : id == kEos ? "EOS" : tokens_[id]);
    }
    return tokens;
  };
  EXPECT_THAT(allowed(), testing::ElementsAre("MARK"));
  EXPECT_TRUE(*matcher->Accept(kNoText));
  EXPECT_THAT(allowed(), testing::ElementsAre("a", "ab"));
  EXPECT_TRUE(*matcher->Accept('a'));
  EXPECT_TRUE(*matcher->Accept('b'));
  for (const char c : std::string("false")) EXPECT_TRUE(*matcher->Accept(c)) << c;
  EXPECT_THAT(allowed(), testing::ElementsAre("MARK"));
  EXPECT_TRUE(*matcher->Accept(kNoText));
  EXPECT_THAT(allowed(), testing::ElementsAre("EOS"));
}

// Any tokens, the mark, "x".
constexpr char kThoughtsThenX[] =
    R"({"type":"structural_tag","format":{"type":"sequence","elements":[
        {"type":"any_tokens","exclude_tokens":[298]},{"type":"token","token":298},
        {"type":"const_string","value":"x"}]}})";

TEST_F(TokenGrammarTest, AnyTokensButSomeMayComeFirst) {
  const std::unique_ptr<TokenMatcher> matcher =
      MatcherOf(Grammar::Kind::kStructuralTag, kThoughtsThenX);
  std::vector<uint32_t> mask(GrammarMaskWords(kVocabSize));
  EXPECT_TRUE(matcher->FillMask(absl::MakeSpan(mask)).ok());
  EXPECT_NE(mask['z' / 32] >> ('z' % 32) & 1, 0u);
  EXPECT_NE(mask[kNoText / 32] >> (kNoText % 32) & 1, 0u);
  EXPECT_EQ(mask[kEos / 32] >> (kEos % 32) & 1, 0u);
  EXPECT_TRUE(*matcher->Accept('z'));
  EXPECT_TRUE(*matcher->Accept(kNoText));
  EXPECT_FALSE(*matcher->Accept('z'));
  EXPECT_TRUE(*matcher->Accept('x'));
  EXPECT_TRUE(*matcher->Accept(kEos));
}

TEST_F(TokenGrammarTest, AMarkMayFollowABrokenCharacter) {
  const std::unique_ptr<TokenMatcher> matcher =
      MatcherOf(Grammar::Kind::kStructuralTag, kThoughtsThenX);
  std::vector<uint32_t> mask(GrammarMaskWords(kVocabSize));
  EXPECT_TRUE(*matcher->Accept(0xe4));
  EXPECT_TRUE(*matcher->Accept(kNoText));
  EXPECT_TRUE(matcher->FillMask(absl::MakeSpan(mask)).ok());
  EXPECT_NE(mask['x' / 32] >> ('x' % 32) & 1, 0u);
}

TEST_F(TokenGrammarTest, ChecksTheSchemasOfAStructuralTag) {
  EXPECT_THAT(RefusalOf(Grammar::Kind::kStructuralTag,
                        R"({"type":"structural_tag","format":{"type":"or","elements":[
                            {"type":"json_schema","json_schema":{"not":{}}}]}})"),
              HasSubstr("schema at #: not is not supported"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kStructuralTag,
                        R"({"type":"structural_tag","format":{"type":"json_schema",
                            "style":"glm_xml","json_schema":{}}})"),
              HasSubstr("written as JSON"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kStructuralTag, "{}"), testing::Not(testing::IsEmpty()));
}

TEST_F(TokenGrammarTest, RefusesWhatXgrammarWarnsOf) {
  for (const char* schema : {
           R"({"type": "number", "multipleOf": 0.1})",
           R"({"type": "string", "pattern": "a+", "maxLength": 3})",
           R"({"oneOf": [{"type": "integer"}, {"type": "number"}]})",
           R"({"allOf": [{"type": "object"}, {"type": "object"}]})",
       }) {
    EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, schema), HasSubstr("not supported"))
        << schema;
  }
}

TEST_F(TokenGrammarTest, RefusesPatternsThatJsonCannotSay) {
  EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, R"({"type": "string", "pattern": "^\\t$"})"),
              HasSubstr("the pattern '^\\t$' matches no string as it stands in JSON"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, R"({"type": "string", "pattern": "(a"})"),
              testing::StartsWith("the pattern '(a': Regex parsing error at position "));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, R"({"type": "string", "pattern": "^é.$"})"),
              HasSubstr("schema at #: the pattern '^é.$' has characters beyond ASCII"));
}

TEST_F(TokenGrammarTest, RefusesWhatIsWrongAndSaysWhy) {
  EXPECT_THAT(RefusalOf(Grammar::Kind::kRegex, "a(b"), testing::StartsWith("Regex parsing error"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kRegex, "(?=a)b"), HasSubstr("Lookahead is not supported"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kEbnf, "root ::= missing"), HasSubstr("missing"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kEbnf, "other ::= \"a\""), HasSubstr("root"));
  EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, R"({"type": "string", "minLength": 3,
                                                        "maxLength": 2})"),
              HasSubstr("minLength 3 is above maxLength 2"));
  // Whatever xgrammar says of its own code is left out.
  for (const char* schema :
       {R"({"type": "integer", "minimum": 1e300})", R"({"type": "integer", "maximum": -1e300})",
        R"({"type": "string", "minLength": -1})", R"({"type": "object", "required": "a"})"}) {
    const std::string refusal = RefusalOf(Grammar::Kind::kJsonSchema, schema);
    EXPECT_THAT(refusal, testing::Not(HasSubstr("Check failed"))) << schema;
    EXPECT_THAT(refusal, testing::Not(testing::IsEmpty())) << schema;
  }
  EXPECT_THAT(RefusalOf(Grammar::Kind::kJsonSchema, "false"), testing::Not(testing::IsEmpty()));
}

// Of the official test suite, which tests/integration/schemas.py writes into the file that
// FATHOM_SCHEMA_SUITE names. What the suite says is valid may still be refused here: properties
// have an order, and only those that are named are there.
TEST_F(TokenGrammarTest, NothingThatASchemaForbidsObeysItsGrammar) {
  const char* const suite = std::getenv("FATHOM_SCHEMA_SUITE");
  if (suite == nullptr) GTEST_SKIP() << "FATHOM_SCHEMA_SUITE names no file";
  simdjson::dom::parser parser;
  const simdjson::dom::element cases = parser.load(suite).value();
  int num_accepted = 0, num_refused = 0;
  for (const simdjson::dom::element each : simdjson::dom::array(cases)) {
    const std::string name{std::string_view(each["name"])};
    const std::string schema{std::string_view(each["schema"])};
    const absl::StatusOr<TokenGrammar> grammar =
        TokenGrammar::Compile(vocabulary_, {.kind = Grammar::Kind::kJsonSchema, .text = schema});
    if (!grammar.ok()) {
      ++num_refused;
      continue;
    }
    ++num_accepted;
    for (const std::string_view output : simdjson::dom::array(each["invalid"])) {
      const std::unique_ptr<TokenMatcher> matcher = *grammar->NewMatcher();
      bool is_allowed = true;
      for (const char c : output) {
        is_allowed = is_allowed && *matcher->Accept(static_cast<unsigned char>(c));
      }
      EXPECT_FALSE(is_allowed && *matcher->Accept(kEos))
          << name << ": " << schema << " allows " << output;
    }
  }
  std::printf("%d schemas of the suite are served, %d refused\n", num_accepted, num_refused);
  EXPECT_GT(num_accepted, 100);
}

TEST_F(TokenGrammarTest, DrawsValidJsonWhateverTheTokens) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const std::string schema = R"({"type": "object", "properties": {
      "name": {"type": "string", "maxLength": 20}, "n": {"type": "integer", "maximum": 12345, "minimum": -7},
      "kind": {"enum": ["x", "y"]}, "list": {"type": "array", "items": {"type": "boolean"}},
      "more": {"type": "object", "additionalProperties": {"type": ["string", "null"]}}},
      "required": ["name", "kind"]})";
  int num_ended = 0;
  for (int i = 0; i < 200; ++i) {
    const std::unique_ptr<TokenMatcher> matcher = MatcherOf(Grammar::Kind::kJsonSchema, schema);
    const std::string output = Draw(*matcher, random);
    if (output.empty()) continue;
    ++num_ended;
    simdjson::dom::parser parser;
    simdjson::dom::object object;
    ASSERT_FALSE(parser.parse(output).get(object)) << absl::CHexEscape(output);
    simdjson::dom::element value;
    ASSERT_FALSE(object.at_key("name").get(value)) << output;
    ASSERT_FALSE(object.at_key("kind").get(value)) << output;
  }
  EXPECT_GT(num_ended, 100);
}

// What the gateway writes where a hex digit may follow an escape.
TEST_F(TokenGrammarTest, AnEscapeOfFourDigitsEndsWithThem) {
  EXPECT_TRUE(Allows(Grammar::Kind::kEbnf, R"(root ::= "a\u000ab")", "a\nb"));
  EXPECT_TRUE(Allows(Grammar::Kind::kRegex, R"(\u0041b)", "Ab"));
  EXPECT_TRUE(Allows(Grammar::Kind::kRegex, R"([\u0041-\u0043]1)", "B1"));
  EXPECT_TRUE(Allows(Grammar::Kind::kStructuralTag,
                     R"({"type": "structural_tag", "format": {"type": "regex", "pattern":
                         "\\u000ab"}})",
                     "\nb"));
}

}  // namespace
}  // namespace fathom
