// Any tokens in each format: one chunk, single tokens and a random cut give the same message.
//
// The first byte chooses the format and what is known before, the second the cut; the rest are
// tokens: below 0x80 that character, from there on a marker or a piece of one.
#include <cstdint>
#include <random>
#include <string>

#include "base/check.h"
#include "tests/gateway/text/golden.h"
#include "tests/gateway/text/output_reader.h"

namespace fathom {
namespace {

constexpr const char* kPieces[] = {"<think>",
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
                                   "function_calls>",
                                   "invoke",
                                   " name=\"",
                                   "parameter",
                                   "\" string=\"true\">",
                                   "\" string=\"false\">",
                                   "</",
                                   "\n\n<",
                                   "\n```",
                                   "```json\n",
                                   "functions.f:0",
                                   "世界",
                                   "{\"a\": 1}"};
constexpr OutputSyntax kSyntaxes[] = {{ToolSyntax::kV3, ThinkSyntax::kNone},
                                      {ToolSyntax::kV3, ThinkSyntax::kThinkTags},
                                      {ToolSyntax::kV31, ThinkSyntax::kThinkTags},
                                      {ToolSyntax::kDsml, ThinkSyntax::kThinkTags},
                                      {ToolSyntax::kKimiK2, ThinkSyntax::kThinkTags}};

const Tokenizer& TheTokenizer() {
  static const Tokenizer& tokenizer = *ThinkingTokenizer().release();
  return tokenizer;
}

std::vector<std::vector<uint32_t>> IdsOfBytes() {
  std::vector<std::vector<uint32_t>> ids;
  for (size_t byte = 0; byte < 256; ++byte) {
    const std::string text = byte < 0x80 ? std::string(1, static_cast<char>(byte))
                                         : kPieces[(byte - 0x80) % std::size(kPieces)];
    ids.push_back(TheTokenizer().Encode(text, BosPolicy::kNone));
  }
  return ids;
}

void Check(const uint8_t* data, size_t size) {
  static const std::vector<std::vector<uint32_t>>& ids_of_bytes =
      *new std::vector<std::vector<uint32_t>>(IdsOfBytes());
  if (size < 2) return;
  OutputParserOptions options;
  options.syntax = kSyntaxes[(data[0] & 0x0F) % std::size(kSyntaxes)];
  options.begins_in_thinking = (data[0] & 0x10) != 0;
  options.calls_tools = (data[0] & 0x20) == 0;
  options.only_one_call = (data[0] & 0x40) != 0;
  options.include_reasoning = (data[0] & 0x80) == 0;
  std::mt19937_64 random(data[1]);
  std::vector<uint32_t> ids;
  for (size_t i = 2; i < size; ++i) {
    const std::vector<uint32_t>& more = ids_of_bytes[data[i]];
    ids.insert(ids.end(), more.begin(), more.end());
  }
  const std::string whole = Shown(ReadOutput(TheTokenizer(), options, OneChunk(ids)));
  CHECK(Shown(ReadOutput(TheTokenizer(), options, SingleTokens(ids))) == whole);
  CHECK(Shown(ReadOutput(TheTokenizer(), options, RandomChunks(ids, random))) == whole);
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fathom::Check(data, size);
  return 0;
}
