// Any bytes as tokenizer.json, and as tokenizer_config.json beside a good one: refused or used,
// never trusted.
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>

#include "gateway/text/chat_encoding.h"
#include "gateway/text/detokenizer.h"
#include "gateway/text/tokenizer.h"

namespace fathom {
namespace {

std::string ReadFile(const char* path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void Use(const Tokenizer& tokenizer) {
  const std::vector<uint32_t> ids =
      tokenizer.Encode("Hello  <think> 世界\n123", BosPolicy::kAsConfigured);
  Decode(tokenizer, ids, {});
  const auto encoder = ChatEncoder::Create(tokenizer);
  if (!encoder.ok()) return;
  ChatMessage message;
  message.content = "Hi";
  encoder->Encode({message}, {}).IgnoreError();
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string& good =
      *new std::string(fathom::ReadFile("tests/fuzz/corpus/tokenizer_file/seed_0").substr(1));
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool is_config = data[0] % 4 == 0;
  const auto tokenizer =
      is_config ? fathom::Tokenizer::Parse(good, text, "") : fathom::Tokenizer::Parse(text, "", "");
  if (tokenizer.ok()) fathom::Use(**tokenizer);
  return 0;
}
