// Byte-pair encoding: a word's bytes, joined pair by pair in the order the merges were learnt.
//
// Always the pair with the lowest rank is joined next, the leftmost of equals, as Hugging Face's
// library does. A queue makes that O(n log n) in the length of the word, which may be a megabyte
// of the same letter. Words that are a token by themselves (most are) cost one look-up: which ones
// are is found out once, at construction, by encoding every token.
// Immutable: Encode may be called from any thread, each with its own Workspace.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace fathom {

class BytePairEncoder {
 public:
  // `left` and `right`, side by side, become `joined`. The rank is the place in the list.
  struct Merge {
    uint32_t left;
    uint32_t right;
    uint32_t joined;
  };
  struct Token {
    std::string bytes;
    uint32_t id;
  };

  class Workspace;

  // `byte_ids[b]` is the token of byte b alone. `tokens` are the words that the merges may make;
  // no pair may be in `merges` twice.
  BytePairEncoder(const std::array<uint32_t, 256>& byte_ids, const std::vector<Merge>& merges,
                  std::vector<Token> tokens);

  BytePairEncoder(const BytePairEncoder&) = delete;
  BytePairEncoder& operator=(const BytePairEncoder&) = delete;

  // Appends the ids of `word` (shorter than 4 GiB) to `ids`.
  void Encode(std::string_view word, Workspace& workspace, std::vector<uint32_t>& ids) const;

 private:
  struct RankedMerge {
    uint32_t rank;
    uint32_t joined;
  };

  static uint64_t Key(uint32_t left, uint32_t right) {
    return static_cast<uint64_t>(left) << 32 | right;
  }
  void EncodeByMerging(std::string_view word, Workspace& workspace,
                       std::vector<uint32_t>& ids) const;
  void RankPair(uint32_t position, Workspace& workspace) const;
  void MergePair(uint32_t position, Workspace& workspace) const;

  const std::array<uint32_t, 256> byte_ids_;
  const std::vector<Token> tokens_;  // owns the keys of whole_words_
  absl::flat_hash_map<uint64_t, RankedMerge> merges_;
  absl::flat_hash_map<std::string_view, uint32_t, std::hash<std::string_view>> whole_words_;
};

// Memory that Encode uses again from word to word. Not thread-safe.
class BytePairEncoder::Workspace {
 private:
  friend class BytePairEncoder;

  static constexpr uint32_t kNone = 0xFFFFFFFF;

  // A piece of the word, linked to its neighbours; a piece that was joined to the one before it is
  // left where it is, with no rank.
  struct Symbol {
    uint32_t id;
    uint32_t previous;
    uint32_t next;
    uint32_t rank;    // of the pair it forms with the next one; kNone: they do not merge
    uint32_t joined;  // what the two become
  };

  std::vector<Symbol> symbols_;
  std::vector<uint64_t> queue_;  // heap of rank << 32 | position; entries may be out of date
};

}  // namespace fathom
