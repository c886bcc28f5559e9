#include "gateway/text/byte_trie.h"

#include <algorithm>

#include "base/check.h"

namespace fathom {

void ByteTrie::Insert(std::string_view string, int value) {
  CHECK_GE(value, 0);
  int node = kRoot;
  for (const char byte : string) {
    const auto [edge, is_new] = children_.try_emplace(Key(node, byte), num_nodes());
    if (is_new) {
      values_.push_back(kNoValue);
      depths_.push_back(depths_[node] + 1);
    }
    node = edge->second;
  }
  if (values_[node] == kNoValue) values_[node] = value;
}

std::vector<ByteTrie::Edge> ByteTrie::EdgesByDepth() const {
  std::vector<Edge> edges;
  edges.reserve(children_.size());
  for (const auto& [key, child] : children_) {
    edges.push_back({.parent = static_cast<int>(key >> 8),
                     .child = child,
                     .byte = static_cast<uint8_t>(key & 0xff)});
  }
  std::sort(edges.begin(), edges.end(), [this](const Edge& a, const Edge& b) {
    return std::pair(depths_[a.child], a.child) < std::pair(depths_[b.child], b.child);
  });
  return edges;
}

ByteTrie::Match ByteTrie::LongestPrefixOf(std::string_view text) const {
  Match match;
  int node = kRoot;
  for (size_t i = 0; i < text.size(); ++i) {
    node = Child(node, text[i]);
    if (node == kNoNode) break;
    if (values_[node] != kNoValue) match = {.bytes = i + 1, .value = values_[node]};
  }
  return match;
}

}  // namespace fathom
