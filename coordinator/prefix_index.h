// Which beginnings of prompts a worker group has seen lately, and so may still hold the KV of.
//
// A prompt is cut into chunks of kChunkTokens, each named together with all before it and the
// request's salt (block_hash). Names are guesses: they say where to send a request, and the group's
// own BlockPool decides what is shared. The most recently used kMaxChunks of them are kept. Not
// thread-safe; only GroupRouter calls it.
#pragma once

#include <list>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"
#include "coordinator/block_hash.h"
#include "coordinator/request.h"

namespace fathom {

class PrefixIndex {
 public:
  static constexpr int kChunkTokens = 64;
  static constexpr int kMaxChunks = 16384;  // a million tokens

  // The names of a prompt's full chunks. Pure.
  static std::vector<BlockHash> ChunksOf(const BlockHasher& hasher, const Request& request);

  // How many chunks are known, from the first on.
  int CountKnown(absl::Span<const BlockHash> chunks) const;

  // They are used now. Of a prompt the end counts as used longer ago than the beginning, without
  // which it could not be found.
  void Use(absl::Span<const BlockHash> chunks);

  void Clear();

 private:
  struct Hash {
    size_t operator()(const BlockHash& hash) const { return hash.low; }
  };

  std::list<BlockHash> by_use_;  // the last used first
  std::unordered_map<BlockHash, std::list<BlockHash>::iterator, Hash> places_;
};

}  // namespace fathom
