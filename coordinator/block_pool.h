// The names of the KV blocks of one domain: which are free, which are taken.
//
// Ranks that hold the same KV form a domain; a block id means the same memory on each of them. The
// pool knows neither bytes nor layers nor who owns a block. Freed blocks are handed out again first
// (last in, first out), so a lightly loaded server keeps touching the same memory.
//
// Taking more than is free, freeing what is free and freeing a stranger's id are our bugs: CHECK.
// Not thread-safe; only Scheduler calls it.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

class BlockPool {
 public:
  // Blocks are numbered [0, num_blocks); the lowest are handed out first.
  explicit BlockPool(int num_blocks);

  int num_blocks() const { return num_blocks_; }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_used() const { return num_blocks_ - num_free(); }

  // Appends `count` blocks to `block_table`. There must be that many: ask num_free() first.
  void Take(int count, std::vector<int32_t>& block_table);

  // Gives back all blocks of `block_table` and empties it.
  void Release(std::vector<int32_t>& block_table);

 private:
  const int num_blocks_;
  std::vector<int32_t> free_;   // a stack
  std::vector<bool> is_taken_;  // by block id
};

}  // namespace fathom
