// A set of byte strings as a tree, with a number at the end of each.
//
// For a few thousand strings: one hash-table entry per byte. Not thread-safe while strings are
// inserted, thread-safe afterwards.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace fathom {

class ByteTrie {
 public:
  static constexpr int kRoot = 0;
  static constexpr int kNoNode = -1;
  static constexpr int kNoValue = -1;

  struct Edge {
    int parent;
    int child;
    uint8_t byte;
  };
  struct Match {
    size_t bytes = 0;
    int value = kNoValue;
  };

  // `value` ≥ 0. A string that is already there keeps its first value.
  void Insert(std::string_view string, int value);

  // The node that `byte` leads to from `node`, or kNoNode.
  int Child(int node, char byte) const {
    auto edge = children_.find(Key(node, byte));
    return edge == children_.end() ? kNoNode : edge->second;
  }

  // The value of the string that ends at `node`, or kNoValue.
  int value(int node) const { return values_[node]; }

  // How many bytes lead to `node`.
  int depth(int node) const { return depths_[node]; }

  int num_nodes() const { return static_cast<int>(values_.size()); }

  // Every edge, parents before children and shorter paths before longer ones.
  std::vector<Edge> EdgesByDepth() const;

  // The longest string of the set that `text` begins with; kNoValue when there is none.
  Match LongestPrefixOf(std::string_view text) const;

 private:
  static uint64_t Key(int node, char byte) {
    return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
  }

  absl::flat_hash_map<uint64_t, int> children_;
  std::vector<int> values_ = {kNoValue};  // [node]
  std::vector<int> depths_ = {0};         // [node]
};

}  // namespace fathom
