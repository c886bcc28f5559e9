// Whatever obeys the grammar of a form of tool calls is read as calls of these tools. FATHOM_SEED
// repeats what was drawn.
#include "gateway/text/tool_call_grammar.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "gateway/text/output_parser.h"
#include "gateway/text/tokenizer.h"
#include "gmock/gmock.h"
#include "grammar/compiler/token_grammar.h"
#include "grammar/protocol.h"
#include "gtest/gtest.h"
#include "simdjson.h"

namespace fathom {
namespace {

using testing::HasSubstr;

constexpr int kEos = 1;

struct Form {
  const char* name;
  ToolSyntax syntax;
};
constexpr Form kForms[] = {{"V3, R1", ToolSyntax::kV3},
                           {"V3.1", ToolSyntax::kV31},
                           {"V3.2", ToolSyntax::kDsml},
                           {"Kimi-K2", ToolSyntax::kKimiK2}};

std::string FileOf(const std::string& name) {
  std::ostringstream text;
  text << std::ifstream("tests/golden/tokenizer_tiny/" + name).rdbuf();
  return text.str();
}

// The tiny tokenizer with the markers of every form.
std::unique_ptr<Tokenizer> TokenizerWithMarkers() {
  std::string json = FileOf("tokenizer.json");
  std::string tokens;
  uint32_t id = 512;
  for (const char* text :
       {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "｜DSML｜", "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
        "<|tool_call_end|>"}) {
    absl::StrAppend(&tokens, "{\"id\":", id++, ",\"content\":\"", text,
                    "\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
                    "\"normalized\":false,\"special\":true},");
  }
  constexpr std::string_view kBegin = "\"added_tokens\": [";
  json.insert(json.find(kBegin) + kBegin.size(), tokens);
  auto tokenizer = Tokenizer::Parse(json, FileOf("tokenizer_config.json"), "");
  CHECK(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

const std::vector<ChatTool>& Tools() {
  static const std::vector<ChatTool> tools = [] {
    std::vector<ChatTool> made(3);
    made[0].name = "get_weather";
    made[0].parameters = R"({"type": "object", "properties": {
        "city": {"type": "string", "description": "where"},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hours": {"type": "array", "items": {"type": "boolean"}}},
        "required": ["city", "days"]})";
    made[1].name = "now";
    made[1].parameters = R"({"type": "object", "properties": {}})";
    made[2].name = "tree";  // more than a list of properties
    made[2].parameters = R"({"type": "object", "properties": {"left": {"$ref": "#"},
        "value": {"type": "boolean"}}, "required": ["value"]})";
    return made;
  }();
  return tools;
}

uint32_t Seed() {
  const char* const given = std::getenv("FATHOM_SEED");
  return given == nullptr ? std::random_device()()
                          : static_cast<uint32_t>(std::strtoul(given, nullptr, 10));
}

class ToolCallGrammarTest : public testing::Test {
 protected:
  ToolCallGrammarTest() {
    std::vector<std::string> bytes_of_id(vocab_size_);
    for (int id = 0; id < vocab_size_; ++id) {
      const std::string_view bytes = tokenizer_->BytesOf(id);
      if (tokenizer_->IsSpecial(id) || tokenizer_->FindAddedToken(bytes) == id) continue;
      bytes_of_id[id] = std::string(bytes);
    }
    vocabulary_ =
        std::make_unique<TokenVocabulary>(bytes_of_id, vocab_size_, std::vector<int>{kEos});
    random_.seed(seed_);
    std::cout << "seed " << seed_ << "\n";
  }

  TokenGrammar Compiled(const std::string& text) {
    auto grammar =
        TokenGrammar::Compile(*vocabulary_, {.kind = Grammar::Kind::kStructuralTag, .text = text});
    CHECK(grammar.ok()) << text << ": " << grammar.status();
    return *std::move(grammar);
  }

  // Tokens at random, such that it ends soon. Empty: it did not.
  std::vector<uint32_t> Draw(const TokenGrammar& grammar) {
    const std::unique_ptr<TokenMatcher> matcher = *grammar.NewMatcher();
    std::vector<uint32_t> mask(GrammarMaskWords(vocab_size_));
    std::vector<uint32_t> drawn;
    while (drawn.size() < 3000) {
      EXPECT_TRUE(matcher->FillMask(absl::MakeSpan(mask)).ok());
      std::vector<uint32_t> allowed, ends;
      for (int id = 0; id < vocab_size_; ++id) {
        if ((mask[id / 32] >> (id % 32) & 1) == 0) continue;
        allowed.push_back(id);
        const std::string_view bytes = tokenizer_->BytesOf(id);
        if (tokenizer_->IsSpecial(id) || bytes == "\"" || bytes == "]" || bytes == "}" ||
            bytes == "</" || bytes == "<") {
          ends.push_back(id);
        }
      }
      EXPECT_FALSE(allowed.empty());
      if (allowed.empty()) return {};
      const std::vector<uint32_t>& from = !ends.empty() && random_() % 3 == 0 ? ends : allowed;
      const uint32_t chosen = from[random_() % from.size()];
      EXPECT_TRUE(*matcher->Accept(static_cast<int32_t>(chosen)));
      if (matcher->HasEnded()) return drawn;
      drawn.push_back(chosen);
    }
    return {};
  }

  MessageDelta Read(ToolSyntax syntax, const std::vector<uint32_t>& token_ids,
                    std::string* text = nullptr) {
    const OutputSyntax output = {syntax, ThinkSyntax::kNone};
    const OutputMarkers markers(*tokenizer_, output);
    OutputParserOptions options;
    options.syntax = output;
    options.calls_tools = true;
    OutputParser parser(options);
    MessageDelta delta;
    std::string held;
    for (const uint32_t id : token_ids) {
      const std::optional<Marker> marker = markers.Find(id);
      if (!marker.has_value()) {
        held += tokenizer_->BytesOf(id);
        continue;
      }
      parser.PushText(held, delta);
      if (text != nullptr) absl::StrAppend(text, held, std::string(tokenizer_->BytesOf(id)));
      held.clear();
      parser.PushMarker(*marker, tokenizer_->BytesOf(id), delta);
    }
    if (text != nullptr) *text += held;
    parser.PushText(held, delta);
    parser.Finish(delta);
    return delta;
  }

  // That it calls one of Tools() as its schema says.
  static void ExpectValid(const ToolCallDelta& call) {
    simdjson::dom::parser parser;
    simdjson::dom::object arguments;
    ASSERT_FALSE(parser.parse(call.arguments).get(arguments)) << call.arguments;
    if (call.name == "now") {
      EXPECT_EQ(arguments.size(), 0u) << call.arguments;
    } else if (call.name == "get_weather") {
      std::string_view city, unit;
      int64_t days = 0;
      EXPECT_FALSE(arguments["city"].get(city)) << call.arguments;
      ASSERT_FALSE(arguments["days"].get(days)) << call.arguments;
      EXPECT_TRUE(days >= 1 && days <= 14) << call.arguments;
      if (!arguments["unit"].get(unit)) {
        EXPECT_TRUE(unit == "celsius" || unit == "kelvin") << call.arguments;
      }
    } else {
      bool value;
      EXPECT_EQ(call.name, "tree");
      EXPECT_FALSE(arguments["value"].get(value)) << call.arguments;
    }
  }

  const std::unique_ptr<Tokenizer> tokenizer_ = TokenizerWithMarkers();
  const int vocab_size_ = static_cast<int>(tokenizer_->vocab_size());
  std::unique_ptr<TokenVocabulary> vocabulary_;
  const uint32_t seed_ = Seed();
  std::mt19937 random_;
};

TEST_F(ToolCallGrammarTest, WhatObeysItIsReadAsCallsOfTheTools) {
  constexpr int kEnough = 50;
  for (const Form& form : kForms) {
    const OutputMarkers markers(*tokenizer_, {form.syntax, ThinkSyntax::kNone});
    for (const NumCalls num_calls : {NumCalls::kOne, NumCalls::kOneOrMore}) {
      const TokenGrammar grammar =
          Compiled(*ToolCallGrammar(Tools(), num_calls, form.syntax, markers));
      int num_read = 0;
      size_t most_calls = 0;
      // How many of them end is chance.
      for (int i = 0; i < 150 || (num_read <= kEnough && i < 1500); ++i) {
        const std::vector<uint32_t> drawn = Draw(grammar);
        if (drawn.empty()) continue;
        ++num_read;
        std::string text;
        const MessageDelta message = Read(form.syntax, drawn, &text);
        SCOPED_TRACE(absl::StrCat(form.name, ": ", text));
        EXPECT_EQ(message.content, "");
        EXPECT_FALSE(message.tool_calls.empty());
        if (num_calls == NumCalls::kOne) {
          EXPECT_EQ(message.tool_calls.size(), 1u);
        }
        most_calls = std::max(most_calls, message.tool_calls.size());
        for (const ToolCallDelta& call : message.tool_calls) ExpectValid(call);
      }
      EXPECT_GT(num_read, kEnough) << form.name;
      if (num_calls == NumCalls::kOneOrMore) {
        EXPECT_GT(most_calls, 1u) << form.name;
      }
    }
  }
}

// One of each tool, letter by letter as the model would write it.
TEST_F(ToolCallGrammarTest, AllowsWhatTheModelsWrite) {
  const std::string json = R"({"city": "Bonn", "days": 3})";
  const std::vector<std::string> texts = {
      absl::StrCat("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
                   "```json\n",
                   json,
                   "\n```<｜tool▁call▁end｜>\n"
                   "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```"
                   "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
      absl::StrCat("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>", json,
                   "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
                   "<｜tool▁calls▁end｜>"),
      "\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n"
      "<｜DSML｜parameter name=\"city\" string=\"true\">Bonn</｜DSML｜parameter>\n"
      "<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n"
      "</｜DSML｜invoke>\n<｜DSML｜invoke name=\"now\">\n\n</｜DSML｜invoke>\n"
      "</｜DSML｜function_calls>",
      absl::StrCat("<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
                   "<|tool_call_argument_begin|>",
                   json,
                   "<|tool_call_end|><|tool_call_begin|>"
                   "functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
                   "<|tool_calls_section_end|>")};
  for (size_t i = 0; i < texts.size(); ++i) {
    const ToolSyntax syntax = kForms[i].syntax;
    const OutputMarkers markers(*tokenizer_, {syntax, ThinkSyntax::kNone});
    const TokenGrammar grammar =
        Compiled(*ToolCallGrammar(Tools(), NumCalls::kOneOrMore, syntax, markers));
    const std::unique_ptr<TokenMatcher> matcher = *grammar.NewMatcher();
    std::string written;
    for (const uint32_t id : tokenizer_->Encode(texts[i], BosPolicy::kNone)) {
      ASSERT_TRUE(*matcher->Accept(static_cast<int32_t>(id)))
          << kForms[i].name << ": " << written << " and then " << tokenizer_->BytesOf(id);
      written += tokenizer_->BytesOf(id);
    }
    EXPECT_TRUE(*matcher->Accept(kEos) && matcher->HasEnded()) << kForms[i].name;
    const MessageDelta message = Read(syntax, tokenizer_->Encode(texts[i], BosPolicy::kNone));
    ASSERT_EQ(message.tool_calls.size(), 2u) << kForms[i].name;
    EXPECT_EQ(message.tool_calls[0].arguments, json) << kForms[i].name;
  }
}

TEST_F(ToolCallGrammarTest, RefusesNamesThatNoCallCanCarry) {
  const OutputMarkers markers(*tokenizer_, {ToolSyntax::kV3, ThinkSyntax::kNone});
  for (const char* name : {"", "a b", "a\nb", "a\"b", "a<b"}) {
    std::vector<ChatTool> tools(1);
    tools[0].name = name;
    tools[0].parameters = "{}";
    const auto grammar = ToolCallGrammar(tools, NumCalls::kOne, ToolSyntax::kV3, markers);
    EXPECT_TRUE(absl::IsInvalidArgument(grammar.status())) << name;
    EXPECT_THAT(std::string(grammar.status().message()), HasSubstr("its name must have"));
  }
  const OutputMarkers others(*tokenizer_, {ToolSyntax::kKimiK2, ThinkSyntax::kNone});
  EXPECT_TRUE(absl::IsFailedPrecondition(
      ToolCallGrammar(Tools(), NumCalls::kOne, ToolSyntax::kDsml, others).status()));
}

}  // namespace
}  // namespace fathom
