// What the coordinator is asked for when a client wants structured output.
#include "gateway/openai/structured_output.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

class StructuredOutputTest : public GatewayTest {
 protected:
  // The grammar that reaches the coordinator when a completion has `field`.
  v1::Grammar GrammarOf(const std::string& field) {
    CoordinatorSays("{}");
    const HttpResponse response = PostCompletion(absl::StrCat("{\"prompt\":[5],", field, "}"));
    EXPECT_EQ(response.status, 200) << response.body;
    return coordinator_.requests().back().sampling().grammar();
  }
};

TEST_F(StructuredOutputTest, EverySpellingBecomesAGrammar) {
  struct Case {
    const char* field;
    v1::Grammar::Kind kind;
    const char* text;
  };
  for (const Case& c : {
           Case{R"("response_format":{"type":"json_object"})", v1::Grammar::KIND_JSON_SCHEMA,
                R"({"type":"object"})"},
           Case{R"("response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,
                   "schema":{"type":"object","properties":{"b":{},"a":{"const":1}}}}})",
                v1::Grammar::KIND_JSON_SCHEMA,
                R"({"type":"object","properties":{"b":{},"a":{"const":1}}})"},
           Case{R"("structured_outputs":{"json":{"type":"null"}})", v1::Grammar::KIND_JSON_SCHEMA,
                R"({"type":"null"})"},
           Case{R"("structured_outputs":{"json":"{ }"})", v1::Grammar::KIND_JSON_SCHEMA, "{ }"},
           Case{R"("structured_outputs":{"regex":"a+"})", v1::Grammar::KIND_REGEX, "a+"},
           Case{R"("structured_outputs":{"grammar":"root ::= \"a\""})", v1::Grammar::KIND_EBNF,
                "root ::= \"a\""},
           Case{R"("structured_outputs":{"choice":["a","b\"c\\"]})", v1::Grammar::KIND_EBNF,
                R"(root ::= "a" | "b\"c\\")"},
           Case{R"("structured_outputs":{"json_object":true})", v1::Grammar::KIND_JSON_SCHEMA,
                R"({"type":"object"})"},
           Case{R"("guided_json":{})", v1::Grammar::KIND_JSON_SCHEMA, "{}"},
           Case{R"("guided_regex":"[0-9]")", v1::Grammar::KIND_REGEX, "[0-9]"},
           Case{R"("guided_regex":"\\x41b\\\\x41\\xz\\x4")", v1::Grammar::KIND_REGEX,
                R"(\u0041b\\x41\xz\x4)"},
           Case{R"("guided_choice":["\n"])", v1::Grammar::KIND_EBNF, R"(root ::= "\u000a")"},
           Case{R"("guided_grammar":"root ::= [a]")", v1::Grammar::KIND_EBNF, "root ::= [a]"},
       }) {
    const v1::Grammar grammar = GrammarOf(c.field);
    EXPECT_EQ(grammar.kind(), c.kind) << c.field;
    EXPECT_EQ(grammar.text(), c.text) << c.field;
    EXPECT_FALSE(grammar.has_begins_after_token_id());
  }
}

TEST_F(StructuredOutputTest, NothingIsAskedWhereNothingIsSaid) {
  for (const char* field : {R"("response_format":{"type":"text"})", R"("structured_outputs":null)",
                            R"("structured_outputs":{})", R"("guided_json":null)",
                            R"("structured_outputs":{"json_object":false})"}) {
    GrammarOf(field);
    EXPECT_FALSE(coordinator_.requests().back().sampling().has_grammar()) << field;
  }
}

TEST_F(StructuredOutputTest, WhatTheCoordinatorRefusesIsA400ThatNamesReasonAndField) {
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.RefuseGrammar("schema at #/a: not is not supported");
    return grpc::Status::OK;
  });
  struct Case {
    const char* field;
    const char* param;
  };
  for (const Case& c : {
           Case{
               R"("response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{}}})",
               "response_format"},
           Case{R"("response_format":{"type":"json_object"})", "response_format"},
           Case{R"("structured_outputs":{"json":{}})", "structured_outputs.json"},
           Case{R"("structured_outputs":{"choice":["a"]})", "structured_outputs.choice"},
           Case{R"("guided_json":{})", "guided_json"},
           Case{R"("guided_regex":"a")", "guided_regex"},
       }) {
    for (const char* stream : {"false", "true"}) {
      const HttpResponse response =
          PostCompletion(absl::StrCat("{\"prompt\":[5],", c.field, ",\"stream\":", stream, "}"));
      EXPECT_EQ(response.status, 400);
      EXPECT_THAT(response.body, HasSubstr("schema at #/a: not is not supported"));
      EXPECT_THAT(response.body, HasSubstr(absl::StrCat("\"param\":\"", c.param, "\"")));
    }
  }
  const HttpResponse chat = PostChat(
      R"({"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_object"}})");
  EXPECT_THAT(chat.body, HasSubstr("\"param\":\"response_format\""));
  const HttpResponse response =
      Ask(Post("/v1/responses",
               R"({"input":"x","text":{"format":{"type":"json_schema","name":"n","schema":{}}}})"));
  EXPECT_EQ(response.status, 400);
  EXPECT_THAT(response.body, HasSubstr("\"param\":\"text.format.schema\""));
}

TEST_F(StructuredOutputTest, WhatIsRefusedForAnotherReasonIsNotLaidToTheGrammar) {
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream&) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "needs 7 tokens of KV cache");
  });
  const HttpResponse response = PostCompletion(R"({"prompt":[5],"guided_json":{}})");
  EXPECT_EQ(response.status, 400);
  EXPECT_THAT(response.body, HasSubstr("\"param\":null"));
}

TEST_F(StructuredOutputTest, ChatsHaveItToo) {
  CoordinatorSays("{}");
  const HttpResponse response = PostChat(
      R"({"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_object"}})");
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(coordinator_.requests().back().sampling().grammar().text(), R"({"type":"object"})");
}

TEST_F(StructuredOutputTest, AModelThatMayThinkThinksFirst) {
  const auto thinking = [](v1::Grammar::Kind kind, const std::string& text) {
    v1::Grammar grammar;
    grammar.set_kind(kind);
    grammar.set_text(text);
    return MayThinkFirst(grammar, 7, 8, {9});
  };
  const std::string thoughts =
      R"({"type":"structural_tag","format":{"type":"sequence","elements":[{"type":"optional",)"
      R"("content":{"type":"sequence","elements":[{"type":"token","token":7},)"
      R"({"type":"any_tokens","exclude_tokens":[8,9]},{"type":"token","token":8}]}},)";
  EXPECT_EQ(thinking(v1::Grammar::KIND_REGEX, "a\"").text(),
            thoughts + R"({"type":"regex","pattern":"a\""}]}})");
  EXPECT_EQ(thinking(v1::Grammar::KIND_EBNF, "root ::= x").text(),
            thoughts + R"({"type":"grammar","grammar":"root ::= x"}]}})");
  EXPECT_EQ(thinking(v1::Grammar::KIND_JSON_SCHEMA, R"({ "b": 1, "a": 2 })").text(),
            thoughts + R"({"type":"json_schema","max_whitespace_cnt":64,)"
                       R"("json_schema":{"b":1,"a":2}}]}})");
  const v1::Grammar tag = thinking(v1::Grammar::KIND_STRUCTURAL_TAG,
                                   R"({"type":"structural_tag","format":{"type":"any_text"}})");
  EXPECT_EQ(tag.text(), thoughts + R"({"type":"any_text"}]}})");
  EXPECT_EQ(tag.kind(), v1::Grammar::KIND_STRUCTURAL_TAG);
  // What is no JSON is refused as it is.
  EXPECT_EQ(thinking(v1::Grammar::KIND_JSON_SCHEMA, "{}}").text(), "{}}");
}

}  // namespace
}  // namespace fathom
