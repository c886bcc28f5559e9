#include "coordinator/prefix_index.h"

#include <cstdint>

namespace fathom {

std::vector<BlockHash> PrefixIndex::ChunksOf(const BlockHasher& hasher, const Request& request) {
  std::vector<BlockHash> chunks;
  const absl::Span<const uint32_t> prompt(request.prompt_token_ids);
  BlockHash hash = hasher.Root(request.cache_salt);
  for (size_t begin = 0; begin + kChunkTokens <= prompt.size(); begin += kChunkTokens) {
    hash = hasher.Next(hash, prompt.subspan(begin, kChunkTokens));
    chunks.push_back(hash);
  }
  return chunks;
}

int PrefixIndex::CountKnown(absl::Span<const BlockHash> chunks) const {
  int count = 0;
  for (const BlockHash& chunk : chunks) {
    if (!places_.contains(chunk)) break;
    ++count;
  }
  return count;
}

void PrefixIndex::Use(absl::Span<const BlockHash> chunks) {
  for (size_t i = chunks.size(); i > 0; --i) {
    const BlockHash& chunk = chunks[i - 1];
    const auto [place, is_new] = places_.try_emplace(chunk);
    if (is_new) {
      place->second = by_use_.insert(by_use_.begin(), chunk);
    } else {
      by_use_.splice(by_use_.begin(), by_use_, place->second);
    }
  }
  while (by_use_.size() > kMaxChunks) {
    places_.erase(by_use_.back());
    by_use_.pop_back();
  }
}

void PrefixIndex::Clear() {
  places_.clear();
  by_use_.clear();
}

}  // namespace fathom
