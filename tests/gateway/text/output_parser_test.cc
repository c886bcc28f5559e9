#include "gateway/text/output_parser.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/gateway/text/golden.h"
#include "tests/gateway/text/output_reader.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr OutputSyntax kV3 = {ToolSyntax::kV3, ThinkSyntax::kNone};
constexpr OutputSyntax kR1 = {ToolSyntax::kV3, ThinkSyntax::kThinkTags};
constexpr OutputSyntax kV31 = {ToolSyntax::kV31, ThinkSyntax::kThinkTags};
constexpr OutputSyntax kV32 = {ToolSyntax::kDsml, ThinkSyntax::kThinkTags};
constexpr OutputSyntax kKimi = {ToolSyntax::kKimiK2, ThinkSyntax::kThinkTags};

const Tokenizer& TheTokenizer() {
  static const Tokenizer& tokenizer = *ThinkingTokenizer().release();
  return tokenizer;
}

OutputParserOptions For(OutputSyntax syntax) {
  OutputParserOptions options;
  options.syntax = syntax;
  options.calls_tools = true;
  return options;
}

OutputParserOptions InThinking(OutputSyntax syntax) {
  OutputParserOptions options = For(syntax);
  options.begins_in_thinking = true;
  return options;
}

// What the text says, and that it says the same however its tokens are cut.
MessageDelta Read(const OutputParserOptions& options, std::string_view text) {
  const std::vector<uint32_t> ids = TheTokenizer().Encode(text, BosPolicy::kNone);
  const MessageDelta whole = ReadOutput(TheTokenizer(), options, OneChunk(ids));
  EXPECT_EQ(Shown(ReadOutput(TheTokenizer(), options, SingleTokens(ids))), Shown(whole));
  std::mt19937_64 random(ids.size());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(Shown(ReadOutput(TheTokenizer(), options, RandomChunks(ids, random))), Shown(whole));
  }
  return whole;
}

// "name(arguments)" of each call.
std::vector<std::string> CallsIn(const MessageDelta& message) {
  std::vector<std::string> calls;
  for (const ToolCallDelta& call : message.tool_calls) {
    calls.push_back(call.name + "(" + call.arguments + ")");
  }
  return calls;
}

std::string V3Call(std::string_view name, std::string_view arguments) {
  return "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + std::string(name) + "\n```json\n" +
         std::string(arguments) + "\n```<｜tool▁call▁end｜>";
}

std::string V31Call(std::string_view name, std::string_view arguments) {
  return "<｜tool▁call▁begin｜>" + std::string(name) + "<｜tool▁sep｜>" + std::string(arguments) +
         "<｜tool▁call▁end｜>";
}

std::string Section(std::string_view calls) {
  return "<｜tool▁calls▁begin｜>" + std::string(calls) + "<｜tool▁calls▁end｜>";
}

std::string Dsml(std::string_view inside) {
  return "\n\n<｜DSML｜function_calls>\n" + std::string(inside) + "</｜DSML｜function_calls>";
}

std::string Invoke(std::string_view name, std::string_view parameters) {
  return "<｜DSML｜invoke name=\"" + std::string(name) + "\">\n" + std::string(parameters) +
         "</｜DSML｜invoke>\n";
}

std::string Parameter(std::string_view name, std::string_view is_string, std::string_view value) {
  return "<｜DSML｜parameter name=\"" + std::string(name) + "\" string=\"" +
         std::string(is_string) + "\">" + std::string(value) + "</｜DSML｜parameter>\n";
}

TEST(OutputParserTest, TextIsText) {
  const std::string text = "Hello, 世界! <think> is a tag, \n\n<x> & ``` too.";
  for (const OutputSyntax syntax : {kV3, kV31, kV32, kKimi}) {
    OutputParserOptions options = For(syntax);
    options.syntax.thinking = ThinkSyntax::kNone;
    const MessageDelta message = Read(options, text);
    EXPECT_EQ(message.content, text);
    EXPECT_EQ(message.reasoning, "");
    EXPECT_THAT(message.tool_calls, IsEmpty());
  }
}

TEST(OutputParserTest, ThoughtsEndAtTheTag) {
  const MessageDelta begun = Read(InThinking(kR1), "Hmm.\n</think>\n\nHello");
  EXPECT_EQ(begun.reasoning, "Hmm.\n");
  EXPECT_EQ(begun.content, "\n\nHello");
  // DeepSeek-R1-0528 begins them itself.
  const MessageDelta own = Read(For(kR1), "<think>Hmm.</think>Hello");
  EXPECT_EQ(own.reasoning, "Hmm.");
  EXPECT_EQ(own.content, "Hello");
}

// vllm #12999, #24459; sglang #4539: tags in the answer, once more or at all.
TEST(OutputParserTest, TagsAreNeverText) {
  const MessageDelta twice = Read(InThinking(kR1), "<think>Hmm.</think></think>Hello");
  EXPECT_EQ(twice.reasoning, "Hmm.");
  EXPECT_EQ(twice.content, "Hello");
  const MessageDelta none = Read(For(kV31), "</think>Hello");
  EXPECT_EQ(none.content, "Hello");
}

// The same characters, spelled by other tokens, are no tag.
TEST(OutputParserTest, ATagThatIsSpelledOutIsText) {
  std::vector<uint32_t> ids;
  for (const std::string_view piece : {"</", "th", "ink", ">"}) {
    for (const uint32_t id : TheTokenizer().Encode(piece, BosPolicy::kNone)) ids.push_back(id);
  }
  const MessageDelta message = ReadOutput(TheTokenizer(), InThinking(kR1), OneChunk(ids));
  EXPECT_EQ(message.reasoning, "</think>");
}

// vllm #48645, #13125: without </think> it is all thoughts; nothing is taken for an answer that is
// none, and nothing is lost.
TEST(OutputParserTest, ThoughtsThatAreCutShortStayThoughts) {
  const MessageDelta message = Read(InThinking(kV31), "I should");
  EXPECT_EQ(message.reasoning, "I should");
  EXPECT_EQ(message.content, "");
  EXPECT_EQ(Read(For(kV31), "No thoughts at all.").content, "No thoughts at all.");
}

TEST(OutputParserTest, ThoughtsCanBeLeftOut) {
  OutputParserOptions options = InThinking(kR1);
  options.include_reasoning = false;
  const MessageDelta message = Read(options, "Hmm.</think>Hello");
  EXPECT_EQ(message.reasoning, "");
  EXPECT_EQ(message.content, "Hello");
}

TEST(OutputParserTest, V3CallsWithTextAround) {
  const MessageDelta message = Read(
      For(kV3),
      "Let me see." +
          Section(V3Call("get_weather", R"({"city": "杭州"})") + "\n" + V3Call("get_time", "{}")) +
          " Done.");
  EXPECT_EQ(message.content, "Let me see. Done.");
  EXPECT_THAT(CallsIn(message), ElementsAre(R"(get_weather({"city": "杭州"}))", "get_time({})"));
}

// vllm's expression for V3 has no DOTALL: such a call was lost without a word.
TEST(OutputParserTest, V3ArgumentsMayHaveManyLines) {
  const std::string arguments = "{\n  \"city\": \"杭州\",\n  \"code\": \"```json\\n{}\\n```\"\n}";
  for (const OutputSyntax syntax : {kV3, kR1}) {
    const MessageDelta message = Read(For(syntax), Section(V3Call("get_weather", arguments)));
    EXPECT_THAT(CallsIn(message), ElementsAre("get_weather(" + arguments + ")"));
    EXPECT_EQ(message.content, "");
  }
  EXPECT_THAT(CallsIn(Read(For(kV31), Section(V31Call("get_weather", arguments)))),
              ElementsAre("get_weather(" + arguments + ")"));
}

// vllm #48020: the call was lost when its begin and end came in one delta. vllm #30866: the first
// token of the arguments was missing. Read() cuts each output in all kinds of ways.
TEST(OutputParserTest, ACallMayComeInOnePiece) {
  EXPECT_THAT(CallsIn(Read(For(kV31), Section(V31Call("f", R"({"a": 1})")))),
              ElementsAre(R"(f({"a": 1}))"));
  EXPECT_THAT(CallsIn(Read(For(kV32), Dsml(Invoke("f", Parameter("a", "true", "x"))))),
              ElementsAre(R"(f({"a": "x"}))"));
}

// vllm #48342: arguments lost their end where it looked like what follows them.
TEST(OutputParserTest, ArgumentsKeepTheirEnds) {
  const std::string arguments = "{\"a\": \"x\\n``\", \"b\": {\"c\": [\"\\\"}\"]}}";
  EXPECT_THAT(CallsIn(Read(For(kV3), Section(V3Call("f", arguments + "\n``")))),
              ElementsAre("f(" + arguments + "\n``)"));
  EXPECT_THAT(CallsIn(Read(For(kV3), Section(V3Call("f", arguments)))),
              ElementsAre("f(" + arguments + ")"));
}

TEST(OutputParserTest, V3ForgivesAFenceThatIsNone) {
  const std::string head = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f";
  const std::string end = "<｜tool▁call▁end｜>";
  for (const std::string body : {"\n```\n{\"a\": 1}\n```", "\n{\"a\": 1}", " {\"a\": 1}",
                                 "\n```json\n{\"a\": 1}", "\n```json\n{\"a\": 1}\n```\n"}) {
    EXPECT_THAT(CallsIn(Read(For(kV3), Section(head + body + end))), ElementsAre(R"(f({"a": 1}))"))
        << body;
  }
  for (const std::string body : {"", "\n", "\n```", "\n```json\n\n```"}) {
    EXPECT_THAT(CallsIn(Read(For(kV3), Section(head + body + end))), ElementsAre("f({})")) << body;
  }
}

TEST(OutputParserTest, CallsWithoutBeginOrEndAreCalls) {
  EXPECT_THAT(CallsIn(Read(For(kV31), "Now" + V31Call("f", "{}"))), ElementsAre("f({})"));
  EXPECT_THAT(
      CallsIn(Read(For(kV31),
                   "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}")),
      ElementsAre("f({})", "g({})"));
}

TEST(OutputParserTest, ACallThatIsCutShortHasWhatWasWritten) {
  const MessageDelta v3 = Read(For(kV3),
                               "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
                               "<｜tool▁sep｜>f\n```json\n{\"a\": [1,\n");
  EXPECT_THAT(CallsIn(v3), ElementsAre("f({\"a\": [1,\n)"));
  const MessageDelta head = Read(For(kV31), "Hm<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_we");
  EXPECT_THAT(CallsIn(head), IsEmpty());
  EXPECT_EQ(head.content, "Hm");
  const MessageDelta dsml =
      Read(For(kV32),
           "\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n"
           "<｜DSML｜parameter name=\"a\" string=\"true\">half a \"sentence</");
  EXPECT_THAT(CallsIn(dsml), ElementsAre("f({\"a\": \"half a \\\"sentence</)"));
}

TEST(OutputParserTest, CallsEndThoughts) {
  const MessageDelta message =
      Read(InThinking(kV31), "I need it." + Section(V31Call("f", "{}")) + "There.");
  EXPECT_EQ(message.reasoning, "I need it.");
  EXPECT_THAT(CallsIn(message), ElementsAre("f({})"));
  EXPECT_EQ(message.content, "There.");
  const MessageDelta dsml = Read(InThinking(kV32), "I need it." + Dsml(Invoke("f", "")));
  EXPECT_EQ(dsml.reasoning, "I need it.");
  EXPECT_THAT(CallsIn(dsml), ElementsAre("f({})"));
}

// vllm 0.16 gave "days": "3" whole and 3 when streaming.
TEST(OutputParserTest, DsmlParametersHaveTheirTypes) {
  const MessageDelta message = Read(
      For(kV32),
      "Let me see." +
          Dsml(Invoke("get_weather", Parameter("city", "true", "杭州 \"W\"\n</x> & <") +
                                         Parameter("days", "false", "3") +
                                         Parameter("where", "false", "[1, {\"a\": \"</b>\"}]")) +
               Invoke("get_time", "")));
  EXPECT_EQ(message.content, "Let me see.");
  EXPECT_THAT(CallsIn(message),
              ElementsAre("get_weather({\"city\": \"杭州 \\\"W\\\"\\n</x> & <\", \"days\": 3, "
                          "\"where\": [1, {\"a\": \"</b>\"}]})",
                          "get_time({})"));
}

TEST(OutputParserTest, DsmlArgumentsAreAlwaysJson) {
  const MessageDelta message = Read(
      For(kV32),
      Dsml(Invoke("f", Parameter("a", "false", "True") + Parameter("b", "false", " {\"c\": 1} ") +
                           Parameter("d", "false", ""))));
  EXPECT_THAT(CallsIn(message), ElementsAre(R"(f({"a": "True", "b": {"c": 1}, "d": ""}))"));
}

// sglang #18236, #14690: empty arguments when streaming, and a JSON object instead of parameters.
TEST(OutputParserTest, DsmlForgivesWhatIsMissing) {
  const std::string json = R"({"a": [1, 2], "b": "</c>"})";
  EXPECT_THAT(CallsIn(Read(For(kV32), Dsml(Invoke("f", json + "\n")))),
              ElementsAre("f(" + json + "\n)"));
  EXPECT_THAT(CallsIn(Read(For(kV32), Invoke("f", Parameter("a", "true", "x")))),
              ElementsAre(R"(f({"a": "x"}))"));
  EXPECT_THAT(CallsIn(Read(For(kV32), Dsml("<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter "
                                           "name=\"a\" string=\"true\">x</｜DSML｜invoke>"
                                           "<｜DSML｜invoke name=\"g\">"))),
              ElementsAre(R"(f({"a": "x"}))", "g({})"));
}

TEST(OutputParserTest, TextThatOnlyLooksLikeDsmlIsText) {
  for (const std::string text : {"a\n\n<b", "a <｜DSML｜ b", "\n\n", "a\n\n<｜DSML｜function_cal",
                                 "x</｜DSML｜invoke>", "<｜DSML｜"}) {
    EXPECT_EQ(Read(For(kV32), text).content, text);
  }
}

TEST(OutputParserTest, KimisCallsHaveKimisIds) {
  const MessageDelta message = Read(
      For(kKimi),
      "<think>Hm</think>I'll check.<|tool_calls_section_begin|><|tool_call_begin|>"
      "functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"北京\"}<|tool_call_end|>"
      "<|tool_call_begin|>functions.f.g:12<|tool_call_argument_begin|>{}<|tool_call_end|>"
      "<|tool_calls_section_end|>");
  EXPECT_EQ(message.reasoning, "Hm");
  EXPECT_EQ(message.content, "I'll check.");
  EXPECT_THAT(CallsIn(message), ElementsAre(R"(get_weather({"city": "北京"}))", "f.g({})"));
  EXPECT_EQ(message.tool_calls[0].id, "functions.get_weather:0");
  EXPECT_EQ(message.tool_calls[1].id, "functions.f.g:12");
}

// vllm closes a section of Kimi's by force after 8192 characters.
TEST(OutputParserTest, ArgumentsMayBeLong) {
  const std::string arguments = "{\"text\": \"" + std::string(20'000, 'x') + "\"}";
  EXPECT_THAT(CallsIn(Read(For(kKimi),
                           "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:"
                           "0<|tool_call_argument_begin|>" +
                               arguments + "<|tool_call_end|><|tool_calls_section_end|>")),
              ElementsAre("f(" + arguments + ")"));
}

TEST(OutputParserTest, FurtherCallsCanBeLeftOut) {
  OutputParserOptions options = For(kV31);
  options.only_one_call = true;
  const MessageDelta message =
      Read(options, Section(V31Call("f", "{}") + V31Call("g", "{}")) + "After");
  EXPECT_THAT(CallsIn(message), ElementsAre("f({})"));
  EXPECT_EQ(message.content, "After");
}

TEST(OutputParserTest, WithoutToolsCallsAreText) {
  OutputParserOptions options = For(kV31);
  options.calls_tools = false;
  const std::string text = Section(V31Call("f", "{}"));
  const MessageDelta message = Read(options, text);
  EXPECT_EQ(message.content, text);
  EXPECT_THAT(message.tool_calls, IsEmpty());
}

TEST(OutputParserTest, MarkersWithinACallBelongToItsArguments) {
  EXPECT_THAT(CallsIn(Read(For(kV31), Section(V31Call("f", "{\"a\": \"<think></think>\"}")))),
              ElementsAre("f({\"a\": \"<think></think>\"})"));
  EXPECT_THAT(
      CallsIn(Read(For(kV32), Dsml(Invoke("f", Parameter("a", "true", "<think>｜DSML｜</x"))))),
      ElementsAre("f({\"a\": \"<think>｜DSML｜</x\"})"));
}

}  // namespace
}  // namespace fathom
