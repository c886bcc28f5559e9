// POST /v1/responses and /v1/messages for models that think and call tools.
#include <regex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "tests/gateway/named_events.h"
#include "tests/gateway/tool_model_fixture.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kOutput[] =
    "Hm</think>Hi<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{\"a\":1}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>";

class DialectToolsTest : public ToolModelTest {
 protected:
  // Asks with the tool `get`, thinking.
  HttpResponse AskResponses(const std::string& more = "") {
    return Ask(Post("/v1/responses",
                    absl::StrCat(R"({"input":"x","reasoning":{"effort":"low"},"tools":[{"type":)",
                                 R"("function","name":"get","description":"d","parameters":{)",
                                 R"("type":"object"},"strict":true}])", more, "}")));
  }
  HttpResponse AskMessages(const std::string& more = "") {
    return Ask(
        Post("/v1/messages",
             absl::StrCat(R"({"max_tokens":99,"thinking":{"type":"enabled"},"tools":[{)",
                          R"("name":"get","description":"d","input_schema":{"type":)",
                          R"("object"}}],"messages":[{"role":"user","content":"x"}])", more, "}")));
  }

  // With the random part of calls' ids as X.
  static std::string Nameless(const std::string& body) {
    static const std::regex kIds("(call|toolu)_[0-9a-f]{24}");
    return std::regex_replace(body, kIds, "$1_X");
  }
};

TEST_F(DialectToolsTest, AResponseHasThoughtsTextAndCallsAsItems) {
  CoordinatorSays(kOutput);
  const HttpResponse response =
      AskResponses(R"(,"tool_choice":"auto","parallel_tool_calls":false)");
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(
      Nameless(response.body),
      HasSubstr(
          R"("output":[{"id":"rs_test_0","type":"reasoning","status":"completed","summary":[],)"
          R"("encrypted_content":null,"content":[{"type":"reasoning_text","text":"Hm"}]},)"
          R"({"id":"msg_test_1","type":"message","status":"completed","role":"assistant",)"
          R"("content":[{"type":"output_text","text":"Hi","annotations":[],"logprobs":[]}]},)"
          R"({"id":"fc_test_2","type":"function_call","status":"completed","call_id":"call_X",)"
          R"("name":"get","arguments":"{\"a\":1}"}],"parallel_tool_calls":false)"));
  EXPECT_THAT(response.body,
              HasSubstr(R"("tool_choice":"auto","tools":[{"type":"function","name":"get",)"
                        R"("description":"d","parameters":{"type":"object"},"strict":true}])"));
  EXPECT_THAT(response.body,
              HasSubstr(absl::StrCat("\"reasoning_tokens\":", Ids("Hm").size() + 1)));
  EXPECT_THAT(LastPrompt(),
              HasSubstr("### get\nDescription: d\n\nParameters: {\"type\": \"object\"}"));
  EXPECT_THAT(LastPrompt(), EndsWith("<think>"));
}

TEST_F(DialectToolsTest, AStreamedResponseTellsTheLifeOfEachItem) {
  CoordinatorSays(kOutput);
  const NamedEvents events = EventsWithNames(AskResponses(R"(,"stream":true)"));
  std::vector<std::string> kinds;  // without repetition
  for (const std::string& name : NamesOf(events)) {
    if (kinds.empty() || kinds.back() != name) kinds.push_back(name);
  }
  EXPECT_THAT(
      kinds,
      ElementsAre("response.created", "response.in_progress", "response.output_item.added",
                  "response.content_part.added", "response.reasoning_text.delta",
                  "response.reasoning_text.done", "response.content_part.done",
                  "response.output_item.done", "response.output_item.added",
                  "response.content_part.added", "response.output_text.delta",
                  "response.output_text.done", "response.content_part.done",
                  "response.output_item.done", "response.output_item.added",
                  "response.function_call_arguments.delta", "response.function_call_arguments.done",
                  "response.output_item.done", "response.completed"));
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_THAT(events[i].second, HasSubstr(absl::StrCat("\"sequence_number\":", i, ",")));
  }
  std::string all;
  for (const auto& [name, data] : events) absl::StrAppend(&all, Nameless(data), "\n");
  EXPECT_THAT(all, HasSubstr(R"("output_index":2,"item":{"id":"fc_test_2","type":"function_call",)"
                             R"("status":"in_progress","call_id":"call_X","name":"get",)"
                             R"("arguments":""}})"));
  EXPECT_THAT(all, HasSubstr(R"("item_id":"fc_test_2","output_index":2,"name":"get",)"
                             R"("arguments":"{\"a\":1}"})"));
  EXPECT_THAT(all, HasSubstr(R"("item_id":"rs_test_0","output_index":0,"content_index":0,)"
                             R"("part":{"type":"reasoning_text","text":""}})"));
}

TEST_F(DialectToolsTest, OnlyTheItemThatTheLimitCutIsIncomplete) {
  std::vector<uint32_t> ids = Ids(kOutput);
  ids.resize(ids.size() - 3);
  coordinator_.SetScript(Saying(ids, v1::FINISH_REASON_LENGTH));
  const std::string whole = AskResponses().body;
  EXPECT_THAT(whole, HasSubstr(R"("type":"message","status":"completed")"));
  EXPECT_THAT(whole, HasSubstr(R"("type":"function_call","status":"incomplete")"));
  const NamedEvents events = EventsWithNames(AskResponses(R"(,"stream":true)"));
  EXPECT_EQ(events.back().first, "response.incomplete");
  EXPECT_THAT(events[events.size() - 2].second, HasSubstr(R"("status":"incomplete")"));
}

TEST_F(DialectToolsTest, AMessageHasThoughtsTextAndCallsAsBlocks) {
  CoordinatorSays(kOutput);
  const HttpResponse response = AskMessages();
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(Nameless(response.body),
              HasSubstr(R"("content":[{"type":"thinking","thinking":"Hm","signature":""},)"
                        R"({"type":"text","text":"Hi"},{"type":"tool_use","id":"toolu_X",)"
                        R"("name":"get","input":{"a":1}}],"stop_reason":"tool_use")"));
  EXPECT_THAT(LastPrompt(),
              HasSubstr("### get\nDescription: d\n\nParameters: {\"type\": \"object\"}"));
  EXPECT_THAT(LastPrompt(), EndsWith("<think>"));
}

TEST_F(DialectToolsTest, AStreamedMessageTellsTheLifeOfEachBlock) {
  coordinator_.SetScript(Saying(Ids(kOutput)));
  const NamedEvents events = EventsWithNames(AskMessages(R"(,"stream":true)"));
  std::vector<std::string> kinds;
  std::string all;
  for (const std::string& name : NamesOf(events)) {
    if (kinds.empty() || kinds.back() != name) kinds.push_back(name);
  }
  for (const auto& [name, data] : events) absl::StrAppend(&all, Nameless(data), "\n");
  EXPECT_THAT(kinds, ElementsAre("message_start", "content_block_start", "content_block_delta",
                                 "content_block_stop", "content_block_start", "content_block_delta",
                                 "content_block_stop", "content_block_start", "content_block_delta",
                                 "content_block_stop", "message_delta", "message_stop"));
  EXPECT_THAT(all, HasSubstr(R"("index":0,"content_block":{"type":"thinking","thinking":"",)"
                             R"("signature":""}})"));
  EXPECT_THAT(all, HasSubstr(R"("delta":{"type":"thinking_delta","thinking":"H)"));
  EXPECT_THAT(all, HasSubstr(R"("index":2,"content_block":{"type":"tool_use","id":"toolu_X",)"
                             R"("name":"get","input":{}}})"));
  EXPECT_THAT(all, HasSubstr(R"("delta":{"type":"input_json_delta","partial_json":"{)"));
  EXPECT_THAT(all, HasSubstr(R"("stop_reason":"tool_use")"));
}

TEST_F(DialectToolsTest, ArgumentsThatAreNoObjectAreNotLost) {
  CoordinatorSays(absl::StrReplaceAll(kOutput, {{"{\"a\":1}", "{\"a\":"}}));
  EXPECT_THAT(AskMessages().body, HasSubstr(R"("input":{"INVALID_JSON":"{\"a\":"})"));
}

TEST_F(DialectToolsTest, WithoutToolsWhatLooksLikeACallIsText) {
  CoordinatorSays(kOutput);
  EXPECT_THAT(AskMessages(R"(,"tool_choice":{"type":"none"})").body,
              HasSubstr(R"("type":"text","text":"Hi<｜tool▁calls▁begin｜>)"));
  EXPECT_THAT(LastPrompt(), Not(HasSubstr("### get")));
  EXPECT_THAT(AskResponses(R"(,"tool_choice":"none")").body,
              HasSubstr(R"("text":"Hi<｜tool▁calls▁begin｜>)"));
}

TEST_F(DialectToolsTest, CallsAndResultsComeBackAsTheSamePromptInEveryDialect) {
  const std::string tools =
      "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"get\","
      "\"description\":\"d\",\"parameters\":{\"type\":\"object\"}}}]";
  ASSERT_EQ(PostChat(absl::StrCat(
                         R"({"messages":[{"role":"user","content":"x"},{"role":"assistant",)",
                         R"("content":"Hi","tool_calls":[{"id":"c","type":"function","function":)",
                         R"({"name":"get","arguments":"{\"a\": 1}"}}]},{"role":"tool",)",
                         R"("tool_call_id":"c","content":"7"}],)", tools, "}"))
                .status,
            200);
  const std::string expected = LastPrompt();
  EXPECT_THAT(expected, HasSubstr("{\"a\": 1}"));
  const HttpResponse response = Ask(Post(
      "/v1/responses",
      R"({"input":[{"role":"user","content":"x"},{"type":"reasoning","summary":[],"content":)"
      R"([{"type":"reasoning_text","text":"Hm"}]},{"role":"assistant","content":"Hi"},{"type":)"
      R"("function_call","call_id":"c","name":"get","arguments":"{\"a\": 1}"},{"type":)"
      R"("function_call_output","call_id":"c","output":"7"}],"tools":[{"type":"function",)"
      R"("name":"get","description":"d","parameters":{"type":"object"}}]})"));
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(LastPrompt(), expected);
  const HttpResponse message = Ask(
      Post("/v1/messages",
           R"({"max_tokens":9,"messages":[{"role":"user","content":"x"},{"role":"assistant",)"
           R"("content":[{"type":"thinking","thinking":"Hm","signature":""},{"type":"text",)"
           R"("text":"Hi"},{"type":"tool_use","id":"c","name":"get","input":{"a":1}}]},)"
           R"({"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":"7"}]}],)"
           R"("tools":[{"name":"get","description":"d","input_schema":{"type":"object"}}]})"));
  ASSERT_EQ(message.status, 200) << message.body;
  EXPECT_EQ(LastPrompt(), expected);
}

}  // namespace
}  // namespace fathom
