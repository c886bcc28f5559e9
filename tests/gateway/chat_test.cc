// POST /v1/chat/completions, /tokenize, /detokenize and the routes about the server itself.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kHello[] = R"("messages":[{"role":"user","content":"hi"}])";

class ChatTest : public GatewayTest {
 protected:
  // The prompt of the last call, as text.
  std::string LastPrompt() const {
    std::string text;
    const v1::GenerateRequest request = coordinator_.requests().back();
    for (const uint32_t id : request.prompt_token_ids()) {
      text += tokenizer_->BytesOf(id);
    }
    return text;
  }
};

TEST_F(ChatTest, AnswersAsDocumented) {
  CoordinatorSays("hello");
  const HttpResponse response = PostChat(std::string("{") + kHello + R"(,"model":"tiny"})");
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(
      Timeless(response.body),
      HasSubstr(
          R"({"id":"chatcmpl-test","object":"chat.completion","created":0,"model":"tiny",)"
          R"("choices":[{"index":0,"message":{"role":"assistant","content":"hello",)"
          R"("refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[],)"
          R"("reasoning":null,"reasoning_content":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,)"
          R"("token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{)"));
  EXPECT_THAT(response.body,
              HasSubstr(R"("prompt_tokens_details":{"cached_tokens":0}},"prompt_logprobs":null,)"
                        R"("prompt_token_ids":null,"kv_transfer_params":null})"));
}

TEST_F(ChatTest, EncodesTheMessagesAsTheModelWasTrained) {
  PostChat(R"({"messages":[{"role":"developer","content":"be kind"},)"
           R"({"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},)"
           R"({"role":"assistant","content":"c"},{"role":"user","content":"d"}]})");
  EXPECT_EQ(LastPrompt(),
            "<｜begin▁of▁sentence｜>be kind<｜User｜>a\nb<｜Assistant｜>c<｜end▁of▁sentence｜>"
            "<｜User｜>d<｜Assistant｜>");
}

TEST_F(ChatTest, MayUseTheWholeContextUnlessToldOtherwise) {
  PostChat(std::string("{") + kHello + "}");
  PostChat(std::string("{") + kHello + R"(,"max_tokens":7})");
  PostChat(std::string("{") + kHello + R"(,"max_tokens":7,"max_completion_tokens":5})");
  const std::vector<v1::GenerateRequest> requests = coordinator_.requests();
  EXPECT_FALSE(requests.at(0).has_max_tokens());
  EXPECT_EQ(requests.at(1).max_tokens(), 7u);
  EXPECT_EQ(requests.at(2).max_tokens(), 5u);
}

TEST_F(ChatTest, StreamsRolesThenDeltasThenUsageThenDone) {
  coordinator_.SetScript(Saying({Ids("a")[0], kEos}));
  const HttpResponse response =
      PostChat(std::string("{") + kHello + R"(,"stream":true,"stream_options":{}})");
  const std::string begin =
      R"({"id":"chatcmpl-test","object":"chat.completion.chunk","created":0,"model":"tiny",)"
      R"("choices":[)";
  const std::vector<std::string> events = EventsOf({200, {}, Timeless(response.body), {}});
  ASSERT_EQ(events.size(), 5u) << response.body;
  EXPECT_EQ(events[0], begin +
                           R"({"index":0,"delta":{"role":"assistant","content":""},)"
                           R"("logprobs":null,"finish_reason":null}],"prompt_token_ids":null})");
  EXPECT_EQ(events[1], begin + R"({"index":0,"delta":{"content":"a"},"logprobs":null,)"
                               R"("finish_reason":null,"token_ids":null}]})");
  EXPECT_EQ(events[2], begin + R"({"index":0,"delta":{"content":""},"logprobs":null,)"
                               R"("finish_reason":"stop","stop_reason":null,"token_ids":null}]})");
  EXPECT_THAT(events[3], HasSubstr(begin + R"(],"usage":{"prompt_tokens":)"));
  EXPECT_EQ(events[4], "[DONE]");
}

TEST_F(ChatTest, StreamsARoleForEveryChoiceFirst) {
  coordinator_.SetScript(Saying({Ids("a")[0], kEos}));
  const HttpResponse response = PostChat(std::string("{") + kHello + R"(,"stream":true,"n":3})");
  const std::vector<std::string> events = EventsOf(response);
  ASSERT_EQ(events.size(), 3u + 6u + 1u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(events[i], HasSubstr("\"index\":" + std::to_string(i) + ",\"delta\":{\"role\""));
  }
  for (int i = 3; i < 9; ++i) EXPECT_THAT(events[i], Not(HasSubstr("\"role\"")));
}

TEST_F(ChatTest, GivesLogprobsWithBytesAndTheBestTokens) {
  const uint32_t a = Ids("a")[0], b = Ids("b")[0];
  coordinator_.SetScript([=](const v1::GenerateRequest&, FakeStream& stream) {
    v1::GenerateResponse response;
    response.add_token_ids(b);
    v1::TokenLogprobs& logprobs = *response.add_logprobs();
    logprobs.set_token_id(b);
    logprobs.set_logprob(-2.5f);
    logprobs.set_rank(2);
    for (const uint32_t id : {a, b}) logprobs.add_top_token_ids(id);
    logprobs.add_top_logprobs(-0.125f);
    logprobs.add_top_logprobs(-std::numeric_limits<float>::infinity());
    response.set_finish_reason(v1::FINISH_REASON_LENGTH);
    stream.Send(response);
    return grpc::Status::OK;
  });
  const HttpResponse response =
      PostChat(std::string("{") + kHello + R"(,"logprobs":true,"top_logprobs":2})");
  EXPECT_THAT(response.body,
              HasSubstr(R"("logprobs":{"content":[{"token":"b","logprob":-2.5,"bytes":[98],)"
                        R"("top_logprobs":[{"token":"a","logprob":-0.125,"bytes":[97]},)"
                        R"({"token":"b","logprob":-9999.0,"bytes":[98]}]}]})"));
  EXPECT_EQ(coordinator_.requests().at(0).sampling().num_logprobs(), 2u);
}

TEST_F(ChatTest, ContinuesAndEchoesTheLastMessage) {
  CoordinatorSays(" there");
  const HttpResponse response = PostChat(
      R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}],)"
      R"("add_generation_prompt":false,"continue_final_message":true,"echo":true})");
  EXPECT_THAT(response.body, HasSubstr(R"("content":"hello there")")) << response.body;
  EXPECT_THAT(LastPrompt(), ::testing::EndsWith("<｜Assistant｜>hello"));
}

TEST_F(ChatTest, AcceptsToolsThatMayNotBeCalled) {
  const std::string tools = R"(,"tools":[{"type":"function","function":{"name":"f"}}])";
  EXPECT_EQ(PostChat(std::string("{") + kHello + tools + R"(,"tool_choice":"none"})").status, 200);
  const HttpResponse refused = PostChat(std::string("{") + kHello + tools + "}");
  EXPECT_EQ(refused.status, 400);
  EXPECT_THAT(refused.body, HasSubstr("has no tokens for tool calls"));
}

TEST_F(ChatTest, TokenizesTextAndChatsAndBack) {
  const std::vector<uint32_t> ids = Ids("a b");
  ASSERT_EQ(ids.size(), 2u);
  const std::string list = std::to_string(ids[0]) + "," + std::to_string(ids[1]);
  EXPECT_EQ(Ask(Post("/tokenize", R"({"prompt":"a b","add_special_tokens":false})")).body,
            R"({"count":2,"max_model_len":128,"tokens":[)" + list + R"(],"token_strs":null})");
  EXPECT_EQ(Ask(Post("/tokenize", R"({"prompt":"a b","return_token_strs":true})")).body,
            R"({"count":3,"max_model_len":128,"tokens":[0,)" + list +
                R"(],"token_strs":["<｜begin▁of▁sentence｜>","a","Ġb"]})");
  EXPECT_THAT(Ask(Post("/tokenize", std::string("{") + kHello + "}")).body,
              HasSubstr("\"tokens\":[0,508,"));
  EXPECT_EQ(Ask(Post("/detokenize", R"({"tokens":[0,)" + list + "]}")).body,
            R"({"prompt":"<｜begin▁of▁sentence｜>a b"})");
}

TEST_F(ChatTest, RefusesToTokenizeATextAndAChatAtOnce) {
  const HttpResponse refused =
      Ask(Post("/tokenize", std::string(R"({"prompt":"a b",)") + kHello + "}"));
  EXPECT_EQ(refused.status, 400);
  EXPECT_THAT(refused.body, HasSubstr("prompt and messages cannot both be given"));
}

TEST_F(ChatTest, ListsTheModelUnderAllItsNames) {
  options_.model.names = {"tiny", "org/other"};
  const HttpResponse list = Ask(Get("/v1/models"));
  EXPECT_THAT(Timeless(list.body),
              HasSubstr(R"({"object":"list","data":[{"id":"tiny","object":"model","created":0,)"
                        R"("owned_by":"fathom","root":"/models/tiny","parent":null,)"
                        R"("max_model_len":128,"permission":[{"id":"modelperm-)"));
  EXPECT_THAT(list.body, HasSubstr(R"({"id":"org/other",)"));
  EXPECT_THAT(Ask(Get("/v1/models/org%2Fother")).body, HasSubstr(R"({"id":"org/other",)"));
  const HttpResponse unknown = Ask(Get("/v1/models/nobody"));
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(unknown.body, R"({"error":{"message":"The model `nobody` does not exist.",)"
                          R"("type":"NotFoundError","param":"model","code":404}})");
  EXPECT_EQ(PostCompletion(R"({"model":"org/other","prompt":[5]})").status, 200);
  EXPECT_EQ(PostCompletion(R"({"model":"nobody","prompt":[5]})").status, 404);
}

TEST_F(ChatTest, SaysItIsHealthyOnlyWhileStepsCanBeMade) {
  EXPECT_EQ(Ask(Get("/health")).status, 200);
  EXPECT_EQ(Ask(Get("/health")).body, "");
  coordinator_.SetServing(false);
  EXPECT_EQ(Ask(Get("/health")).status, 503);
  EXPECT_EQ(Ask(Get("/ping")).status, 503);
  EXPECT_EQ(Ask(Get("/live")).status, 200);
  coordinator_.SetServing(true);
  EXPECT_EQ(Ask(Get("/health")).status, 200);
}

TEST_F(ChatTest, JoinsItsMetricsWithTheCoordinators) {
  PostCompletion(R"({"prompt":[5]})");
  const HttpResponse response = Ask(Get("/metrics"));
  EXPECT_THAT(response.headers.at("content-type"), HasSubstr("text/plain; version=0.0.4"));
  for (const char* line :
       {R"(vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 1)",
        R"(vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 1)",
        R"(vllm:inter_token_latency_seconds_count{engine="0",model_name="tiny"} 2)",
        R"(vllm:request_generation_tokens_sum{engine="0",model_name="tiny"} 3)",
        R"(http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1)",
        R"(vllm:num_requests_running{model_name="tiny"} 3)"}) {
    EXPECT_THAT(response.body, HasSubstr(line));
  }
}

TEST_F(ChatTest, SaysItsVersion) { EXPECT_EQ(Ask(Get("/version")).body, R"({"version":"1.2.3"})"); }

TEST_F(ChatTest, TakesSamplingDefaultsFromTheCheckpoint) {
  char folder[] = "/tmp/fathom-generation-config-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  options_.model_dir = folder;
  const std::string path = std::string(folder) + "/generation_config.json";
  FILE* file = fopen(path.c_str(), "w");
  fputs(R"({"temperature":0.25,"top_p":0.5,"do_sample":true,"eos_token_id":1})", file);
  fclose(file);
  PostCompletion(R"({"prompt":[5]})");
  PostCompletion(R"({"prompt":[5],"temperature":0.75})");
  const std::vector<v1::GenerateRequest> requests = coordinator_.requests();
  EXPECT_EQ(requests.at(0).sampling().temperature(), 0.25f);
  EXPECT_EQ(requests.at(0).sampling().top_p(), 0.5f);
  EXPECT_EQ(requests.at(1).sampling().temperature(), 0.75f);
  remove(path.c_str());
  rmdir(folder);
}

}  // namespace
}  // namespace fathom
