#include "gateway/text/chat_encoding.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/gateway/text/golden.h"

namespace fathom {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using Role = ChatMessage::Role;

ChatMessage Says(Role role, std::optional<std::string> content) {
  ChatMessage message;
  message.role = role;
  message.content = std::move(content);
  return message;
}

ChatMessage Calls(std::optional<std::string> content, std::vector<std::string> arguments) {
  ChatMessage message = Says(Role::kAssistant, std::move(content));
  for (std::string& text : arguments) {
    message.tool_calls.push_back({"", "function", "get_weather", std::move(text)});
  }
  return message;
}

// The tiny tokenizer with DeepSeek's markers for tools; the layout is chosen by `chat_template`.
class ChatEncodingTest : public testing::Test {
 protected:
  static ChatEncoder EncoderFor(const std::string& model_dir) {
    static const std::string& json =
        *new std::string(ReadGoldenFile(std::string(kGoldenV3) + "/tokenizer.json"));
    const auto tokenizer =
        Tokenizer::Parse(json, ReadGoldenFile(model_dir + "/tokenizer_config.json"), "");
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    const auto encoder = ChatEncoder::Create(**tokenizer);
    EXPECT_TRUE(encoder.ok()) << encoder.status();
    return *encoder;
  }
  static const ChatEncoder& V3() {
    static const ChatEncoder& encoder = *new ChatEncoder(EncoderFor(kGoldenV3));
    return encoder;
  }
  static const ChatEncoder& V3_0324() {
    static const ChatEncoder& encoder = *new ChatEncoder(EncoderFor(kGoldenChatV3_0324));
    return encoder;
  }

  static std::string Text(const ChatEncoder& encoder, const std::vector<ChatMessage>& messages,
                          ChatOptions options = {}) {
    const auto text = encoder.Encode(messages, options);
    EXPECT_TRUE(text.ok()) << text.status();
    return text.value_or("");
  }
  static std::string Error(const std::vector<ChatMessage>& messages, ChatOptions options = {}) {
    const auto text = V3_0324().Encode(messages, options);
    EXPECT_TRUE(absl::IsInvalidArgument(text.status())) << text.status();
    return std::string(text.status().message());
  }

  static void ExpectGolden(const ChatEncoder& encoder, const std::string& path, size_t count) {
    const std::vector<ChatVector> vectors = ReadChatVectors(path);
    EXPECT_EQ(vectors.size(), count);
    for (const ChatVector& vector : vectors) {
      EXPECT_EQ(Text(encoder, vector.messages, vector.options), vector.text);
    }
  }
};

ChatOptions Continuing() {
  ChatOptions options;
  options.add_generation_prompt = false;
  options.continue_final_message = true;
  return options;
}

TEST_F(ChatEncodingTest, PrintsWhatDeepSeekV3sTemplatePrints) {
  ExpectGolden(V3(), std::string(kGoldenV3) + "/chat.json", 12);
  ExpectGolden(V3(), std::string(kGoldenV3) + "/more_chats.json", 60);
}

TEST_F(ChatEncodingTest, PrintsWhatDeepSeekV3_0324sTemplatePrints) {
  ExpectGolden(V3_0324(), std::string(kGoldenChatV3_0324) + "/chat.json", 60);
}

TEST_F(ChatEncodingTest, GoldenChatsHaveTheGoldenIds) {
  for (const ChatVector& vector : ReadChatVectors(std::string(kGoldenV3) + "/chat.json")) {
    ASSERT_FALSE(vector.ids.empty());
    const std::string text = Text(V3(), vector.messages, vector.options);
    EXPECT_EQ(V3Tokenizer().Encode(text, BosPolicy::kNone), vector.ids) << text;
  }
}

TEST_F(ChatEncodingTest, BothLayoutsAgreeOnConversations) {
  const std::vector<ChatMessage> messages = {
      Says(Role::kSystem, "You are a helpful assistant"), Says(Role::kUser, "Who are you?"),
      Says(Role::kAssistant, "<think>Hmm</think>I am DeepSeek"), Says(Role::kUser, "1+1?")};
  const std::string expected =
      "<｜begin▁of▁sentence｜>You are a helpful assistant<｜User｜>Who are you?<｜Assistant｜>"
      "<think>Hmm</think>I am DeepSeek<｜end▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>";
  EXPECT_EQ(Text(V3(), messages), expected);
  EXPECT_EQ(Text(V3_0324(), messages), expected);
}

TEST_F(ChatEncodingTest, BothLayoutsAgreeOnARoundOfTwoToolCalls) {
  const std::vector<ChatMessage> messages = {
      Says(Role::kUser, "Weather?"), Calls("", {R"({"city": "杭州"})", R"({"city": "北京"})"}),
      Says(Role::kTool, "sunny"), Says(Role::kTool, "rain")};
  const std::string expected =
      "<｜begin▁of▁sentence｜><｜User｜>Weather?<｜Assistant｜><｜tool▁calls▁begin｜>"
      "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"杭州\"}\n```"
      "<｜tool▁call▁end｜>\n"
      "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"北京\"}\n```"
      "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
      "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>\n"
      "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>";
  EXPECT_EQ(Text(V3(), messages), expected);
  EXPECT_EQ(Text(V3_0324(), messages), expected);
}

TEST_F(ChatEncodingTest, NeitherLayoutLosesCallsBesideContent) {
  for (const ChatEncoder* encoder : {&V3(), &V3_0324()}) {
    const std::string text =
        Text(*encoder, {Says(Role::kUser, "?"), Calls("Let me look.", {"{}"})});
    EXPECT_THAT(text, HasSubstr("<｜Assistant｜>Let me look.<｜tool▁calls▁begin｜>"));
    EXPECT_THAT(text, HasSubstr("<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"));
  }
}

TEST_F(ChatEncodingTest, ContinuesTheLastMessage) {
  for (const ChatEncoder* encoder : {&V3(), &V3_0324()}) {
    EXPECT_EQ(
        Text(*encoder, {Says(Role::kUser, "Hi"), Says(Role::kAssistant, "Hello, ")}, Continuing()),
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello, ");
    EXPECT_EQ(Text(*encoder, {Says(Role::kUser, "Once upon")}, Continuing()),
              "<｜begin▁of▁sentence｜><｜User｜>Once upon");
    EXPECT_THAT(Text(*encoder,
                     {Says(Role::kUser, "?"), Calls(std::nullopt, {"{}"}),
                      Says(Role::kTool, "18 C"), Says(Role::kAssistant, "It is")},
                     Continuing()),
                HasSubstr("18 C<｜tool▁output▁end｜><｜tool▁outputs▁end｜>It is"));
  }
}

TEST_F(ChatEncodingTest, RefusesMessagesThatMakeNoSense) {
  EXPECT_EQ(Error({}), "messages must not be empty");
  EXPECT_EQ(Error({Says(Role::kUser, "x"), Says(Role::kUser, std::nullopt)}),
            "messages[1] (user) has no content");
  EXPECT_EQ(Error({Says(Role::kAssistant, std::nullopt)}),
            "messages[0] (assistant) has no content");
  ChatMessage user_calls = Calls("x", {"{}"});
  user_calls.role = Role::kUser;
  EXPECT_EQ(Error({user_calls}), "messages[0] (user) has tool_calls");
}

ChatOptions Contradictory() {
  ChatOptions options = Continuing();
  options.add_generation_prompt = true;
  return options;
}

TEST_F(ChatEncodingTest, RefusesToContinueWhatCannotBeContinued) {
  EXPECT_EQ(Error({Says(Role::kUser, "x")}, Contradictory()),
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
  const std::string sentence =
      "continue_final_message needs a last message by user or assistant without tool_calls";
  EXPECT_EQ(Error({Calls("x", {"{}"})}, Continuing()), sentence);
  EXPECT_EQ(Error({Says(Role::kSystem, "x")}, Continuing()), sentence);
  EXPECT_EQ(Error({Says(Role::kUser, "x"), Says(Role::kTool, "x")}, Continuing()), sentence);
}

TEST_F(ChatEncodingTest, AModelWithoutToolTokensChatsButCallsNoTools) {
  const auto encoder = ChatEncoder::Create(TinyTokenizer());
  ASSERT_TRUE(encoder.ok()) << encoder.status();
  EXPECT_EQ(Text(*encoder, {Says(Role::kUser, "Hi")}),
            "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>");
  const auto text = encoder->Encode({Says(Role::kTool, "x")}, {});
  EXPECT_TRUE(absl::IsInvalidArgument(text.status()));
  EXPECT_EQ(text.status().message(),
            "messages[0] (tool): the model's tokenizer has no tokens for tool calls");
}

TEST_F(ChatEncodingTest, RefusesModelsThatSpeakAnotherLayout) {
  const std::string json = ReadGoldenFile(std::string(kGoldenTiny) + "/tokenizer.json");
  const std::string config = ReadGoldenFile(std::string(kGoldenTiny) + "/tokenizer_config.json");
  const auto error = [](const std::string& json, const std::string& config,
                        std::string chat_template) {
    const auto tokenizer = Tokenizer::Parse(json, config, std::move(chat_template));
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    const absl::Status status = ChatEncoder::Create(**tokenizer).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(error(json, config, "<|im_middle|>{{ message }}"),
              HasSubstr("has no token <|im_system|>, which the chat encoding kimi_k2 needs"));
  EXPECT_THAT(error(json, config, "[INST] {{ message }} [/INST]"),
              HasSubstr("the checkpoint's chat_template is none of those that are known"));
  std::string without_user = json;
  without_user.replace(without_user.find("<｜User｜>"), sizeof("<｜User｜>") - 1, "<|im_user|>");
  EXPECT_THAT(error(without_user, config, ""), HasSubstr("has no token <｜User｜>"));
}

TEST_F(ChatEncodingTest, AnEncodingCanBeNamed) {
  const auto named = ChatEncoder::Create(V3Tokenizer(), "deepseek_v3_0324");
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_EQ(named->layout().name, "deepseek_v3_0324");
  const absl::Status lacks = ChatEncoder::Create(V3Tokenizer(), "deepseek_v32").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(lacks)) << lacks;
  const absl::Status unknown = ChatEncoder::Create(V3Tokenizer(), "deepseek_v9").status();
  EXPECT_TRUE(absl::IsInvalidArgument(unknown)) << unknown;
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("expected one of deepseek_v3, "));
}

// What DeepSeek-V3.1 is left to write: thoughts or an answer.
TEST_F(ChatEncodingTest, SaysWhetherTheModelGoesOnThinking) {
  const std::unique_ptr<Tokenizer> tokenizer = ThinkingTokenizer();
  const auto encoder = ChatEncoder::Create(*tokenizer, "deepseek_v31");
  ASSERT_TRUE(encoder.ok()) << encoder.status();
  ChatOptions options;
  const ChatMessage question = Says(Role::kUser, "1+1?");
  EXPECT_FALSE(encoder->EndsInThinking({question}, options));
  options.thinking = true;
  EXPECT_TRUE(encoder->EndsInThinking({question}, options));
  EXPECT_FALSE(
      encoder->EndsInThinking({question, Calls("", {"{}"}), Says(Role::kTool, "2")}, options));

  options.add_generation_prompt = false;
  options.continue_final_message = true;
  ChatMessage answer = Says(Role::kAssistant, "It");
  EXPECT_FALSE(encoder->EndsInThinking({question, answer}, options));
  EXPECT_THAT(Text(*encoder, {question, answer}, options), EndsWith("<｜Assistant｜></think>It"));
  answer.prefix = true;
  EXPECT_TRUE(encoder->EndsInThinking({question, answer}, options));
  EXPECT_THAT(Text(*encoder, {question, answer}, options), EndsWith("<｜Assistant｜><think>It"));
}

}  // namespace
}  // namespace fathom
