// POST /v1/chat/completions for models that think and call tools.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/tool_model_fixture.h"

namespace fathom {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kAsk[] = R"("messages":[{"role":"user","content":"hi"}])";
constexpr char kTools[] =
    R"("tools":[{"type":"function","function":{"name":"get","description":"d","parameters":{}}}])";
constexpr char kCall[] =
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{\"a\": 1,\n \"b\": \"x\"}"
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>";

class ChatToolsTest : public ToolModelTest {
 protected:
  HttpResponse Chat(const std::string& fields) {
    return PostChat(absl::StrCat("{", kAsk, fields.empty() ? "" : ",", fields, "}"));
  }
};

TEST_F(ChatToolsTest, ThoughtsObeyNoGrammar) {
  CoordinatorSays("Hmm</think>{}");
  const std::string format = R"("response_format":{"type":"json_object"})";
  EXPECT_EQ(Chat(format).status, 200);
  EXPECT_FALSE(coordinator_.requests().back().sampling().grammar().has_begins_after_token_id());
  EXPECT_EQ(Chat(absl::StrCat(format, R"(,"chat_template_kwargs":{"thinking":true})")).status, 200);
  const v1::Grammar grammar = coordinator_.requests().back().sampling().grammar();
  EXPECT_TRUE(grammar.has_begins_after_token_id());
  EXPECT_EQ(grammar.begins_after_token_id(), tokenizer_->FindAddedToken("</think>"));
}

// That a call's name is one of these, and how often it may come, is for the grammar to say.
TEST_F(ChatToolsTest, CallsThatMustComeAreAGrammar) {
  const std::string tools =
      R"("tools":[{"type":"function","function":{"name":"get","parameters":{}}},)"
      R"({"type":"function","function":{"name":"put","parameters":{"type":"object"}}}])";
  const auto grammar_of = [&](const std::string& choice) {
    CoordinatorSays(kCall);
    const HttpResponse response = Chat(absl::StrCat(tools, R"(,"tool_choice":)", choice));
    EXPECT_EQ(response.status, 200) << response.body;
    return coordinator_.requests().back().sampling().grammar();
  };
  const v1::Grammar required = grammar_of(R"("required")");
  EXPECT_EQ(required.kind(), v1::Grammar::KIND_STRUCTURAL_TAG);
  EXPECT_THAT(required.text(), HasSubstr(R"("value":"get")"));
  EXPECT_THAT(required.text(), HasSubstr(R"("value":"put")"));
  EXPECT_THAT(required.text(), HasSubstr(R"("type":"star")"));
  EXPECT_THAT(required.text(),
              HasSubstr(absl::StrCat(R"({"type":"token","token":)",
                                     *tokenizer_->FindAddedToken("<｜tool▁calls▁begin｜>"), "}")));
  EXPECT_FALSE(required.has_begins_after_token_id());

  const v1::Grammar one = grammar_of(R"("required","parallel_tool_calls":false)");
  EXPECT_THAT(one.text(), HasSubstr(R"("value":"put")"));
  EXPECT_THAT(one.text(), Not(HasSubstr(R"("type":"star")")));

  const std::string named = R"({"type":"function","function":{"name":"put"}})";
  EXPECT_THAT(grammar_of(named).text(), HasSubstr(R"("value":"put")"));
  EXPECT_THAT(grammar_of(named).text(), Not(HasSubstr(R"("value":"get")")));
  EXPECT_THAT(grammar_of(named).text(), Not(HasSubstr(R"("type":"star")")));
  EXPECT_EQ(
      grammar_of(named + R"(,"chat_template_kwargs":{"thinking":true})").begins_after_token_id(),
      tokenizer_->FindAddedToken("</think>"));
  // There is no other content that could obey it.
  EXPECT_EQ(grammar_of(named + R"(,"response_format":{"type":"json_object"})").text(),
            grammar_of(named).text());
  EXPECT_EQ(grammar_of(R"("auto")").text(), "");
}

TEST_F(ChatToolsTest, OnlyAllowedToolsAreToldOfAndMayBeCalled) {
  const std::string tools =
      R"("tools":[{"type":"function","function":{"name":"get"}},)"
      R"({"type":"function","function":{"name":"put"}}],"tool_choice":{"type":"allowed_tools",)"
      R"("allowed_tools":{"tools":[{"type":"function","function":{"name":"put"}}],"mode":)";
  CoordinatorSays(kCall);
  EXPECT_EQ(Chat(tools + R"("auto"}})").status, 200);
  EXPECT_THAT(LastPrompt(), HasSubstr("### put"));
  EXPECT_THAT(LastPrompt(), Not(HasSubstr("### get")));
  EXPECT_FALSE(coordinator_.requests().back().sampling().has_grammar());
  EXPECT_EQ(Chat(tools + R"("required"}})").status, 200);
  const std::string grammar = coordinator_.requests().back().sampling().grammar().text();
  EXPECT_THAT(grammar, HasSubstr(R"("value":"put")"));
  EXPECT_THAT(grammar, Not(HasSubstr(R"("value":"get")")));
  // The Responses API has it one level flatter.
  const std::string response =
      R"({"input":"hi","tools":[{"type":"function","name":"get"},{"type":"function","name":"put"}],)"
      R"("tool_choice":{"type":"allowed_tools","mode":"auto",)"
      R"("tools":[{"type":"function","name":"put"}]}})";
  EXPECT_EQ(Ask(Post("/v1/responses", response)).status, 200);
  EXPECT_THAT(LastPrompt(), HasSubstr("### put"));
  EXPECT_THAT(LastPrompt(), Not(HasSubstr("### get")));
}

TEST_F(ChatToolsTest, ACallThatTheClientHasNamedEndsWithStop) {
  CoordinatorSays(kCall);
  const std::string chosen =
      absl::StrCat(kTools, R"(,"tool_choice":{"type":"function","function":{"name":"get"}})");
  HttpResponse response = Chat(chosen);
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"stop")"));
  EXPECT_THAT(response.body, HasSubstr(R"("name":"get")"));
  response = Chat(absl::StrCat(kTools, R"(,"tool_choice":"required")"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"tool_calls")"));
}

TEST_F(ChatToolsTest, RefusesToolsThatCannotBeRequired) {
  const auto tool = [](const std::string& name, const std::string& description) {
    return absl::StrCat(
        R"("tool_choice":"required","tools":[{"type":"function","function":{"name":")", name,
        R"(","parameters":{"description":")", description, R"("}}}])");
  };
  const auto expect_refused = [&](const HttpResponse& response, const char* reason) {
    EXPECT_EQ(response.status, 400);
    EXPECT_THAT(response.body, HasSubstr(reason));
    EXPECT_THAT(response.body, HasSubstr(R"("param":"tools")"));
  };
  expect_refused(Chat(tool("a b", "")), "its name must have");
  expect_refused(Chat(tool("a", std::string(70'000, 'x'))), "limit 65536");
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream& stream) {
    stream.RefuseGrammar("schema at #: not is not supported");
    return grpc::Status::OK;
  });
  expect_refused(Chat(tool("a", "")), "not is not supported");
}

TEST_F(ChatToolsTest, GivesThoughtsUnderBothNames) {
  CoordinatorSays("Hmm</think>Hello");
  const HttpResponse response = Chat(R"("chat_template_kwargs":{"thinking":true})");
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(LastPrompt(), EndsWith("<｜Assistant｜><think>"));
  EXPECT_THAT(response.body, HasSubstr(R"("content":"Hello",)"));
  EXPECT_THAT(response.body, HasSubstr(R"("reasoning":"Hmm","reasoning_content":"Hmm"})"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"stop")"));
}

TEST_F(ChatToolsTest, AnyReasoningEffortButNoneLetsTheModelThink) {
  CoordinatorSays("Hello");
  for (const char* effort : {"low", "high"}) {
    EXPECT_EQ(Chat(absl::StrCat(R"("reasoning_effort":")", effort, "\"")).status, 200);
    EXPECT_THAT(LastPrompt(), EndsWith("<｜Assistant｜><think>")) << effort;
  }
  for (const char* none :
       {R"("reasoning_effort":"none")", R"("reasoning_effort":null)",
        R"("reasoning_effort":"high","chat_template_kwargs":{"thinking":false})"}) {
    EXPECT_EQ(Chat(none).status, 200);
    EXPECT_THAT(LastPrompt(), EndsWith("<｜Assistant｜></think>")) << none;
  }
}

TEST_F(ChatToolsTest, AnAnswerThatIsAllThoughtsHasNoContent) {
  CoordinatorSays("Hmm, let me");
  const HttpResponse response =
      Chat(R"("chat_template_kwargs":{"enable_thinking":true},"max_tokens":4)");
  EXPECT_THAT(response.body, HasSubstr(R"("content":null,)"));
  EXPECT_THAT(response.body, HasSubstr(R"("reasoning_content":"Hm)"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"length")"));
}

TEST_F(ChatToolsTest, LeavesThoughtsOutIfAsked) {
  CoordinatorSays("Hmm</think>Hello");
  const HttpResponse response =
      Chat(R"("chat_template_kwargs":{"thinking":true},"include_reasoning":false)");
  EXPECT_THAT(response.body, HasSubstr(R"("content":"Hello",)"));
  EXPECT_THAT(response.body, HasSubstr(R"("reasoning":null,"reasoning_content":null})"));
}

TEST_F(ChatToolsTest, TellsTheModelOfToolsAndGivesItsCalls) {
  CoordinatorSays(absl::StrCat("Let me see.", kCall));
  const HttpResponse response = Chat(kTools);
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(LastPrompt(), HasSubstr("\n### get\nDescription: d\n\nParameters: {}\n"));
  EXPECT_THAT(response.body, HasSubstr(R"("content":"Let me see.",)"));
  EXPECT_THAT(response.body, HasSubstr(R"("tool_calls":[{"id":"chatcmpl-tool-)"));
  EXPECT_THAT(response.body,
              HasSubstr(R"(","type":"function","function":{"name":"get",)"
                        R"("arguments":"{\"a\": 1,\n \"b\": \"x\"}"}},{"id":"chatcmpl-tool-)"));
  EXPECT_THAT(response.body, HasSubstr(R"("function":{"name":"get","arguments":"{}"}}],)"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"tool_calls","stop_reason":null)"));
}

TEST_F(ChatToolsTest, StreamsCallsPieceByPiece) {
  CoordinatorSays(kCall);
  const std::string body = Chat(absl::StrCat(kTools, R"(,"stream":true)")).body;
  EXPECT_THAT(body, HasSubstr(R"("delta":{"tool_calls":[{"index":0,"id":"chatcmpl-tool-)"));
  EXPECT_THAT(body, HasSubstr(R"("delta":{"tool_calls":[{"index":0,"function":{"arguments":)"));
  EXPECT_THAT(body, HasSubstr(R"("delta":{"tool_calls":[{"index":1,"id":"chatcmpl-tool-)"));
  EXPECT_THAT(body, HasSubstr(R"("finish_reason":"tool_calls")"));
}

TEST_F(ChatToolsTest, OneCallIsEnoughIfAsked) {
  CoordinatorSays(kCall);
  const HttpResponse response = Chat(absl::StrCat(kTools, R"(,"parallel_tool_calls":false)"));
  EXPECT_THAT(response.body, HasSubstr(R"(\"x\"}"}}],)"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"tool_calls")"));
}

TEST_F(ChatToolsTest, WithoutToolsNothingIsACall) {
  CoordinatorSays(kCall);
  const HttpResponse response = Chat(absl::StrCat(kTools, R"(,"tool_choice":"none")"));
  EXPECT_THAT(LastPrompt(), Not(HasSubstr("### get")));
  EXPECT_THAT(response.body, HasSubstr(R"("content":"<｜tool▁calls▁begin｜>)"));
  EXPECT_THAT(response.body, HasSubstr(R"("tool_calls":[],)"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"stop")"));
}

TEST_F(ChatToolsTest, ACallThatIsCutShortSaysSo) {
  CoordinatorSays(kCall);
  const HttpResponse response = Chat(absl::StrCat(kTools, R"(,"max_tokens":8)"));
  EXPECT_THAT(response.body, HasSubstr(R"("function":{"name":"get","arguments":"{)"));
  EXPECT_THAT(response.body, HasSubstr(R"("finish_reason":"length")"));
}

TEST_F(ChatToolsTest, ACallThatAStopStringCutsEndsWithStop) {
  for (const char* choice : {R"("required")", R"("auto")"}) {
    const std::string ask = absl::StrCat(kTools, R"(,"tool_choice":)", choice);
    CoordinatorSays(kCall);
    const std::string cut = R"(,"stop":["\"b\""])";
    const std::string end = R"("finish_reason":"stop","stop_reason":"\"b\"")";
    const HttpResponse whole = Chat(ask + cut);
    EXPECT_THAT(whole.body, HasSubstr(R"("arguments":"{\"a\": 1,\n "}}])"));
    EXPECT_THAT(whole.body, HasSubstr(end));
    EXPECT_THAT(Chat(ask + cut + R"(,"stream":true)").body, HasSubstr(end));
    // Behind a call it cuts none.
    CoordinatorSays(absl::StrCat(kCall, "done"));
    const std::string behind = ask + R"(,"stop":["done"])";
    const std::string called = R"("finish_reason":"tool_calls","stop_reason":"done")";
    EXPECT_THAT(Chat(behind).body, HasSubstr(called));
    EXPECT_THAT(Chat(behind + R"(,"stream":true)").body, HasSubstr(called));
  }
}

TEST_F(ChatToolsTest, StopStringsCountInThoughtsAndMayEndAtATag) {
  CoordinatorSays("one two</think>three");
  const std::string thinking = R"("chat_template_kwargs":{"thinking":true},)";
  const HttpResponse within = Chat(thinking + R"("stop":["two"])");
  EXPECT_THAT(within.body, HasSubstr(R"("reasoning":"one ",)"));
  EXPECT_THAT(within.body, HasSubstr(R"("stop_reason":"two")"));
  const HttpResponse tag = Chat(thinking + R"("stop":["</think>"])");
  EXPECT_THAT(tag.body, HasSubstr(R"("content":null,)"));
  EXPECT_THAT(tag.body, HasSubstr(R"("reasoning":"one two",)"));
  EXPECT_THAT(tag.body, HasSubstr(R"("stop_reason":"</think>")"));
  // It begins within the tag: what is held back of the tag still ends the thoughts.
  const HttpResponse past = Chat(thinking + R"("stop":["nk>x"])");
  EXPECT_THAT(past.body, HasSubstr(R"("content":"three",)"));
  EXPECT_THAT(past.body, HasSubstr(R"("reasoning":"one two",)"));
}

TEST_F(ChatToolsTest, ContinuesAPrefix) {
  CoordinatorSays("4.");
  PostChat(R"({"messages":[{"role":"user","content":"2+2?"},)"
           R"({"role":"assistant","content":"It is ","prefix":true}]})");
  EXPECT_THAT(LastPrompt(), EndsWith("<｜User｜>2+2?<｜Assistant｜></think>It is "));
}

}  // namespace
}  // namespace fathom
