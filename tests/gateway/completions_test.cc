// POST /v1/completions, byte for byte.
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

class CompletionsTest : public GatewayTest {};

TEST_F(CompletionsTest, AnswersTokenIdsWithTextAsDocumented) {
  CoordinatorSays("hello");
  const HttpResponse response = PostCompletion(R"({"model":"tiny","prompt":[5,6,7]})");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
  const size_t num_tokens = Ids("hello").size() + 1;
  EXPECT_EQ(Timeless(response.body),
            R"({"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":)"
            R"([{"index":0,"text":"hello","logprobs":null,"finish_reason":"stop",)"
            R"("stop_reason":null,"token_ids":null,"prompt_logprobs":null,)"
            R"("prompt_token_ids":null}],"service_tier":null,"system_fingerprint":null,)"
            R"("usage":{"prompt_tokens":3,"total_tokens":)" +
                std::to_string(3 + num_tokens) + R"(,"completion_tokens":)" +
                std::to_string(num_tokens) +
                R"(,"prompt_tokens_details":{"cached_tokens":0}},"kv_transfer_params":null})");
}

TEST_F(CompletionsTest, StreamsOneEventPerTokenThenUsageThenDone) {
  coordinator_.SetScript(Saying({Ids("a")[0], Ids("b")[0]}, v1::FINISH_REASON_LENGTH));
  const HttpResponse response =
      PostCompletion(R"({"prompt":[5],"stream":true,"stream_options":{"include_usage":true}})");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
  EXPECT_THAT(
      EventsOf({200, {}, Timeless(response.body), {}}),
      ElementsAre(
          R"({"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":)"
          R"([{"index":0,"text":"a","logprobs":null,"finish_reason":null,"stop_reason":null,)"
          R"("prompt_token_ids":null,"token_ids":null}],"usage":null})",
          R"({"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":)"
          R"([{"index":0,"text":"b","logprobs":null,"finish_reason":"length","stop_reason":null,)"
          R"("prompt_token_ids":null,"token_ids":null}],"usage":null})",
          R"({"id":"cmpl-test","object":"text_completion","created":0,"model":"tiny","choices":)"
          R"([],"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2,)"
          R"("prompt_tokens_details":{"cached_tokens":0}}})",
          "[DONE]"));
  // Clients decode each piece they receive by itself: no event may be cut.
  for (const std::string& chunk : response.chunks) EXPECT_TRUE(chunk.ends_with("\n\n")) << chunk;
}

TEST_F(CompletionsTest, SaysHowManyTokensWereFoundEvenWhenAStopStringEndsIt) {
  coordinator_.SetScript([this](const v1::GenerateRequest& request, FakeStream& stream) {
    v1::GenerateResponse first;
    first.add_token_ids(Ids("a")[0]);
    first.mutable_usage()->set_cached_tokens(request.request_id().ends_with("-0") ? 2 : 99);
    stream.Send(first);
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  const HttpResponse response =
      PostCompletion(R"({"prompt":[5,6,7],"n":2,"stop":"a","cache_salt":"mine","priority":-3})");
  EXPECT_THAT(response.body, HasSubstr(R"("prompt_tokens_details":{"cached_tokens":2}})"));
  EXPECT_EQ(coordinator_.requests().at(0).cache_salt(), "mine");
  EXPECT_EQ(coordinator_.requests().at(0).priority(), -3);
}

TEST_F(CompletionsTest, NarrowsWhatIsSampledToAllowedTokensAndAwayFromBadWords) {
  const HttpResponse response =
      PostCompletion(R"({"prompt":[5],"allowed_token_ids":[7,8],"bad_words":["ab","a"]})");
  ASSERT_EQ(response.status, 200) << response.body;
  const v1::SamplingParams sent = coordinator_.requests().at(0).sampling();
  EXPECT_THAT(sent.allowed_token_ids(), ElementsAre(7, 8));
  ASSERT_GE(sent.bad_words_size(), 2);
  EXPECT_THAT(sent.bad_words(0).token_ids(), ElementsAreArray(Ids("ab")));
  // As vLLM: the form after a space counts when it has as many tokens and begins with another.
  std::vector<std::vector<uint32_t>> expected;
  for (const char* word : {"ab", "a"}) {
    const std::vector<uint32_t> bare = Ids(word), spaced = Ids(absl::StrCat(" ", word));
    expected.push_back(bare);
    if (spaced.size() == bare.size() && spaced[0] != bare[0]) expected.push_back(spaced);
  }
  std::vector<std::vector<uint32_t>> words;
  for (const v1::TokenSequence& word : sent.bad_words()) {
    words.emplace_back(word.token_ids().begin(), word.token_ids().end());
  }
  EXPECT_EQ(words, expected);
}

TEST_F(CompletionsTest, TruncatesThePromptFromTheLeft) {
  const auto prompt_of = [this](const std::string& fields) {
    EXPECT_EQ(PostCompletion(absl::StrCat(R"({"prompt":[5,6,7,8],)", fields, "}")).status, 200);
    const v1::GenerateRequest sent = coordinator_.requests().back();
    return std::vector<uint32_t>(sent.prompt_token_ids().begin(), sent.prompt_token_ids().end());
  };
  EXPECT_THAT(prompt_of(R"("truncate_prompt_tokens":2)"), ElementsAre(7, 8));
  EXPECT_THAT(prompt_of(R"("truncate_prompt_tokens":9)"), ElementsAre(5, 6, 7, 8));
  EXPECT_THAT(prompt_of(R"("truncate_prompt_tokens":-1,"max_tokens":125)"), ElementsAre(6, 7, 8));
  const HttpResponse echoed =
      PostCompletion(R"({"prompt":"abc","echo":true,"truncate_prompt_tokens":1,"max_tokens":1})");
  EXPECT_THAT(echoed.body, HasSubstr(R"("text":"c)"));
}

TEST_F(CompletionsTest, SaysTheUsageInEveryChunkWhenAsked) {
  coordinator_.SetScript(Saying({Ids("a")[0], Ids("b")[0]}));
  const HttpResponse response = PostCompletion(
      R"({"prompt":[5],"stream":true,"stream_options":{"continuous_usage_stats":true}})");
  const std::vector<std::string> events = EventsOf(response);
  ASSERT_EQ(events.size(), 4u);
  EXPECT_THAT(events[0],
              HasSubstr(R"("usage":{"prompt_tokens":1,"total_tokens":2,)"
                        R"("completion_tokens":1,"prompt_tokens_details":{"cached_tokens":0}})"));
  EXPECT_THAT(events[2], HasSubstr(R"("choices":[],"usage":{"prompt_tokens":1,)"));
}

TEST_F(CompletionsTest, EchoesThePromptWithLogprobsFirst) {
  const std::vector<uint32_t> prompt = Ids("ab");
  ASSERT_EQ(prompt.size(), 2u);
  coordinator_.SetScript(Saying(Ids("c"), v1::FINISH_REASON_LENGTH));
  const HttpResponse response = PostCompletion(
      R"({"prompt":[)" + std::to_string(prompt[0]) + "," + std::to_string(prompt[1]) +
      R"(],"echo":true,"logprobs":1,"max_tokens":1,"temperature":0})");
  EXPECT_THAT(Timeless(response.body),
              HasSubstr(R"([{"index":0,"text":"abc","logprobs":{"text_offset":[0,1,2],)"
                        R"("token_logprobs":[null,-0.25,-0.5],"tokens":["a","b","c"],)"
                        R"("top_logprobs":[null,{"b":-0.25},{"c":-0.5}]},)"
                        R"("finish_reason":"length")"));
  EXPECT_THAT(response.body, HasSubstr(R"("prompt_tokens":2,"total_tokens":3,)"));
  const v1::GenerateRequest sent = coordinator_.requests().at(0);
  EXPECT_EQ(sent.sampling().num_logprobs(), 1u);
  EXPECT_EQ(sent.sampling().num_prompt_logprobs(), 1u);
}

TEST_F(CompletionsTest, EchoesWithoutGeneratingWhenMaxTokensIsZero) {
  const HttpResponse response = PostCompletion(
      R"({"prompt":"ab","add_special_tokens":false,"echo":true,"max_tokens":0,"logprobs":0})");
  EXPECT_THAT(response.body,
              HasSubstr(R"("text":"ab","logprobs":{"text_offset":[0,1],"token_logprobs":)"
                        R"([null,-0.25],"tokens":["a","b"],"top_logprobs":[null,{"b":-0.25}]},)"
                        R"("finish_reason":"length")"));
  EXPECT_THAT(response.body, HasSubstr(R"("completion_tokens":0)"));
}

TEST_F(CompletionsTest, TextOffsetsLeaveOutATokenThatTheEchoDoesNotShow) {
  const std::string end = R"("echo":true,"max_tokens":0,"logprobs":0})";
  const HttpResponse text = PostCompletion(R"({"prompt":"ab",)" + end);
  EXPECT_THAT(text.body, HasSubstr(R"("text":"ab","logprobs":{"text_offset":[0,0,1],)"));
  // Sent as ids it is shown.
  std::vector<uint32_t> ids = tokenizer_->Encode("ab", BosPolicy::kAsConfigured);
  ASSERT_EQ(ids.size(), 3u);
  const HttpResponse shown =
      PostCompletion(absl::StrCat("{\"prompt\":[", ids[0], ",", ids[1], ",", ids[2], "],", end));
  EXPECT_THAT(shown.body, ::testing::Not(HasSubstr(R"("text_offset":[0,0,1],)")));
  EXPECT_THAT(shown.body, HasSubstr(R"(ab","logprobs":{"text_offset":[0,)"));
}

TEST_F(CompletionsTest, StreamsTheEchoInTheFirstEventOfEachChoice) {
  coordinator_.SetScript(Saying(Ids("cd"), v1::FINISH_REASON_LENGTH));
  const HttpResponse response = PostCompletion(
      R"({"prompt":"ab","add_special_tokens":false,"echo":true,"logprobs":0,"stream":true})");
  const std::vector<std::string> events = EventsOf(response);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_THAT(events[0], HasSubstr(R"("text":"abc","logprobs":{"text_offset":[0,1,2],)"));
  EXPECT_THAT(events[1], HasSubstr(R"("text":"d","logprobs":{"text_offset":[3],)"));
}

// A character of several tokens has no text until the last of them, but each has an offset.
TEST_F(CompletionsTest, StreamsTheTextOffsetsOfTheWholeAnswer) {
  coordinator_.SetScript(Saying(Ids("aԯb"), v1::FINISH_REASON_LENGTH));
  const std::string request = R"({"prompt":[5],"logprobs":0,"max_tokens":4)";
  ASSERT_EQ(Ids("aԯb").size(), 4u);
  EXPECT_THAT(PostCompletion(request + "}").body, HasSubstr(R"("text_offset":[0,1,2,3])"));
  const HttpResponse response = PostCompletion(request + R"(,"stream":true})");
  EXPECT_THAT(EventsOf(response)[3], HasSubstr(R"("text":"b","logprobs":{"text_offset":[3])"));
}

TEST_F(CompletionsTest, GivesEveryChoiceOfEveryPromptItsIndexAndSeed) {
  coordinator_.SetScript([this](const v1::GenerateRequest& request, FakeStream& stream) {
    const uint32_t name = request.sampling().seed() == 7 ? Ids("x")[0] : Ids("y")[0];
    stream.SendEnd({request.prompt_token_ids(0), name}, v1::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  const std::string a = std::to_string(Ids("a")[0]), b = std::to_string(Ids("b")[0]);
  const HttpResponse response =
      PostCompletion(R"({"prompt":[[)" + a + "],[" + b + R"(]],"n":2,"seed":7})");
  for (const char* choice : {R"("index":0,"text":"ax")", R"("index":1,"text":"ay")",
                             R"("index":2,"text":"bx")", R"("index":3,"text":"by")"}) {
    EXPECT_THAT(response.body, HasSubstr(choice));
  }
  // A prompt counts once, its choices all.
  EXPECT_THAT(response.body,
              HasSubstr(R"("prompt_tokens":2,"total_tokens":10,"completion_tokens":8)"));
}

TEST_F(CompletionsTest, AddsBosToTextPromptsUnlessToldNotTo) {
  PostCompletion(R"({"prompt":["a","b"]})");
  PostCompletion(R"({"prompt":"a","add_special_tokens":false})");
  std::multiset<int> lengths;
  for (const v1::GenerateRequest& request : coordinator_.requests()) {
    lengths.insert(request.prompt_token_ids_size());
    if (request.prompt_token_ids_size() == 2) {
      EXPECT_EQ(request.prompt_token_ids(0), 0u);
    }
  }
  EXPECT_THAT(lengths, ElementsAre(1, 2, 2));
}

TEST_F(CompletionsTest, StopsAtAStringThatSpansTokensAndCancelsTheCall) {
  coordinator_.SetScript([this](const v1::GenerateRequest&, FakeStream& stream) {
    for (const uint32_t id : Ids("one STOP two")) stream.SendTokens({id});
    stream.WaitUntilCancelled();
    return grpc::Status::OK;
  });
  const HttpResponse response = PostCompletion(R"({"prompt":[5],"stop":["ZZ","STOP"]})");
  EXPECT_THAT(response.body, HasSubstr(R"("text":"one ","logprobs":null,"finish_reason":"stop",)"
                                       R"("stop_reason":"STOP")"));
  EXPECT_TRUE(CoordinatorGetsIdle());
  EXPECT_EQ(coordinator_.num_cancelled(), 1);
}

TEST_F(CompletionsTest, StreamsNothingThatMayBecomeAStopString) {
  CoordinatorSays("one STOP two");
  const HttpResponse response =
      PostCompletion(R"({"prompt":[5],"stop":"STOP","stream":true,"max_tokens":50})");
  const std::vector<std::string> events = EventsOf(response);
  for (const std::string& event : events) {
    EXPECT_THAT(event, ::testing::Not(HasSubstr("ST\""))) << event;
  }
  ASSERT_GE(events.size(), 2u);
  EXPECT_THAT(events[events.size() - 2], HasSubstr(R"("stop_reason":"STOP")"));
}

TEST_F(CompletionsTest, IncludesTheStopStringWhenAsked) {
  CoordinatorSays("one STOP two");
  const HttpResponse response = PostCompletion(
      R"({"prompt":[5],"stop":"STOP","include_stop_str_in_output":true,"max_tokens":50})");
  EXPECT_THAT(response.body, HasSubstr(R"("text":"one STOP")"));
}

TEST_F(CompletionsTest, NamesTheClientsStopTokenAndLeavesItsTextOut) {
  coordinator_.SetScript([this](const v1::GenerateRequest& request, FakeStream& stream) {
    v1::GenerateResponse response;
    response.add_token_ids(Ids("a")[0]);
    response.add_token_ids(request.sampling().stop_token_ids(0));
    response.set_finish_reason(v1::FINISH_REASON_STOP);
    response.set_stop_token_id(request.sampling().stop_token_ids(0));
    stream.Send(response);
    return grpc::Status::OK;
  });
  const std::string b = std::to_string(Ids("b")[0]);
  const HttpResponse response = PostCompletion(R"({"prompt":[5],"stop_token_ids":[)" + b + "]}");
  EXPECT_THAT(response.body, HasSubstr(R"("text":"a","logprobs":null,"finish_reason":"stop",)"
                                       R"("stop_reason":)" +
                                       b));
  EXPECT_THAT(response.body, HasSubstr(R"("completion_tokens":2)"));
}

TEST_F(CompletionsTest, ReturnsTokenIdsWhenAsked) {
  coordinator_.SetScript(Saying({100, 101}, v1::FINISH_REASON_LENGTH));
  const HttpResponse whole = PostCompletion(R"({"prompt":[5,6],"return_token_ids":true})");
  EXPECT_THAT(whole.body, HasSubstr(R"("token_ids":[100,101],"prompt_logprobs":null,)"
                                    R"("prompt_token_ids":[5,6])"));
  const HttpResponse stream =
      PostCompletion(R"({"prompt":[5,6],"return_token_ids":true,"stream":true})");
  const std::vector<std::string> events = EventsOf(stream);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_THAT(events[0], HasSubstr(R"("prompt_token_ids":[5,6],"token_ids":[100])"));
  EXPECT_THAT(events[1], HasSubstr(R"("prompt_token_ids":null,"token_ids":[101])"));
}

TEST_F(CompletionsTest, NamesTokensByIdWhenAsked) {
  coordinator_.SetScript(Saying({100}, v1::FINISH_REASON_LENGTH));
  const HttpResponse response = PostCompletion(
      R"({"prompt":[5],"logprobs":2,"return_tokens_as_token_ids":true,"max_tokens":1})");
  EXPECT_THAT(response.body, HasSubstr(R"("tokens":["token_id:100"],"top_logprobs":)"
                                       R"([{"token_id:100":-0.5,"token_id:101":-1.5}])"));
}

TEST_F(CompletionsTest, GivesPromptLogprobsWithRanks) {
  coordinator_.SetScript(Saying({100}, v1::FINISH_REASON_LENGTH));
  const std::string b = std::to_string(Ids("b")[0]);
  const HttpResponse response =
      PostCompletion(R"({"prompt":[5,)" + b + R"(],"prompt_logprobs":0,"max_tokens":1})");
  EXPECT_THAT(response.body, HasSubstr(R"("prompt_logprobs":[null,{")" + b +
                                       R"(":{"logprob":-0.25,"rank":1,"decoded_token":"b"}}])"));
}

TEST_F(CompletionsTest, SendsSamplingParametersAndNeutralDefaults) {
  PostCompletion(R"({"prompt":[5]})");
  PostCompletion(
      R"({"prompt":[5],"temperature":0.5,"top_p":0.25,"top_k":7,"min_p":0.125,"seed":-1,)"
      R"("presence_penalty":1.5,"frequency_penalty":-0.5,"repetition_penalty":1.25,)"
      R"("logit_bias":{"9":200,"10":-1.5},"min_tokens":2,"max_tokens":9,"ignore_eos":true,)"
      R"("stop_token_ids":[3,4]})");
  const std::vector<v1::GenerateRequest> requests = coordinator_.requests();
  ASSERT_EQ(requests.size(), 2u);
  const v1::SamplingParams& neutral = requests[0].sampling();
  EXPECT_EQ(neutral.temperature(), 1.0f);
  EXPECT_EQ(neutral.top_p(), 1.0f);
  EXPECT_EQ(neutral.top_k(), 0u);
  EXPECT_EQ(neutral.repetition_penalty(), 1.0f);
  EXPECT_FALSE(neutral.has_seed());
  EXPECT_FALSE(neutral.has_num_logprobs());
  EXPECT_EQ(requests[0].max_tokens(), 16u);
  EXPECT_FALSE(requests[0].ignore_eos());
  const v1::SamplingParams& sampling = requests[1].sampling();
  EXPECT_EQ(sampling.temperature(), 0.5f);
  EXPECT_EQ(sampling.top_p(), 0.25f);
  EXPECT_EQ(sampling.top_k(), 7u);
  EXPECT_EQ(sampling.min_p(), 0.125f);
  EXPECT_EQ(sampling.seed(), ~uint64_t{0});
  EXPECT_EQ(sampling.presence_penalty(), 1.5f);
  EXPECT_EQ(sampling.frequency_penalty(), -0.5f);
  EXPECT_EQ(sampling.repetition_penalty(), 1.25f);
  EXPECT_EQ(sampling.logit_bias(0).bias(), 100.0f);  // clamped
  EXPECT_EQ(sampling.logit_bias(1).bias(), -1.5f);
  EXPECT_EQ(sampling.min_tokens(), 2u);
  EXPECT_THAT(sampling.stop_token_ids(), ElementsAre(3, 4));
  EXPECT_EQ(requests[1].max_tokens(), 9u);
  EXPECT_TRUE(requests[1].ignore_eos());
}

TEST_F(CompletionsTest, TakesWhatBenchmarkClientsSend) {
  const HttpResponse response = PostCompletion(
      R"({"model":"tiny","prompt":"Unicode � 杭州 \u0000","repetition_penalty":1.0,)"
      R"("max_tokens":3,"logprobs":null,"stream":true,"ignore_eos":true,"unknown_field":{"a":1},)"
      R"("stream_options":{"include_usage":true},"stop":null,"n":1.0,"user":"me"})");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(EventsOf(response).back(), "[DONE]");
}

TEST_F(CompletionsTest, NeverSendsHalfACharacter) {
  std::vector<uint32_t> ids = Ids("杭州 🙂");
  ASSERT_GT(ids.size(), 4u) << "the tiny vocabulary has no such characters";
  coordinator_.SetScript(Saying(ids, v1::FINISH_REASON_LENGTH));
  const HttpResponse response = PostCompletion(R"({"prompt":[5],"stream":true,"max_tokens":50})");
  std::string text;
  for (const std::string& event : EventsOf(response)) {
    const size_t begin = event.find(R"("text":")");
    if (begin == std::string::npos) continue;
    const size_t end = event.find('"', begin + 8);
    text += event.substr(begin + 8, end - begin - 8);
    EXPECT_EQ(event.find("\xEF\xBF\xBD"), std::string::npos) << event;
  }
  EXPECT_EQ(text, "杭州 🙂");
}

// A checkpoint without tokenizer.json.
class TokenIdsOnlyTest : public GatewayTest {
 protected:
  TokenIdsOnlyTest() { options_.model_dir = "tests/golden/v3_tiny"; }
};

TEST_F(TokenIdsOnlyTest, AnswersTokenIdsWithTokenIds) {
  coordinator_.SetScript(Saying({100}, v1::FINISH_REASON_LENGTH));
  const HttpResponse response = PostCompletion(
      R"({"prompt":[5,6],"echo":true,"logprobs":0,"max_tokens":1,"return_token_ids":true})");
  EXPECT_EQ(response.status, 200) << response.body;
  EXPECT_THAT(
      response.body,
      HasSubstr(R"("text":"","logprobs":{"text_offset":[0,10,20],"token_logprobs":)"
                R"([null,-0.25,-0.5],"tokens":["token_id:5","token_id:6","token_id:100"])"));
  EXPECT_THAT(response.body, HasSubstr(R"("token_ids":[100])"));
}

TEST_F(TokenIdsOnlyTest, RefusesTextSayingWhy) {
  for (const std::string& request :
       {Post("/v1/completions", R"({"prompt":"text"})"),
        Post("/v1/completions", R"({"prompt":[5],"stop":"x"})"),
        Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}]})"),
        Post("/tokenize", R"({"prompt":"text"})"), Post("/detokenize", R"({"tokens":[1]})")}) {
    const HttpResponse response = Ask(request);
    EXPECT_EQ(response.status, 400);
    EXPECT_THAT(response.body, HasSubstr("no tokenizer.json"));
  }
}

}  // namespace
}  // namespace fathom
