#include "tests/gateway/tool_model_fixture.h"

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace fathom {

constexpr char kTiny[] = "tests/golden/tokenizer_tiny";

ToolModelTest::ToolModelTest() {
  char folder[] = "/tmp/fathom-tool-model-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  folder_ = folder;
  std::ostringstream text;
  text << std::ifstream(std::string(kTiny) + "/tokenizer.json").rdbuf();
  std::string json = text.str();
  std::string tokens;
  uint32_t id = 512;
  for (const char* part : {"calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep",
                           "outputs▁begin", "outputs▁end", "output▁begin", "output▁end"}) {
    absl::StrAppend(&tokens, "{\"id\":", id++, ",\"content\":\"<｜tool▁", part,
                    "｜>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
                    "\"normalized\":true,\"special\":false},");
  }
  constexpr std::string_view kBegin = "\"added_tokens\": [";
  json.insert(json.find(kBegin) + kBegin.size(), tokens);
  std::ofstream(folder_ + "/tokenizer.json") << json;
  std::filesystem::copy(std::string(kTiny) + "/tokenizer_config.json", folder_);
  tokenizer_ = *Tokenizer::Load(folder_);
  options_.model_dir = folder_;
  options_.chat_encoding = "deepseek_v31";
  coordinator_.model_info().set_vocab_size(id);
  coordinator_.model_info().set_max_model_len(4096);
}

ToolModelTest::~ToolModelTest() { std::filesystem::remove_all(folder_); }

std::string ToolModelTest::LastPrompt() const {
  std::string text;
  const v1::GenerateRequest request = coordinator_.requests().back();
  for (const uint32_t id : request.prompt_token_ids()) text += tokenizer_->BytesOf(id);
  return text;
}

}  // namespace fathom
