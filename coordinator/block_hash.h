// Names for prefixes: what a full KV block holds, together with all tokens before it, in 128 bits.
//
// The hash of a block is that of the previous block's hash and of its own token ids; the first
// block's predecessor is the hash of the request's salt. A secret drawn at random keeps others from
// making names that clash. A name only says where to look: BlockPool compares the tokens as well.
//
// Immutable after construction, so thread-safe. Source: XXH3 with a secret (xxHash 0.8).
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "absl/types/span.h"

namespace fathom {

struct BlockHash {
  uint64_t low = 0;
  uint64_t high = 0;
  bool operator==(const BlockHash&) const = default;
};

class BlockHasher {
 public:
  static constexpr int kMaxBlockTokens = 128;

  struct Options {
    int num_bits = 128;  // of a hash that are kept; fewer only where a test wants them to clash
  };

  explicit BlockHasher(Options options);  // draws the secret

  // What stands before the first block of a request with that salt; most have none, "".
  BlockHash Root(std::string_view salt) const;

  // Of the block that holds `token_ids` and follows the one named `previous`.
  BlockHash Next(const BlockHash& previous, absl::Span<const uint32_t> token_ids) const;

 private:
  BlockHash HashOf(const void* data, size_t num_bytes) const;

  const Options options_;
  std::array<uint32_t, 48> secret_;  // 192 bytes, as long as xxHash's own
};

}  // namespace fathom
