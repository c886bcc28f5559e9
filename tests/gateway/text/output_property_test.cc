// Random outputs in each format, cut in random ways: streamed or not, the message is the same, and
// it is what was meant where the output is well-formed.
//
// FATHOM_SEED and FATHOM_OUTPUTS (of each format) change what is run.
#include <cstdlib>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/gateway/text/golden.h"
#include "tests/gateway/text/output_reader.h"

namespace fathom {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : std::strtoull(value, nullptr, 10);
}

struct Format {
  const char* name;
  OutputSyntax syntax;
};

constexpr Format kFormats[] = {
    {"V3", {ToolSyntax::kV3, ThinkSyntax::kNone}},
    {"R1", {ToolSyntax::kV3, ThinkSyntax::kThinkTags}},
    {"V3.1", {ToolSyntax::kV31, ThinkSyntax::kThinkTags}},
    {"V3.2", {ToolSyntax::kDsml, ThinkSyntax::kThinkTags}},
    {"Kimi-K2", {ToolSyntax::kKimiK2, ThinkSyntax::kThinkTags}},
};

class Writer {
 public:
  Writer(OutputSyntax syntax, std::mt19937_64& random) : syntax_(syntax), random_(random) {}

  size_t Below(size_t n) { return random_() % n; }
  bool Chance(int percent) { return static_cast<int>(Below(100)) < percent; }

  template <size_t n>
  const char* OneOf(const char* const (&choices)[n]) {
    return choices[Below(n)];
  }

  std::string Text(size_t most) {
    static constexpr const char* kPieces[] = {
        "Hello",     " world",  "你好", "，",  "\n",
        "\n\n",      "{\"a\":", " 1}",  "```", "\n```json\n",
        "<thinking", ">",       "</",   "é́",   "👩‍👩‍👧",
        " ",         "<",       "  ",   "\"",  "\\n",
        "invoke",    "0",       "func", "\t",  "ไทย",
        "[]",        "</x>",    "=",    "\r\n"};
    std::string text;
    for (size_t i = Below(most + 1); i > 0; --i) text += OneOf(kPieces);
    return text;
  }

  std::string Json(int depth) {
    static constexpr const char* kLeaves[] = {"1",
                                              "-2.5e3",
                                              "true",
                                              "null",
                                              "\"\"",
                                              "\"杭州\"",
                                              "\"a\\n\\\"b\\\" ```\"",
                                              "\"</x>\"",
                                              "\"\\u00e9\"",
                                              "\"long long long text\""};
    const size_t kind = depth > 2 ? 0 : Below(3);
    if (kind == 0) return OneOf(kLeaves);
    std::string json(kind == 1 ? "[" : "{");
    const char* space = OneOf({"", " ", "\n  "});
    for (size_t i = Below(4), first = 1; i > 0; --i, first = 0) {
      if (!first) json += ",";
      json += space;
      if (kind == 2) json += "\"k" + std::to_string(i) + "\": ";
      json += Json(depth + 1);
    }
    return json + (kind == 1 ? "]" : "}");
  }

  std::string Object() {
    std::string json = Json(0);
    while (json.front() != '{') json = Json(0);
    return json;
  }

  // A call, and in `expected` what it means. DSML's arguments are made here, member by member.
  std::string Call(size_t index, ToolCallDelta& expected) {
    expected.index = index;
    expected.name = OneOf({"get_weather", "f", "mcp__tool-名", "a.b"});
    expected.arguments = Object();
    switch (syntax_.tools) {
      case ToolSyntax::kV3:
        return "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + expected.name + "\n```json\n" +
               expected.arguments + "\n```<｜tool▁call▁end｜>" + OneOf({"", "\n"});
      case ToolSyntax::kV31:
        return "<｜tool▁call▁begin｜>" + expected.name + "<｜tool▁sep｜>" + expected.arguments +
               "<｜tool▁call▁end｜>";
      case ToolSyntax::kKimiK2:
        expected.id = "functions." + expected.name + ":" + std::to_string(index);
        return "<|tool_call_begin|>" + expected.id + "<|tool_call_argument_begin|>" +
               expected.arguments + "<|tool_call_end|>";
      case ToolSyntax::kDsml:
        return Invoke(expected);
    }
    return "";
  }

  std::string Invoke(ToolCallDelta& expected) {
    std::string text = "<｜DSML｜invoke name=\"" + expected.name + "\">\n";
    expected.arguments = "{";
    for (size_t i = Below(4), first = 1; i > 0; --i, first = 0) {
      const std::string key = "key" + std::to_string(i);
      const bool is_string = Chance(50);
      // Characters that JSON escapes are in the parser's own test.
      const std::string value = is_string ? OneOf({"杭州", "", "a </b> c", " x ", "3"}) : Json(0);
      text += "<｜DSML｜parameter name=\"" + key + "\" string=\"" + (is_string ? "true" : "false") +
              "\">" + value + "</｜DSML｜parameter>\n";
      expected.arguments += (first ? "\"" : ", \"") + key + "\": ";
      expected.arguments += is_string ? "\"" + value + "\"" : value;
    }
    expected.arguments += "}";
    return text + "</｜DSML｜invoke>\n";
  }

  std::string Calls(MessageDelta& expected) {
    std::string calls;
    for (size_t i = 0, n = 1 + Below(3); i < n; ++i) {
      calls += Call(i, expected.tool_calls.emplace_back());
    }
    switch (syntax_.tools) {
      case ToolSyntax::kV3:
      case ToolSyntax::kV31:
        return "<｜tool▁calls▁begin｜>" + calls + "<｜tool▁calls▁end｜>";
      case ToolSyntax::kKimiK2:
        return "<|tool_calls_section_begin|>" + calls + "<|tool_calls_section_end|>";
      case ToolSyntax::kDsml:
        return "\n\n<｜DSML｜function_calls>\n" + calls + "</｜DSML｜function_calls>";
    }
    return "";
  }

  // A whole output that is as it should be.
  std::string WellFormed(bool begins_in_thinking, MessageDelta& expected) {
    std::string text;
    if (syntax_.thinking != ThinkSyntax::kNone && (begins_in_thinking || Chance(50))) {
      expected.reasoning = Text(8);
      text += (begins_in_thinking ? "" : "<think>") + expected.reasoning + "</think>";
    }
    expected.content = Text(8);
    text += expected.content;
    if (Chance(60)) text += Calls(expected);
    return text;
  }

  // Pieces of outputs in any order.
  std::string Malformed() {
    static constexpr const char* kMarkers[] = {"<think>",
                                               "</think>",
                                               "<｜tool▁calls▁begin｜>",
                                               "<｜tool▁calls▁end｜>",
                                               "<｜tool▁call▁begin｜>",
                                               "<｜tool▁call▁end｜>",
                                               "<｜tool▁sep｜>",
                                               "<|tool_calls_section_begin|>",
                                               "<|tool_calls_section_end|>",
                                               "<|tool_call_begin|>",
                                               "<|tool_call_argument_begin|>",
                                               "<|tool_call_end|>",
                                               "｜DSML｜",
                                               "<｜DSML｜function_calls>",
                                               "</｜DSML｜function_calls>",
                                               "<｜DSML｜invoke name=\"f\">",
                                               "</｜DSML｜invoke>",
                                               "<｜DSML｜parameter name=\"a\" string=\"true\">",
                                               "<｜DSML｜parameter name=\"b\" string=\"false\">",
                                               "</｜DSML｜parameter>",
                                               "\n```",
                                               "\n\n"};
    std::string text;
    for (size_t i = 1 + Below(15); i > 0; --i) {
      text += Chance(60) ? std::string(OneOf(kMarkers)) : Text(3);
    }
    return text;
  }

 private:
  template <typename T>
  const char* OneOf(std::initializer_list<T> choices) {
    return choices.begin()[Below(choices.size())];
  }

  const OutputSyntax syntax_;
  std::mt19937_64& random_;
};

// Everything in a message, and the order of its parts. These are all of it: a run for each call, no
// two of the same part beside each other.
std::string ShownInOrder(const MessageDelta& message) {
  std::string shown = Shown(message);
  size_t reasoning = 0, content = 0, calls = 0;
  const MessageRun* last = nullptr;
  for (const MessageRun& run : message.runs) {
    EXPECT_FALSE(last != nullptr && run.IsOfSamePart(*last)) << shown;
    last = &run;
    switch (run.kind) {
      case MessageRun::Kind::kReasoning:
        reasoning += run.num_bytes;
        break;
      case MessageRun::Kind::kContent:
        content += run.num_bytes;
        break;
      case MessageRun::Kind::kToolCall:
        EXPECT_LT(calls, message.tool_calls.size()) << shown;
        if (calls == message.tool_calls.size()) break;
        EXPECT_EQ(run.call, message.tool_calls[calls].index) << shown;
        EXPECT_EQ(run.num_bytes, message.tool_calls[calls++].arguments.size()) << shown;
        break;
    }
    shown += " " + std::to_string(static_cast<int>(run.kind)) + ":" + std::to_string(run.num_bytes);
  }
  EXPECT_EQ(reasoning, message.reasoning.size()) << shown;
  EXPECT_EQ(content, message.content.size()) << shown;
  EXPECT_EQ(calls, message.tool_calls.size()) << shown;
  return shown;
}

TEST(OutputPropertyTest, AnyCutOfTheSameTokensGivesTheSameMessage) {
  const uint64_t seed = FromEnvironment("FATHOM_SEED", std::random_device()());
  const uint64_t num_outputs = FromEnvironment("FATHOM_OUTPUTS", 1'000);
  std::printf("seed %llu, %llu outputs of each format\n", static_cast<unsigned long long>(seed),
              static_cast<unsigned long long>(num_outputs));
  std::mt19937_64 random(seed);
  const std::unique_ptr<Tokenizer> tokenizer = ThinkingTokenizer();
  for (const Format& format : kFormats) {
    Writer writer(format.syntax, random);
    size_t num_with_calls = 0;
    for (uint64_t i = 0; i < num_outputs; ++i) {
      OutputParserOptions options;
      options.syntax = format.syntax;
      options.calls_tools = true;
      options.begins_in_thinking =
          format.syntax.thinking != ThinkSyntax::kNone && writer.Chance(50);
      MessageDelta expected;
      const bool is_well_formed = writer.Chance(60);
      const std::string text = is_well_formed
                                   ? writer.WellFormed(options.begins_in_thinking, expected)
                                   : writer.Malformed();
      std::vector<uint32_t> ids = tokenizer->Encode(text, BosPolicy::kNone);
      const bool is_cut_short = !is_well_formed && writer.Chance(50);
      if (is_cut_short) ids.resize(writer.Below(ids.size() + 1));

      const MessageDelta message = ReadOutput(*tokenizer, options, OneChunk(ids));
      const std::string whole = ShownInOrder(message);
      if (is_well_formed) {
        num_with_calls += !expected.tool_calls.empty();
        ASSERT_EQ(Shown(message), Shown(expected)) << format.name << ", output " << i << ":\n"
                                                   << text;
      }
      ASSERT_EQ(ShownInOrder(ReadOutput(*tokenizer, options, SingleTokens(ids))), whole)
          << format.name << ", output " << i << ":\n"
          << text;
      for (int cut = 0; cut < 3; ++cut) {
        ASSERT_EQ(ShownInOrder(ReadOutput(*tokenizer, options, RandomChunks(ids, random))), whole)
            << format.name << ", output " << i << ":\n"
            << text;
      }
    }
    EXPECT_GT(num_with_calls, num_outputs / 10) << format.name;
  }
}

}  // namespace
}  // namespace fathom
