// Golden data of the text tests: vectors made by Hugging Face's library and by Jinja2.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gateway/text/chat_encoding.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

inline constexpr char kGoldenV3[] = "tests/golden/tokenizer_v3";
inline constexpr char kGoldenTiny[] = "tests/golden/tokenizer_tiny";
inline constexpr char kGoldenChatV3_0324[] = "tests/golden/chat_v3_0324";

struct TextVector {
  std::string text;
  std::vector<uint32_t> ids;                        // without BOS
  std::optional<std::string> decoded_skip_special;  // where it differs from text
};
std::vector<TextVector> ReadTextVectors(const std::string& model_dir);

struct ChatVector {
  std::vector<ChatMessage> messages;
  ChatOptions options;
  std::string text;
  std::vector<uint32_t> ids;  // empty where the file has none
};
std::vector<ChatVector> ReadChatVectors(const std::string& path);

// DeepSeek-V3's tokenizer, loaded once per program, and the one with 512 tokens.
const Tokenizer& V3Tokenizer();
const Tokenizer& TinyTokenizer();

// DeepSeek-V3's tokenizer with the tokens of its successors in places it holds free: <think>,
// </think>, ｜DSML｜ and Kimi's.
std::unique_ptr<Tokenizer> ThinkingTokenizer();

// The text of a file that must be there.
std::string ReadGoldenFile(const std::string& path);

}  // namespace fathom
