#include "coordinator/block_pool.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace fathom {

BlockPool::BlockPool(int num_blocks, int block_size)
    : num_blocks_(num_blocks), block_size_(block_size), num_free_(num_blocks) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(block_size, 0);
  num_users_.resize(num_blocks);
  blocks_.resize(num_blocks + 1);
  blocks_[num_blocks].older = blocks_[num_blocks].newer = num_blocks;
  token_ids_.resize(size_t{static_cast<unsigned>(num_blocks)} * block_size);
  places_.resize(std::bit_ceil(static_cast<size_t>(num_blocks) * 4 / 3 + 1));
  unnamed_.reserve(num_blocks);
  for (int block = num_blocks - 1; block >= 0; --block) unnamed_.push_back(block);
}

int32_t BlockPool::TakeOne() {
  if (!unnamed_.empty()) {
    const int32_t block = unnamed_.back();
    unnamed_.pop_back();
    // One that is going to be taken soon.
    constexpr size_t kAhead = 8;
    if (unnamed_.size() > kAhead) {
      __builtin_prefetch(&num_users_[unnamed_[unnamed_.size() - kAhead]], 1);
    }
    return block;
  }
  const int32_t least_recently_used = blocks_[num_blocks_].newer;
  CHECK_NE(least_recently_used, num_blocks_);
  Unlink(least_recently_used);
  Remove(least_recently_used);
  return least_recently_used;
}

void BlockPool::Take(int count, BlockTable& block_table) {
  CHECK_GE(count, 0);
  CHECK_LE(count, num_free());
  for (int i = 0; i < count; ++i) {
    const int32_t block = TakeOne();
    CHECK_EQ(num_users_[block], 0) << "block " << block << " was free and taken at once";
    num_users_[block] = 1;
    block_table.push_back(block);
  }
  num_free_ -= count;
}

void BlockPool::Release(BlockTable& block_table) {
  // Backwards, so that the next sequence gets them in the order this one had.
  for (int i = block_table.size() - 1; i >= 0; --i) {
    const int32_t id = block_table[i];
    CHECK_GE(id, 0);
    CHECK_LT(id, num_blocks_);
    CHECK_GT(num_users_[id], 0) << "block " << id << " is freed twice";
    if (--num_users_[id] > 0) continue;
    ++num_free_;
    if (blocks_[id].prefix != kEmptyPrefix) {
      Append(id);
    } else {
      unnamed_.push_back(id);
    }
  }
  block_table = {};
}

std::optional<BlockPool::Found> BlockPool::Find(const BlockContent& content) const {
  const auto hash = static_cast<uint32_t>(content.hash.low);
  for (size_t i = HomeOf(hash); places_[i].block != kNone; i = After(i)) {
    const int32_t block = places_[i].block;
    if (places_[i].hash == hash && Holds(block, content)) {
      return Found{.block = block, .prefix = blocks_[block].prefix};
    }
  }
  return std::nullopt;
}

bool BlockPool::Holds(int32_t block, const BlockContent& content) const {
  const Block& known = blocks_[block];
  return known.hash == content.hash && known.previous == content.previous &&
         std::equal(content.token_ids.begin(), content.token_ids.end(),
                    token_ids_.begin() + int64_t{block} * block_size_);
}

void BlockPool::Share(absl::Span<const int32_t> blocks, BlockTable& block_table) {
  for (const int32_t id : blocks) {
    CHECK_NE(blocks_[id].prefix, kEmptyPrefix) << "block " << id << " is not published";
    if (num_users_[id]++ == 0) {
      Unlink(id);
      --num_free_;
    }
    block_table.push_back(id);
  }
}

PrefixId BlockPool::Publish(int32_t block, const BlockContent& content) {
  CHECK_EQ(content.token_ids.size(), static_cast<size_t>(block_size_));
  CHECK_GT(num_users_[block], 0);
  CHECK_EQ(blocks_[block].prefix, kEmptyPrefix) << "block " << block << " is published already";
  const std::optional<Found> twin = Find(content);
  if (!twin.has_value()) {
    Enter(block, ++last_prefix_, content);
    return last_prefix_;
  }
  if (num_users_[twin->block] == 0) {
    // One copy is enough, and this one is in use: its user's next blocks stay within reach.
    Unlink(twin->block);
    Remove(twin->block);
    unnamed_.push_back(twin->block);
    Enter(block, twin->prefix, content);
  }
  return twin->prefix;
}

void BlockPool::Unpublish(absl::Span<const int32_t> blocks) {
  for (const int32_t block : blocks) {
    if (blocks_[block].prefix == kEmptyPrefix) continue;
    Remove(block);
    if (num_users_[block] > 0) continue;
    Unlink(block);
    unnamed_.push_back(block);
  }
}

void BlockPool::Enter(int32_t block, PrefixId prefix, const BlockContent& content) {
  Block& entered = blocks_[block];
  const auto hash = static_cast<uint32_t>(content.hash.low);
  size_t place = HomeOf(hash);
  while (places_[place].block != kNone) place = After(place);
  places_[place] = {.hash = hash, .block = block};
  entered.prefix = prefix;
  entered.previous = content.previous;
  entered.hash = content.hash;
  std::copy(content.token_ids.begin(), content.token_ids.end(),
            token_ids_.begin() + int64_t{block} * block_size_);
}

void BlockPool::Remove(int32_t block) {
  size_t hole = HomeOf(blocks_[block].hash.low);
  while (places_[hole].block != block) {
    CHECK_NE(places_[hole].block, kNone) << "block " << block << " has no place";
    hole = After(hole);
  }
  // Whoever stands behind it, up to the next free place, must not be cut off from its home.
  for (size_t i = After(hole); places_[i].block != kNone; i = After(i)) {
    const size_t distance_from_home = (i - HomeOf(places_[i].hash)) & (places_.size() - 1);
    const size_t distance_from_hole = (i - hole) & (places_.size() - 1);
    if (distance_from_home < distance_from_hole) continue;
    places_[hole] = places_[i];
    hole = i;
  }
  places_[hole] = {};
  blocks_[block].prefix = kEmptyPrefix;
}

void BlockPool::Append(int32_t block) {
  Block& end = blocks_[num_blocks_];
  blocks_[block].older = end.older;
  blocks_[block].newer = num_blocks_;
  blocks_[end.older].newer = block;
  end.older = block;
}

void BlockPool::Unlink(int32_t block) {
  const Block& unlinked = blocks_[block];
  blocks_[unlinked.older].newer = unlinked.newer;
  blocks_[unlinked.newer].older = unlinked.older;
}

}  // namespace fathom
