// Any bytes as a grammar, the first byte its kind: refused, or masks whose tokens it accepts.
//
// What hangs or eats memory is for the limits of grammar/compiler/session.h, which hold no process
// of ours here; so texts are short.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "base/check.h"
#include "grammar/compiler/token_grammar.h"

namespace fathom {
namespace {

constexpr size_t kMaxTextBytes = 200;
constexpr int kMaxTokens = 24;
constexpr int kEndOfSequence = 256;
constexpr int kVocabSize = 288;

// Every byte is a token, and then some words.
const TokenVocabulary& TheVocabulary() {
  static const TokenVocabulary& vocabulary = *[] {
    std::vector<std::string> bytes_of_id;
    for (int byte = 0; byte < 256; ++byte) bytes_of_id.emplace_back(1, static_cast<char>(byte));
    bytes_of_id.emplace_back();  // kEndOfSequence
    for (const char* word :
         {"true", "null", "\": ", "{\"", "\"}", "[]", "世界", "\xe4\xb8", "1e"}) {
      bytes_of_id.emplace_back(word);
    }
    return new TokenVocabulary(bytes_of_id, kVocabSize, {kEndOfSequence});
  }();
  return vocabulary;
}

// Writes what the grammar allows, each time another of the allowed tokens.
void Follow(const TokenGrammar& grammar, uint32_t choice) {
  const auto matcher = grammar.NewMatcher();
  CHECK(matcher.ok()) << matcher.status();
  std::vector<uint32_t> mask((kVocabSize + 31) / 32);
  for (int i = 0; i < kMaxTokens && !(*matcher)->HasEnded(); ++i) {
    const absl::Status filled = (*matcher)->FillMask(absl::MakeSpan(mask));
    CHECK(filled.ok()) << filled;
    std::vector<int32_t> allowed;
    for (int id = 0; id < kVocabSize; ++id) {
      if (mask[id / 32] >> (id % 32) & 1) allowed.push_back(id);
    }
    if (allowed.empty()) return;  // a grammar may lead nowhere
    choice = choice * 1664525 + 1013904223;
    const auto accepted = (*matcher)->Accept(allowed[choice % allowed.size()]);
    CHECK(accepted.ok()) << accepted.status();
    CHECK(*accepted) << allowed[choice % allowed.size()];
  }
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0 || size > fathom::kMaxTextBytes) return 0;
  constexpr fathom::Grammar::Kind kKinds[] = {fathom::Grammar::Kind::kJsonSchema,
                                              fathom::Grammar::Kind::kRegex,
                                              fathom::Grammar::Kind::kEbnf};
  const fathom::Grammar grammar = {kKinds[data[0] % 3],
                                   {reinterpret_cast<const char*>(data) + 1, size - 1}};
  const auto compiled = fathom::TokenGrammar::Compile(fathom::TheVocabulary(), grammar);
  if (compiled.ok()) {
    fathom::Follow(*compiled, data[0]);
  } else {
    CHECK(!compiled.status().message().empty());
  }
  return 0;
}
