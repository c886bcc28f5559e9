// What is wrong with a request is said as clients expect it, and the server goes on.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/gateway/gateway_fixture.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

class RefusalsTest : public GatewayTest {
 protected:
  // Refused with that error, and a good request served right afterwards.
  void ExpectRefused(std::string_view path, std::string_view json, std::string_view message,
                     std::string_view type, std::string_view param) {
    SCOPED_TRACE(json);
    HttpClient client(port());
    client.Send(Post(path, json));
    const HttpResponse response = client.Read();
    EXPECT_EQ(response.status, 400);
    EXPECT_THAT(response.body, HasSubstr(std::string(message)));
    EXPECT_THAT(response.body, HasSubstr(absl::StrCat("\"type\":\"", std::string(type), "\"")));
    const std::string quoted =
        param.empty() ? "null" : absl::StrCat("\"", std::string(param), "\"");
    EXPECT_THAT(response.body, HasSubstr(absl::StrCat("\"param\":", quoted, ",\"code\":400}}")));
    client.Send(Post("/v1/completions", R"({"prompt":[5]})"));
    EXPECT_EQ(client.Read().status, 200) << "the connection is still good";
  }

  struct Case {
    std::string json;
    std::string message;
    std::string param;
    std::string type = "BadRequestError";
  };
  void ExpectAllRefused(std::string_view path, const std::vector<Case>& cases) {
    for (const Case& wrong : cases) {
      ExpectRefused(path, wrong.json, wrong.message, wrong.type, wrong.param);
    }
  }
};

constexpr char kMalformed[] = "Bad Request";

TEST_F(RefusalsTest, WhatIsNoRequestAtAll) {
  ExpectAllRefused("/v1/completions",
                   {{"", "not valid JSON", "", kMalformed},
                    {"{", "not valid JSON", "", kMalformed},
                    {"{\"prompt\":[5]} x", "not valid JSON", "", kMalformed},
                    {"{'prompt':[5]}", "not valid JSON", "", kMalformed},
                    {"{\"prompt\":\"\xff\"}", "not valid JSON", "", kMalformed},
                    {"{\"prompt\":\"a\nb\"}", "not valid JSON", "", kMalformed},
                    {"{\"prompt\":[5],\"max_tokens\":1e999}", "not valid JSON", "", kMalformed},
                    {"[]", "must be a JSON object, got a list", "", kMalformed},
                    {"5", "must be a JSON object, got a number", "", kMalformed},
                    {"null", "must be a JSON object, got null", "", kMalformed},
                    {absl::StrCat("{\"x\":", std::string(70, '['), std::string(70, ']'), "}"),
                     "nested deeper", "", kMalformed}});
}

TEST_F(RefusalsTest, PromptsThatAreNone) {
  const std::string missing = "Either prompt or prompt_embeds must be provided and non-empty.";
  ExpectAllRefused(
      "/v1/completions",
      {{"{}", missing, "prompt"},
       {R"({"prompt":null})", missing, "prompt"},
       {R"({"prompt":""})", missing, "prompt"},
       {R"({"prompt":[]})", missing, "prompt"},
       {R"({"prompt":[[]]})", "The prompt has no tokens", "prompt"},
       {R"({"prompt":5})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":{"a":1}})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":[true]})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":["a",[5]]})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":[5,"a"]})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":[1.5]})", "prompt must be a string, a list", "prompt", kMalformed},
       {R"({"prompt":[-1]})", "Token id -1 in prompt", "prompt"},
       {R"({"prompt":[512]})", "Token id 512 in prompt is out of vocabulary. Vocabulary size: 512",
        "prompt"},
       {R"({"prompt":[4294967296]})", "Token id 4294967296 in prompt", "prompt"}});
}

TEST_F(RefusalsTest, PromptsThatAreTooLongOrTooMany) {
  std::string ids = "5";
  for (int i = 1; i < 113; ++i) ids += ",5";
  ExpectRefused("/v1/completions", absl::StrCat("{\"prompt\":[", ids, "]}"),
                "You passed 113 input tokens and requested 16 output tokens. However, the model's "
                "context length is only 128 tokens, resulting in a maximum input length of 112 "
                "tokens. Please reduce the length of the input prompt, or max_tokens.",
                "BadRequestError", "input_tokens");
  std::string prompts = "[5]";
  for (int i = 1; i < 129; ++i) prompts += ",[5]";
  ExpectRefused("/v1/completions", absl::StrCat("{\"prompt\":[", prompts, "]}"),
                "exceeds the maximum allowed count of 128", "BadRequestError", "prompt");
  ExpectRefused("/v1/completions", R"({"prompt":[[5],[5],[5]],"n":100})",
                "prompts times n is 300, limit 256", "BadRequestError", "n");
  std::string chat;
  for (int i = 0; i < 200; ++i) chat += "hello ";
  ExpectRefused("/v1/chat/completions",
                absl::StrCat(R"({"messages":[{"role":"user","content":")", chat, "\"}]}"),
                "requested 1 output tokens. However, the model's context length is only 128 tokens",
                "BadRequestError", "input_tokens");
}

TEST_F(RefusalsTest, NumbersThatAreOutOfRange) {
  const auto with = [](const std::string& field) {
    return absl::StrCat("{\"prompt\":[5],", field, "}");
  };
  ExpectAllRefused(
      "/v1/completions",
      {{with(R"("n":0)"), "n must be at least 1, got 0.", "n"},
       {with(R"("n":-3)"), "n must be at least 1, got -3.", "n"},
       {with(R"("n":1000000)"), "n must be at most 128, got 1000000.", "n"},
       {with(R"("n":2,"temperature":0)"), "n must be 1 when using greedy sampling, got 2.", "n"},
       {with(R"("max_tokens":0)"), "max_tokens must be at least 1, got 0.", "max_tokens"},
       {with(R"("max_tokens":-1)"), "max_tokens must be at least 1, got -1.", "max_tokens"},
       {with(R"("max_tokens":9999999999)"), "max_tokens must be below 2^31", "max_tokens"},
       {with(R"("max_tokens":1000)"), "maximum input length of 0 tokens", "input_tokens"},
       {with(R"("min_tokens":20)"),
        "min_tokens must be less than or equal to max_tokens=16, got 20.", "min_tokens"},
       {with(R"("min_tokens":-1)"), "min_tokens must be greater than or equal to 0", "min_tokens"},
       {with(R"("temperature":-0.5)"), "temperature must be non-negative, got -0.5.",
        "temperature"},
       {with(R"("temperature":1e30)"), "temperature must be at most", "temperature"},
       {with(R"("top_p":0)"), "top_p must be in (0, 1], got 0.", "top_p"},
       {with(R"("top_p":1.5)"), "top_p must be in (0, 1], got 1.5.", "top_p"},
       {with(R"("top_k":-2)"), "top_k must be 0 (disable), or at least 1, got -2.", "top_k"},
       {with(R"("min_p":1.25)"), "min_p must be in [0, 1], got 1.25.", "min_p"},
       {with(R"("presence_penalty":3)"), "presence_penalty must be in [-2, 2], got 3.",
        "presence_penalty"},
       {with(R"("frequency_penalty":-2.5)"), "frequency_penalty must be in [-2, 2], got -2.5.",
        "frequency_penalty"},
       {with(R"("repetition_penalty":0)"), "repetition_penalty must be greater than zero, got 0.",
        "repetition_penalty"},
       {with(R"("repetition_penalty":1e300)"), "repetition_penalty must be greater than zero",
        "repetition_penalty"},
       {with(R"("logprobs":-1)"), "logprobs must be in [0, 20], got -1.", "logprobs"},
       {with(R"("logprobs":21)"), "logprobs must be in [0, 20], got 21.", "logprobs"},
       {with(R"("prompt_logprobs":21)"), "prompt_logprobs must be in [0, 20], got 21.",
        "prompt_logprobs"},
       {with(R"("seed":9223372036854775808)"), "seed must be an integer of 64 bits", "seed",
        kMalformed}});
}

TEST_F(RefusalsTest, FieldsOfTheWrongType) {
  const auto with = [](const std::string& field) {
    return absl::StrCat("{\"prompt\":[5],", field, "}");
  };
  ExpectAllRefused(
      "/v1/completions",
      {{with(R"("max_tokens":"ten")"), "max_tokens must be an integer of 64 bits, got a string.",
        "max_tokens", kMalformed},
       {with(R"("max_tokens":1.5)"), "max_tokens must be an integer", "max_tokens", kMalformed},
       {with(R"("temperature":"hot")"), "temperature must be a number, got a string.",
        "temperature", kMalformed},
       {with(R"("n":true)"), "n must be an integer of 64 bits, got a boolean.", "n", kMalformed},
       {with(R"("stream":"yes")"), "stream must be true or false, got a string.", "stream",
        kMalformed},
       {with(R"("echo":1)"), "echo must be true or false, got a number.", "echo", kMalformed},
       {with(R"("model":7)"), "model must be a string, got a number.", "model", kMalformed},
       {with(R"("stop":7)"), "stop must be a string or a list of strings, got a number.", "stop",
        kMalformed},
       {with(R"("stop":["a",7])"), "stop must be a string or a list of strings", "stop",
        kMalformed},
       {with(R"("stop_token_ids":"a")"), "stop_token_ids must be a list of token ids",
        "stop_token_ids", kMalformed},
       {with(R"("stop_token_ids":[1.5])"), "stop_token_ids must be a list of token ids",
        "stop_token_ids", kMalformed},
       {with(R"("logit_bias":[1])"), "logit_bias must be an object, got a list.", "logit_bias",
        kMalformed},
       {with(R"("logit_bias":{"5":"a"})"), "logit_bias of token 5 must be a number", "logit_bias",
        kMalformed},
       {with(R"("stream":true,"stream_options":7)"), "stream_options must be a JSON object",
        "stream_options", kMalformed},
       {with(R"("stream":true,"stream_options":{"include_usage":1})"),
        "stream_options.include_usage must be true or false", "stream_options.include_usage",
        kMalformed}});
}

TEST_F(RefusalsTest, FieldsThatNothingReadsAreOfTheirTypeAllTheSame) {
  const auto chat = [](const std::string& field) {
    return absl::StrCat(R"({"messages":[{"role":"user","content":"x"}],"max_tokens":4,)", field,
                        "}");
  };
  std::vector<Case> cases;
  for (const char* name : {"user", "service_tier", "safety_identifier", "prompt_cache_key",
                           "prompt_cache_retention", "request_id", "verbosity"}) {
    cases.push_back({chat(absl::StrCat("\"", name, "\":7")), " must be a string, got a number.",
                     name, kMalformed});
  }
  for (const char* name : {"store", "spaces_between_special_tokens", "parallel_tool_calls"}) {
    cases.push_back({chat(absl::StrCat("\"", name, "\":\"x\"")),
                     " must be true or false, got a string.", name, kMalformed});
  }
  cases.push_back(
      {chat(R"("metadata":[])"), "must be an object, got a list", "metadata", kMalformed});
  cases.push_back({chat(R"("prediction":7)"), "must be an object", "prediction", kMalformed});
  cases.push_back({chat(R"("modalities":"text")"), "must be a list", "modalities", kMalformed});
  cases.push_back(
      {chat(R"("length_penalty":"x")"), "must be a number", "length_penalty", kMalformed});
  ExpectAllRefused("/v1/chat/completions", cases);
  ExpectAllRefused("/v1/completions",
                   {{R"({"prompt":[5],"user":7})", "must be a string", "user", kMalformed}});
  // Of their type, or null, they change nothing.
  const HttpResponse response = PostChat(
      chat(R"("user":"u","service_tier":"auto","safety_identifier":"s","prompt_cache_key":"k",)"
           R"("verbosity":"low","store":true,"parallel_tool_calls":true,"metadata":{"a":"b"},)"
           R"("prediction":{"type":"content","content":"x"},"modalities":["text"],"audio":null,)"
           R"("functions":null,"prompt_cache_retention":null,"nobody_knows":[7])"));
  EXPECT_EQ(response.status, 200) << response.body;
}

TEST_F(RefusalsTest, FieldsThatWouldChangeAChatSayWhatToUseInstead) {
  const auto chat = [](const std::string& field) {
    return absl::StrCat(R"({"messages":[{"role":"user","content":"x"}],)", field, "}");
  };
  ExpectAllRefused(
      "/v1/chat/completions",
      {{chat(R"("functions":[])"), "use tools", "functions"},
       {chat(R"("function_call":"auto")"), "use tool_choice", "function_call"},
       {chat(R"("web_search_options":{})"), "searches nothing", "web_search_options"},
       {chat(R"("audio":{"voice":"x"})"), "answers are text", "audio"},
       {chat(R"("documents":[{}])"), "put them into the messages", "documents"},
       {chat(R"("reasoning_effort":7)"), "must be a string", "reasoning_effort", kMalformed},
       {chat(R"("reasoning_effort":"a bit")"), "must be none, minimal, low", "reasoning_effort"},
       {R"({"messages":[{"role":"assistant","content":"x","function_call":{"name":"f"}}]})",
        "use tool_calls", "messages[0].function_call"}});
}

TEST_F(RefusalsTest, ListsBeyondTheirLimits) {
  std::string stops = "\"a\"", ids = "1", biases = "\"0\":1";
  for (int i = 1; i <= 16; ++i) stops += ",\"a\"";
  for (int i = 1; i <= 128; ++i) ids += ",1";
  for (int i = 1; i <= 1024; ++i) absl::StrAppend(&biases, ",\"", i % 512, "\":1");
  const auto with = [](const std::string& field) {
    return absl::StrCat("{\"prompt\":[5],", field, "}");
  };
  ExpectAllRefused(
      "/v1/completions",
      {{with(absl::StrCat("\"stop\":[", stops, "]")), "stop has 17 strings, limit 16.", "stop"},
       {with(R"("stop":["a",""])"), "stop cannot contain an empty string.", "stop"},
       {with(absl::StrCat("\"stop\":\"", std::string(1025, 'x'), "\"")),
        "a stop string has 1025 bytes, limit 1024.", "stop"},
       {with(absl::StrCat("\"stop_token_ids\":[", ids, "]")), "stop_token_ids has 129 ids",
        "stop_token_ids"},
       {with(R"("stop_token_ids":[512])"), "out of vocabulary", "stop_token_ids"},
       {with(R"("stop_token_ids":[-1])"), "Token id -1 in stop_token_ids is no token id",
        "stop_token_ids"},
       {with(R"("allowed_token_ids":[512])"), "out of vocabulary", "allowed_token_ids"},
       {with(R"("allowed_token_ids":[])"), "no token would be left", "allowed_token_ids"},
       {with(R"("bad_words":[""])"), "bad_words cannot contain an empty string.", "bad_words"},
       {with(absl::StrCat(R"("bad_words":[")", std::string(257, 'a'), R"("])")),
        "a bad word has 257 bytes, limit 256.", "bad_words"},
       {with(R"("truncate_prompt_tokens":0)"), "must be -1, or at least 1, got 0.",
        "truncate_prompt_tokens"},
       {with(R"("truncate_prompt_tokens":-2)"), "must be -1, or at least 1, got -2.",
        "truncate_prompt_tokens"},
       {with(R"("truncate_prompt_tokens":113)"),
        "truncate_prompt_tokens=113 cannot be greater than 112", "truncate_prompt_tokens"},
       {with(absl::StrCat("\"logit_bias\":{", biases, "}")),
        "logit_bias has more than 1024 entries", "logit_bias"},
       {with(R"("logit_bias":{"x":1})"), "'x' is not a token id", "logit_bias"},
       {with(R"("logit_bias":{"512":1})"), "out of vocabulary", "logit_bias"}});
}

TEST_F(RefusalsTest, WhatIsNotSupportedYetAndContradictions) {
  const auto with = [](const std::string& field) {
    return absl::StrCat("{\"prompt\":[5],", field, "}");
  };
  const std::string yet = "is not supported";
  ExpectAllRefused(
      "/v1/completions",
      {{with(R"("suffix":"x")"), yet, "suffix"},
       {with(R"("best_of":2)"), yet, "best_of"},
       {with(R"("use_beam_search":true)"), yet, "use_beam_search"},
       {with(R"("prompt_embeds":"AA==")"), yet, "prompt_embeds"},
       {with(R"("structured_outputs":{"structural_tag":"x"})"), yet,
        "structured_outputs.structural_tag"},
       {with(R"("guided_whitespace_pattern":"x")"), yet, "guided_whitespace_pattern"},
       {with(R"("response_format":{"type":"structural_tag"})"), yet, "response_format"},
       {with(R"("response_format":{"type":"json_object"},"guided_regex":"a")"),
        "only use one kind of constraints", "guided_regex"},
       {with(R"("structured_outputs":{"json":""})"), "must not be empty",
        "structured_outputs.json"},
       {with(R"("guided_choice":[])"), "expected 1 to 2048", "guided_choice"},
       {with(absl::StrCat("\"guided_regex\":\"", std::string(65'537, 'a'), "\"")), "limit 65536",
        "guided_regex"},
       {with(R"("priority":3000000000)"), "priority must be in [-2147483648, 2147483647]",
        "priority"},
       {with(R"("stream_options":{"include_usage":true})"),
        "Stream options can only be defined when `stream=True`.", "stream_options"},
       {with(R"("stream":true,"prompt_logprobs":1)"),
        "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs"},
       {with(R"("cache_salt":"")"),
        "Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt"}});
  // Neutral values of the same are fine.
  const HttpResponse response = PostCompletion(
      with(R"("suffix":null,"best_of":1,"use_beam_search":false,"bad_words":[],"priority":0,)"
           R"("response_format":{"type":"text"},"structured_outputs":null)"));
  EXPECT_EQ(response.status, 200) << response.body;
}

TEST_F(RefusalsTest, ChatsThatAreNone) {
  const std::string kTool = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  const auto with = [](const std::string& field) {
    return absl::StrCat(R"({"messages":[{"role":"user","content":"x"}],)", field, "}");
  };
  ExpectAllRefused(
      "/v1/chat/completions",
      {{"{}", "messages must be a list of messages", "messages", kMalformed},
       {R"({"messages":"x"})", "messages must be a list of messages", "messages", kMalformed},
       {R"({"messages":[]})", "at least one message", "messages"},
       {R"({"messages":["x"]})", "messages[0] must be a JSON object", "messages[0]", kMalformed},
       {R"({"messages":[{"content":"x"}]})", "messages[0].role must be a string",
        "messages[0].role", kMalformed},
       {R"({"messages":[{"role":"robot","content":"x"}]})", "got 'robot'", "messages[0].role"},
       {R"({"messages":[{"role":"user"}]})", "messages[0].content must be a string",
        "messages[0].content", kMalformed},
       {R"({"messages":[{"role":"user","content":7}]})", "messages[0].content must be a string",
        "messages[0].content", kMalformed},
       {R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})",
        "content parts of type 'image_url' are not supported", "messages[0].content.type"},
       {with(R"("top_logprobs":2)"), "when using `top_logprobs`, `logprobs` must be set to true.",
        "top_logprobs"},
       {with(R"("logprobs":true,"top_logprobs":21)"), "top_logprobs must be in [0, 20]",
        "top_logprobs"},
       {with(R"("tool_choice":"auto")"), "When using `tool_choice`, `tools` must be set.",
        "tool_choice"},
       {with(kTool + R"(,"tool_choice":"required")"), "no tokens for tool calls", "tools"},
       {with(kTool + R"(,"tool_choice":{"type":"function","function":{"name":"f"}})"),
        "no tokens for tool calls", "tools"},
       {with(kTool + R"(,"tool_choice":{"type":"function","function":{"name":"g"}})"),
        "does not match any of the specified `tools`", "tool_choice.function.name"},
       {with(kTool + R"(,"tool_choice":"maybe")"), "got 'maybe'", "tool_choice"},
       {with(kTool + R"(,"tool_choice":7)"), "a string or an object", "tool_choice", kMalformed},
       {with(kTool), "tools: the model's tokenizer has no tokens for tool calls", "tools"},
       {with(R"("tools":7)"), "tools must be a list", "tools", kMalformed},
       {with(R"("tools":[{}])"), "must be an object", "tools[0].function", kMalformed},
       {with(R"("tools":[{"function":{}}])"), "must be a string", "tools[0].function.name",
        kMalformed},
       {with(R"("tools":[{"type":"browser"}])"), "only tools of type 'function'", "tools[0].type"},
       {with(R"("chat_template_kwargs":{"thinking":1})"), "must be true or false",
        "chat_template_kwargs.thinking", kMalformed},
       {with(R"("chat_template":"x")"), "Chat template is passed with request", "chat_template"},
       {with(R"("chat_template_kwargs":{"x":1})"), "'x' is not known", "chat_template_kwargs"},
       {with(R"("continue_final_message":true)"),
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        "continue_final_message"},
       {with(R"("max_completion_tokens":0)"), "max_completion_tokens must be at least 1",
        "max_completion_tokens"}});
}

TEST_F(RefusalsTest, ToolsThatAreNone) {
  const auto tool = [](const std::string& function) {
    return absl::StrCat(R"({"type":"function","function":{)", function, "}}");
  };
  const auto with = [](const std::string& tools, const std::string& choice) {
    return absl::StrCat(R"({"messages":[{"role":"user","content":"x"}],"tools":[)", tools, "]",
                        choice.empty() ? "" : ",\"tool_choice\":", choice, "}");
  };
  const auto schema = [&](const std::string& parameters) {
    return with(tool(absl::StrCat(R"("name":"f","parameters":)", parameters)), "");
  };
  const std::string f = tool(R"("name":"f")");
  const std::string parameters = "tools[0].function.parameters";
  ExpectAllRefused(
      "/v1/chat/completions",
      {{schema("[]"), "must be an object, got a list", parameters, kMalformed},
       {schema(R"({"type":"string"})"), "must be 'object'", parameters + ".type"},
       {schema(R"({"type":["string","null"]})"), "must be 'object'", parameters + ".type"},
       {schema(R"({"type":7})"), "must be 'object'", parameters + ".type"},
       {schema(R"({"properties":[]})"), "must be an object", parameters + ".properties",
        kMalformed},
       {schema(R"({"required":true})"), "must be a list of strings", parameters + ".required",
        kMalformed},
       {with(tool(R"("name":"")"), ""), "has 0 bytes, expected 1 to 256", "tools[0].function.name"},
       {with(tool(absl::StrCat(R"("name":")", std::string(257, 'f'), "\"")), ""), "has 257 bytes",
        "tools[0].function.name"},
       {with(tool(R"("name":"f","strict":"yes")"), ""), "must be true or false",
        "tools[0].function.strict", kMalformed},
       {with(absl::StrCat(f, ",", f), ""), "is 'f', which an earlier tool is called too",
        "tools[1].function.name"},
       {with(f, "{}"), "must be an object", "tool_choice.function", kMalformed},
       {with(f, R"({"type":"custom","custom":{"name":"f"}})"),
        "must be 'function' or 'allowed_tools', got 'custom'", "tool_choice.type"},
       {with(f, R"({"type":"function","function":{"name":""}})"), "does not match any",
        "tool_choice.function.name"},
       {with(f, R"({"type":"allowed_tools"})"), "must be an object", "tool_choice.allowed_tools",
        kMalformed},
       {with(f, R"({"type":"allowed_tools","allowed_tools":{"mode":"all","tools":[]}})"),
        "must be 'auto' or 'required', got 'all'", "tool_choice.allowed_tools.mode"},
       {with(f, R"({"type":"allowed_tools","allowed_tools":{"mode":"auto","tools":[]}})"),
        "must name a tool", "tool_choice.allowed_tools.tools"},
       {with(f, R"({"type":"allowed_tools","allowed_tools":{"mode":"auto","tools":)"
                R"([{"type":"function","function":{"name":"g"}}]}})"),
        "does not match any", "tool_choice.allowed_tools.tools[0].function.name"}});
}

TEST_F(RefusalsTest, TokensAndTextsThatAreNone) {
  ExpectAllRefused("/tokenize",
                   {{"{}", "either prompt or messages", "prompt", kMalformed},
                    {R"({"prompt":7})", "prompt must be a string", "prompt", kMalformed}});
  ExpectAllRefused(
      "/detokenize",
      {{"{}", "tokens must be a list of token ids", "tokens", kMalformed},
       {R"({"tokens":["a"]})", "tokens must be a list of token ids", "tokens", kMalformed},
       {R"({"tokens":[512]})", "out of vocabulary", "tokens"},
       {R"({"tokens":[-1]})", "is no token id", "tokens"}});
}

TEST_F(RefusalsTest, BodiesThatAreNotDeclaredAsJson) {
  for (const char* header : {"", "Content-Type: text/plain\r\n",
                             "Content-Type: application/x-www-form-urlencoded\r\n"}) {
    const HttpResponse response =
        Ask(absl::StrCat("POST /v1/completions HTTP/1.1\r\nHost: test\r\n", header,
                         "Content-Length: 14\r\n\r\n{\"prompt\":[5]}"));
    EXPECT_EQ(response.status, 400);
    EXPECT_THAT(response.body, HasSubstr("Only 'application/json' is allowed"));
  }
  EXPECT_EQ(Ask("POST /v1/completions HTTP/1.1\r\nHost: test\r\n"
                "Content-Type: Application/JSON; charset=utf-8\r\n"
                "Content-Length: 14\r\n\r\n{\"prompt\":[5]}")
                .status,
            200);
}

TEST_F(RefusalsTest, WhatTheCoordinatorRefuses) {
  struct Case {
    grpc::StatusCode code;
    int status;
    const char* type;
  };
  for (const Case& refusal :
       {Case{grpc::StatusCode::INVALID_ARGUMENT, 400, "BadRequestError"},
        Case{grpc::StatusCode::RESOURCE_EXHAUSTED, 429, "TooManyRequestsError"},
        Case{grpc::StatusCode::UNAVAILABLE, 503, "ServiceUnavailableError"},
        Case{grpc::StatusCode::INTERNAL, 500, "InternalServerError"}}) {
    coordinator_.SetScript([&](const v1::GenerateRequest&, FakeStream&) {
      return grpc::Status(refusal.code, "because \"so\"");
    });
    // Nothing is streamed yet, so a stream has its true status too.
    for (const char* stream : {"false", "true"}) {
      const HttpResponse response =
          PostCompletion(absl::StrCat(R"({"prompt":[5],"stream":)", stream, "}"));
      EXPECT_EQ(response.status, refusal.status);
      EXPECT_EQ(response.body,
                absl::StrCat(R"({"error":{"message":"because \"so\"","type":")", refusal.type,
                             R"(","param":null,"code":)", refusal.status, "}}"));
      const bool retry = refusal.status == 429 || refusal.status == 503;
      EXPECT_EQ(response.headers.count("retry-after") > 0, retry);
    }
  }
}

TEST_F(RefusalsTest, SaysWhenItIsWorthTryingAgain) {
  coordinator_.SetScript([](const v1::GenerateRequest&, FakeStream&) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full", "7");
  });
  EXPECT_EQ(PostCompletion(R"({"prompt":[5]})").headers.at("retry-after"), "7");
}

}  // namespace
}  // namespace fathom
