// POST /v1/responses and /v1/messages: the same chat in the words of other APIs.
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"
#include "tests/gateway/named_events.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class DialectsTest : public GatewayTest {
 protected:
  HttpResponse PostResponses(std::string_view json) { return Ask(Post("/v1/responses", json)); }
  HttpResponse PostMessages(std::string_view json) { return Ask(Post("/v1/messages", json)); }

  std::string LastPrompt() {
    const v1::GenerateRequest sent = coordinator_.requests().back();
    std::string text;
    for (const uint32_t id : sent.prompt_token_ids()) absl::StrAppend(&text, id, " ");
    return text;
  }
};

TEST_F(DialectsTest, AResponseIsAsDocumented) {
  CoordinatorSays("hi");
  const size_t num_tokens = Ids("hi").size() + 1;
  const HttpResponse response = PostResponses(
      R"({"model":"tiny","input":"hello","instructions":"be brief","max_output_tokens":20,)"
      R"("temperature":0.5,"metadata":{"a":"b"},"user":"me","store":true})");
  ASSERT_EQ(response.status, 200) << response.body;
  const std::string prompt_tokens =
      absl::StrCat(coordinator_.requests().at(0).prompt_token_ids_size());
  EXPECT_THAT(response.body, HasSubstr(R"({"id":"resp_test","object":"response","created_at":)"));
  EXPECT_THAT(
      response.body,
      HasSubstr(absl::StrCat(
          R"("status":"completed","background":false,"error":null,"incomplete_details":null,)"
          R"("instructions":"be brief","max_output_tokens":20,"model":"tiny","output":[)"
          R"({"id":"msg_test_0","type":"message","status":"completed","role":"assistant","content":[)"
          R"({"type":"output_text","text":"hi","annotations":[],"logprobs":[]}]}],)"
          R"("parallel_tool_calls":true,"previous_response_id":null,)"
          R"("reasoning":{"effort":null,"summary":null},"service_tier":null,"store":false,)"
          R"("temperature":0.5,"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":[],)"
          R"("top_logprobs":0,"top_p":1.0,"truncation":"disabled","usage":{"input_tokens":)",
          prompt_tokens, R"(,"input_tokens_details":{"cached_tokens":0},"output_tokens":)",
          num_tokens, R"(,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":)")));
  EXPECT_THAT(response.body, HasSubstr(R"("user":"me","metadata":{"a":"b"}})"));
}

TEST_F(DialectsTest, AllDialectsMakeTheSamePromptOfAChat) {
  ASSERT_EQ(PostChat(R"({"messages":[{"role":"system","content":"be brief"},)"
                     R"({"role":"user","content":"a"},{"role":"assistant","content":"b"},)"
                     R"({"role":"user","content":"c"}]})")
                .status,
            200);
  const std::string expected = LastPrompt();
  ASSERT_EQ(PostResponses(
                R"({"instructions":"be brief","input":[{"role":"user","content":"a"},)"
                R"({"type":"message","role":"assistant","content":[{"type":"output_text",)"
                R"("text":"b"}]},{"role":"user","content":[{"type":"input_text","text":"c"}]}]})")
                .status,
            200);
  EXPECT_EQ(LastPrompt(), expected);
  ASSERT_EQ(
      PostMessages(R"({"max_tokens":9,"system":[{"type":"text","text":"be brief"}],)"
                   R"("messages":[{"role":"user","content":"a"},{"role":"assistant",)"
                   R"("content":[{"type":"text","text":"b"}]},{"role":"user","content":"c"}]})")
          .status,
      200);
  EXPECT_EQ(LastPrompt(), expected);
}

TEST_F(DialectsTest, AResponsesTextMayHaveAFormat) {
  coordinator_.SetScript(Saying({Ids("a")[0]}, v1::FINISH_REASON_STOP));
  const std::string format = R"({"type":"json_schema","name":"n","schema":{"type":"null"}})";
  const HttpResponse response =
      PostResponses(absl::StrCat(R"({"input":"x","text":{"format":)", format, "}}"));
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(response.body, HasSubstr(absl::StrCat(R"("text":{"format":)", format, "}")));
  const v1::Grammar grammar = coordinator_.requests().back().sampling().grammar();
  EXPECT_EQ(grammar.kind(), v1::Grammar::KIND_JSON_SCHEMA);
  EXPECT_EQ(grammar.text(), R"({"type":"null"})");
}

TEST_F(DialectsTest, AStreamedResponseTellsItsLifeInNumberedEvents) {
  coordinator_.SetScript(Saying({Ids("a")[0], Ids("b")[0]}, v1::FINISH_REASON_LENGTH));
  const HttpResponse response =
      PostResponses(R"({"input":"x","stream":true,"max_output_tokens":2})");
  EXPECT_EQ(response.status, 200);
  const NamedEvents events = EventsWithNames(response);
  ASSERT_THAT(NamesOf(events),
              ElementsAre("response.created", "response.in_progress", "response.output_item.added",
                          "response.content_part.added", "response.output_text.delta",
                          "response.output_text.delta", "response.output_text.done",
                          "response.content_part.done", "response.output_item.done",
                          "response.incomplete"));
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_THAT(events[i].second, HasSubstr(absl::StrCat("\"sequence_number\":", i, ",")));
  }
  EXPECT_THAT(events[0].second, HasSubstr(R"("status":"in_progress")"));
  EXPECT_EQ(events[4].second,
            R"({"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_test_0",)"
            R"("output_index":0,"content_index":0,"delta":"a","logprobs":[]})");
  EXPECT_THAT(events[6].second, HasSubstr(R"("text":"ab")"));
  EXPECT_THAT(events[9].second,
              HasSubstr(R"("incomplete_details":{"reason":"max_output_tokens"})"));
  EXPECT_THAT(events[9].second, HasSubstr(R"("output_tokens":2)"));
}

TEST_F(DialectsTest, AResponseHasLogprobsWhenTheyAreIncluded) {
  coordinator_.SetScript(Saying({Ids("a")[0]}, v1::FINISH_REASON_LENGTH));
  const HttpResponse response =
      PostResponses(R"({"input":"x","max_output_tokens":1,"top_logprobs":1,)"
                    R"("include":["message.output_text.logprobs"]})");
  EXPECT_THAT(response.body, HasSubstr(R"("logprobs":[{"token":"a","logprob":-0.5,)"));
}

TEST_F(DialectsTest, AResponseReadsTheEndOfAnInputThatDoesNotFitIfItMay) {
  CoordinatorSays("hi");
  std::string input;
  for (int i = 0; i < 200; ++i) input += "a b ";
  const std::string request = absl::StrCat(R"("max_output_tokens":100,"input":")", input, R"("})");
  HttpResponse response = PostResponses(R"({"truncation":"disabled",)" + request);
  EXPECT_EQ(response.status, 400);
  EXPECT_THAT(response.body, HasSubstr("context length is only 128"));
  response = PostResponses(R"({"truncation":"auto",)" + request);
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(response.body, HasSubstr(R"("truncation":"auto")"));
  EXPECT_EQ(coordinator_.requests().at(0).prompt_token_ids_size(), 28);
}

TEST_F(DialectsTest, AResponseMayAskForMoreThanThisServerHas) {
  EXPECT_EQ(PostResponses(R"({"input":"x","include":["reasoning.encrypted_content"]})").status,
            200);
}

TEST_F(DialectsTest, WhatAResponseCannotBeIsRefused) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({})", "input must be a string or a list of items"},
      {R"({"input":[]})", "at least one item"},
      {R"({"input":[{"type":"image"}]})", "items of type 'image' are not supported"},
      {R"({"input":[{"role":"robot","content":"x"}]})", "got 'robot'"},
      {R"({"input":[{"role":"user","content":[{"type":"input_image"}]}]})",
       "parts of type 'input_image' are not supported"},
      {R"({"input":"x","previous_response_id":"resp_1"})", "this server keeps no responses"},
      {R"({"input":"x","background":true})", "this server keeps no responses"},
      {R"({"input":"x","max_output_tokens":0})", "max_output_tokens must be at least 1, got 0."},
      {R"({"input":"x","temperature":-1})", "temperature must be non-negative"},
      {R"({"input":"x","text":{"format":{"type":"grammar"}}})", "is not supported yet"},
      {R"({"input":"x","text":{"format":{"type":"json_schema"}}})",
       "text.format.schema must be a JSON schema"},
      {R"({"input":"x","guided_choice":["a"],"text":{"format":{"type":"json_object"}}})",
       "got guided_choice and text.format"},
      {R"({"input":"x","top_logprobs":21})", "top_logprobs must be in [0, 20]"},
      {R"({"input":"x","tools":[{"type":"web_search"}]})",
       "only tools of type 'function' are supported"},
      {R"({"input":"x","tools":[{"type":"function"}]})", "tools[0].name must be a string"},
      {R"({"input":"x","tool_choice":"auto"})", "`tools` must be set"},
      {R"({"input":"x","tools":[{"type":"function","name":"f"}],"tool_choice":"required"})",
       "no tokens for tool calls"},
      {R"({"input":"x","tools":[{"type":"function","name":"f"}],)"
       R"("include":["message.output_text.logprobs"]})",
       "not supported with tools"},
      {R"({"input":"x","store":"no"})", "store must be true or false, got a string."},
      {R"({"input":"x","truncation":7})", "truncation must be a string, got a number."},
      {R"({"input":"x","truncation":"a bit"})", "truncation must be auto or disabled, got 'a bit'"},
      {R"({"input":"x","include":["x"]})", "include: 'x' is not known, expected message.output"},
      {R"({"input":"x","top_logprobs":5})", "include must have message.output_text.logprobs"},
      {R"({"input":"x","text":{"verbosity":7}})", "text.verbosity must be a string"},
      {R"({"input":"x","reasoning":{"effort":"a bit"}})", "reasoning.effort must be none, minimal"},
      {R"({"input":"x","conversation":"c"})", "this server keeps no responses"},
      {R"({"input":"x","metadata":7})", "metadata must be an object"}};
  for (const auto& [json, message] : cases) {
    const HttpResponse response = PostResponses(json);
    EXPECT_EQ(response.status, 400) << json;
    EXPECT_THAT(response.body, HasSubstr(message));
    EXPECT_THAT(response.body, StartsWith(R"({"error":{"message":)"));
  }
}

TEST_F(DialectsTest, AMessageIsAsDocumented) {
  CoordinatorSays("hi");
  const HttpResponse response =
      PostMessages(R"({"model":"tiny","max_tokens":9,"messages":[{"role":"user","content":"x"}]})");
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.body,
            absl::StrCat(
                R"({"id":"msg_test","type":"message","role":"assistant","model":"tiny","content":)"
                R"([{"type":"text","text":"hi"}],"stop_reason":"end_turn","stop_sequence":null,)"
                R"("usage":{"input_tokens":)",
                coordinator_.requests().at(0).prompt_token_ids_size(),
                R"(,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":)",
                Ids("hi").size() + 1, "}}"));
}

TEST_F(DialectsTest, AMessageSaysWhatStoppedIt) {
  coordinator_.SetScript(Saying(Ids("abc"), v1::FINISH_REASON_LENGTH));
  EXPECT_THAT(PostMessages(R"({"max_tokens":9,"messages":[{"role":"user","content":"x"}]})").body,
              HasSubstr(R"("stop_reason":"max_tokens","stop_sequence":null)"));
  EXPECT_THAT(PostMessages(R"({"max_tokens":9,"stop_sequences":["b"],"messages":)"
                           R"([{"role":"user","content":"x"}]})")
                  .body,
              HasSubstr(R"("text":"a"}],"stop_reason":"stop_sequence","stop_sequence":"b")"));
}

TEST_F(DialectsTest, AStreamedMessageTellsItsLifeInEvents) {
  coordinator_.SetScript(Saying({Ids("a")[0], Ids("b")[0]}, v1::FINISH_REASON_LENGTH));
  const NamedEvents events = EventsWithNames(
      PostMessages(R"({"max_tokens":2,"stream":true,"messages":[{"role":"user","content":"x"}]})"));
  ASSERT_THAT(NamesOf(events), ElementsAre("message_start", "content_block_start",
                                           "content_block_delta", "content_block_delta",
                                           "content_block_stop", "message_delta", "message_stop"));
  EXPECT_THAT(events[0].second, HasSubstr(R"("content":[],"stop_reason":null)"));
  EXPECT_EQ(events[2].second,
            R"({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}})");
  EXPECT_THAT(events[5].second, HasSubstr(R"("delta":{"stop_reason":"max_tokens",)"));
  EXPECT_THAT(events[5].second, HasSubstr(R"("output_tokens":2})"));
  EXPECT_EQ(events[6].second, R"({"type":"message_stop"})");
}

TEST_F(DialectsTest, AMessagesErrorsAreInItsOwnWords) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({"messages":[{"role":"user","content":"x"}]})", "max_tokens must be an integer"},
      {R"({"max_tokens":9})", "messages must be a list of messages"},
      {R"({"max_tokens":9,"messages":[]})", "at least one message"},
      {R"({"max_tokens":9,"messages":[{"role":"system","content":"x"}]})", "got 'system'"},
      {R"({"max_tokens":9,"messages":[{"role":"user","content":[{"type":"image"}]}]})",
       "blocks of type 'image' are not supported here"},
      {R"({"max_tokens":9,"tools":[{"name":"f","type":"bash_20250124"}],)"
       R"("messages":[{"role":"user","content":"x"}]})",
       "only tools of type 'custom' are supported"},
      {R"({"max_tokens":9,"tools":[{"name":"f","input_schema":7}],)"
       R"("messages":[{"role":"user","content":"x"}]})",
       "tools[0].input_schema must be an object"},
      {R"({"max_tokens":9,"tools":[{"name":"f"}],"tool_choice":{"type":"tool","name":"g"},)"
       R"("messages":[{"role":"user","content":"x"}]})",
       "does not match any of the specified `tools`"},
      {R"({"max_tokens":9,"tool_choice":"auto","messages":[{"role":"user","content":"x"}]})",
       "tool_choice must be a JSON object"},
      {R"({"max_tokens":9,"thinking":{},"messages":[{"role":"user","content":"x"}]})",
       "thinking.type must be a string"},
      {R"({"max_tokens":9,"thinking":{"type":"bogus"},"messages":[{"role":"user","content":"x"}]})",
       "thinking.type must be enabled, adaptive or disabled, got 'bogus'."},
      {R"({"max_tokens":9,"output_config":{"format":{"type":"json_schema","schema":{}}},)"
       R"("messages":[{"role":"user","content":"x"}]})",
       "output_config.format is not supported yet"},
      {R"({"max_tokens":9,"metadata":7,"messages":[{"role":"user","content":"x"}]})",
       "metadata must be an object, got a number."},
      {R"({"max_tokens":9,"mcp_servers":[{}],"messages":[{"role":"user","content":"x"}]})",
       "mcp_servers is not supported: offer the model tools of your own"},
      {R"({"max_tokens":9,"stop_sequences":[""],"messages":[{"role":"user","content":"x"}]})",
       "stop_sequences cannot contain an empty string."}};
  for (const auto& [json, message] : cases) {
    const HttpResponse response = PostMessages(json);
    EXPECT_EQ(response.status, 400) << json;
    EXPECT_THAT(
        response.body,
        StartsWith(R"({"type":"error","error":{"type":"invalid_request_error","message":)"));
    EXPECT_THAT(response.body, HasSubstr(message));
  }
  const HttpResponse unknown = PostMessages(
      R"({"model":"other","max_tokens":9,"messages":[{"role":"user","content":"x"}]})");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_THAT(unknown.body, HasSubstr(R"("error":{"type":"not_found_error")"));
}

TEST_F(DialectsTest, AStreamThatBreaksEndsWithAnErrorEvent) {
  coordinator_.SetScript([this](const v1::GenerateRequest&, FakeStream& stream) {
    stream.SendTokens({Ids("a")[0]});
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "worker 3 was lost");
  });
  for (const auto& [path, json] : std::vector<std::pair<std::string, std::string>>{
           {"/v1/responses", R"({"input":"x","stream":true})"},
           {"/v1/messages",
            R"({"max_tokens":9,"stream":true,"messages":[{"role":"user","content":"x"}]})"}}) {
    const NamedEvents events = EventsWithNames(Ask(Post(path, json)));
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.back().first, "error");
    EXPECT_THAT(events.back().second, HasSubstr("worker 3 was lost"));
  }
}

TEST_F(DialectsTest, CountsTheTokensOfAMessage) {
  const std::string messages = R"("messages":[{"role":"user","content":"hello"}])";
  ASSERT_EQ(PostMessages(absl::StrCat("{\"max_tokens\":1,", messages, "}")).status, 200);
  const HttpResponse response =
      Ask(Post("/v1/messages/count_tokens", absl::StrCat("{", messages, "}")));
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.body,
            absl::StrCat(
                "{\"input_tokens\":", coordinator_.requests().at(0).prompt_token_ids_size(), "}"));
}

}  // namespace
}  // namespace fathom
