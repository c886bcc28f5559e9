// What an output must look like, as a client says it. A value; thread-compatible.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace fathom {

struct Grammar {
  enum class Kind {
    kJsonSchema = 1,     // a JSON Schema (2020-12); the output is JSON with any white space
    kRegex = 2,          // a regular expression that the whole output matches
    kEbnf = 3,           // rules in xgrammar's EBNF, beginning at `root`
    kStructuralTag = 4,  // xgrammar's structural tag in JSON: schemas, texts and tokens in a row
  };
  Kind kind = Kind::kJsonSchema;
  std::string text;

  bool operator==(const Grammar&) const = default;
  template <typename H>
  friend H AbslHashValue(H state, const Grammar& grammar) {
    return H::combine(std::move(state), grammar.kind, grammar.text);
  }
};

inline constexpr size_t kMaxGrammarBytes = size_t{64} << 10;

}  // namespace fathom
