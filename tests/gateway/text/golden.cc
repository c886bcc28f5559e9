#include "tests/gateway/text/golden.h"

#include <fstream>
#include <sstream>
#include <string_view>

#include "base/check.h"
#include "simdjson.h"

namespace fathom {
namespace {

using simdjson::dom::element;

std::string StringAt(element object, std::string_view key) {
  return std::string(object[key].get_string().value());
}

// A copy: a range-for over the result itself would read a temporary that is gone.
simdjson::dom::array Items(simdjson::simdjson_result<element> result) {
  simdjson::dom::array items = result.get_array();
  return items;
}

std::vector<uint32_t> IdsAt(element object, std::string_view key) {
  std::vector<uint32_t> ids;
  for (const element id : Items(object[key])) {
    ids.push_back(static_cast<uint32_t>(id.get_uint64().value()));
  }
  return ids;
}

bool Has(element object, std::string_view key) {
  const auto value = object[key];
  return value.error() == simdjson::SUCCESS && !value.is_null();
}

ChatMessage::Role RoleFrom(std::string_view name) {
  if (name == "system") return ChatMessage::Role::kSystem;
  if (name == "user") return ChatMessage::Role::kUser;
  if (name == "assistant") return ChatMessage::Role::kAssistant;
  CHECK(name == "tool") << name;
  return ChatMessage::Role::kTool;
}

ChatMessage MessageFrom(element object) {
  ChatMessage message;
  message.role = RoleFrom(object["role"].get_string().value());
  if (Has(object, "content")) message.content = StringAt(object, "content");
  if (!Has(object, "tool_calls")) return message;
  for (const element call : Items(object["tool_calls"])) {
    const element function = call["function"].value();
    message.tool_calls.push_back(
        {"", StringAt(call, "type"), StringAt(function, "name"), StringAt(function, "arguments")});
  }
  return message;
}

std::unique_ptr<Tokenizer> LoadOrDie(const char* model_dir) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(model_dir);
  CHECK(tokenizer.ok()) << tokenizer.status().message();
  return *std::move(tokenizer);
}

}  // namespace

std::string ReadGoldenFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good()) << path << " (run in the source tree)";
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<TextVector> ReadTextVectors(const std::string& model_dir) {
  simdjson::dom::parser parser;
  std::vector<TextVector> vectors;
  for (const element object : Items(parser.load(model_dir + "/vectors.json"))) {
    TextVector vector{StringAt(object, "text"), IdsAt(object, "ids"), std::nullopt};
    if (Has(object, "decoded_skip_special")) {
      vector.decoded_skip_special = StringAt(object, "decoded_skip_special");
    }
    vectors.push_back(std::move(vector));
  }
  return vectors;
}

std::vector<ChatVector> ReadChatVectors(const std::string& path) {
  simdjson::dom::parser parser;
  std::vector<ChatVector> vectors;
  for (const element object : Items(parser.load(path))) {
    ChatVector vector;
    for (const element message : Items(object["messages"])) {
      vector.messages.push_back(MessageFrom(message));
    }
    vector.options.add_generation_prompt = object["add_generation_prompt"].get_bool().value();
    vector.text = StringAt(object, "text");
    if (Has(object, "ids")) vector.ids = IdsAt(object, "ids");
    vectors.push_back(std::move(vector));
  }
  return vectors;
}

const Tokenizer& V3Tokenizer() {
  static const Tokenizer& tokenizer = *LoadOrDie(kGoldenV3).release();
  return tokenizer;
}

std::unique_ptr<Tokenizer> ThinkingTokenizer() {
  std::string json = ReadGoldenFile(std::string(kGoldenV3) + "/tokenizer.json");
  // 128798 and 128799 are what DeepSeek-R1 and later use for thoughts.
  int place = 799;
  for (const char* token :
       {"</think>", "<think>", "｜DSML｜", "<|im_system|>", "<|im_user|>", "<|im_assistant|>",
        "<|im_middle|>", "<|im_end|>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
        "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"}) {
    const std::string free = "<｜place▁holder▁no▁" + std::to_string(place--) + "｜>";
    for (size_t at; (at = json.find('"' + free + '"')) != std::string::npos;) {
      json.replace(at + 1, free.size(), token);
      constexpr std::string_view kSpecial = "\"special\": true";  // the real ones are not
      const size_t special = json.find(kSpecial, at);
      if (special < json.find('}', at)) {
        json.replace(special, kSpecial.size(), "\"special\": false");
      }
    }
  }
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      Tokenizer::Parse(json, ReadGoldenFile(std::string(kGoldenV3) + "/tokenizer_config.json"), "");
  CHECK(tokenizer.ok()) << tokenizer.status().message();
  return *std::move(tokenizer);
}

const Tokenizer& TinyTokenizer() {
  static const Tokenizer& tokenizer = *LoadOrDie(kGoldenTiny).release();
  return tokenizer;
}

}  // namespace fathom
