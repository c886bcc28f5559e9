#include "coordinator/block_pool.h"

#include "base/check.h"

namespace fathom {

BlockPool::BlockPool(int num_blocks) : num_blocks_(num_blocks), is_taken_(num_blocks, false) {
  CHECK_GT(num_blocks, 0);
  free_.reserve(num_blocks);
  for (int block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

void BlockPool::Take(int count, std::vector<int32_t>& block_table) {
  CHECK_GE(count, 0);
  CHECK_LE(count, num_free());
  for (int i = 0; i < count; ++i) {
    const int32_t block = free_.back();
    free_.pop_back();
    CHECK(!is_taken_[block]) << "block " << block << " was free and taken at once";
    is_taken_[block] = true;
    block_table.push_back(block);
  }
}

void BlockPool::Release(std::vector<int32_t>& block_table) {
  // Backwards, so that the next sequence gets them in the order this one had.
  for (auto block = block_table.rbegin(); block != block_table.rend(); ++block) {
    CHECK_GE(*block, 0);
    CHECK_LT(*block, num_blocks_);
    CHECK(is_taken_[*block]) << "block " << *block << " is freed twice";
    is_taken_[*block] = false;
    free_.push_back(*block);
  }
  CHECK_LE(num_free(), num_blocks_);
  block_table.clear();
}

}  // namespace fathom
