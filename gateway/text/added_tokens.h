// Added tokens: pieces of text that are one token wherever they stand, such as `<｜User｜>`.
//
// They are found before anything else looks at the text, leftmost first and the longest of several
// at one place. Those that are `normalized` are looked for only in what the others left, as in
// Hugging Face's library. Linear time. Immutable, thread-safe.
// Source: huggingface/tokenizers tokenizer/added_vocabulary.rs.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "gateway/text/byte_trie.h"

namespace fathom {

struct AddedToken {
  uint32_t id = 0;
  std::string content;      // not empty; at most kMaxBytes, which bounds the work per character
  bool lstrip = false;      // takes white space before it
  bool rstrip = false;      // takes white space behind it
  bool normalized = false;  // found in a second pass
  bool special = false;     // left out by skip_special_tokens

  static constexpr size_t kMaxBytes = 512;
};

class AddedTokens {
 public:
  // `tokens` have different contents.
  explicit AddedTokens(std::vector<AddedToken> tokens);

  // Calls `text_piece` and `token` for the pieces of `text` (valid UTF-8) in order; text pieces
  // are not empty.
  void Split(std::string_view text, absl::FunctionRef<void(std::string_view)> text_piece,
             absl::FunctionRef<void(uint32_t)> token) const;

  const AddedToken* Find(std::string_view content) const;
  const std::vector<AddedToken>& all() const { return tokens_; }

 private:
  // The tokens that one pass looks for.
  struct Pass {
    ByteTrie contents;  // index into tokens_
    std::array<bool, 256> is_first_byte{};
  };

  void SplitPass(const Pass& pass, std::string_view text,
                 absl::FunctionRef<void(std::string_view)> text_piece,
                 absl::FunctionRef<void(uint32_t)> token) const;

  const std::vector<AddedToken> tokens_;
  Pass verbatim_;
  Pass normalized_;
};

}  // namespace fathom
