// The KV blocks of one domain: who uses them, and what the full ones hold.
//
// Ranks that hold the same KV form a domain; a block id means the same memory on each of them. The
// pool knows neither bytes nor layers nor requests. It counts the users of each block: a block
// without users is free, and is handed out again.
//
// A full block can be published under a name for its tokens and all those before them. Others find
// it by that name and use it too, also when it is free: its memory keeps what it holds until it is
// handed out for something else. Free blocks that nobody can find go first, freed last handed out
// first, so that a lightly loaded server keeps touching the same memory; then the published ones,
// least recently used first. Of a block table the end counts as used longer ago than the beginning,
// without which it could not be found.
//
// The hash in a name only says where to look. What is compared is the content: the block's own
// token ids and the prefix before it, which has a number that no other prefix in this pool ever
// has. Names whose hashes clash live side by side.
//
// Everything is allocated at construction. All operations take constant time for a block.
// Taking more than is free, freeing what is free and naming a stranger's id are our bugs: CHECK.
// Not thread-safe; only Scheduler calls it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "base/huge_pages.h"
#include "coordinator/block_hash.h"
#include "coordinator/long_list.h"

namespace fathom {

// Numbers the prefixes that were ever published in a pool; each ends with a block.
using PrefixId = uint64_t;
inline constexpr PrefixId kEmptyPrefix = 0;

// The blocks of a sequence, in order.
using BlockTable = LongList<int32_t>;

// What a full block holds.
struct BlockContent {
  BlockHash hash;                        // of all that follows, and of the salt
  PrefixId previous = kEmptyPrefix;      // what stands before the block
  absl::Span<const uint32_t> token_ids;  // block_size of them
};

class BlockPool {
 public:
  // Blocks are numbered [0, num_blocks); the lowest are handed out first.
  BlockPool(int num_blocks, int block_size);

  int num_blocks() const { return num_blocks_; }
  int num_free() const { return num_free_; }
  int num_used() const { return num_blocks_ - num_free_; }
  bool is_free(int32_t block) const { return num_users_.at(block) == 0; }

  // Appends `count` blocks to `block_table`, whatever they held. There must be that many: ask
  // num_free() first.
  void Take(int count, BlockTable& block_table);

  // Ends one use of every block of `block_table` and empties it.
  void Release(BlockTable& block_table);

  struct Found {
    int32_t block;
    PrefixId prefix;  // that ends with it
  };
  // The block that holds this content, used or free.
  std::optional<Found> Find(const BlockContent& content) const;

  // Fetches the memory in which this name is going to be looked up. Called for some names at once
  // it takes little longer than for one. It is a load because processors drop prefetches for which
  // they would have to find a page, and most do here.
  void Touch(const BlockHash& hash) const {
    static_cast<void>(static_cast<const volatile Place&>(places_[HomeOf(hash.low)]).block);
  }

  // Adds a use to blocks that Find named and appends them to `block_table`. Nothing may have been
  // taken in between.
  void Share(absl::Span<const int32_t> blocks, BlockTable& block_table);

  // Lets others find a used block by its content. Where another block is known for the same, that
  // one stays the one that is found if it is used, and becomes an unpublished one if it is free.
  // Either way the result is the number of the prefix that ends here.
  PrefixId Publish(int32_t block, const BlockContent& content);

  // From now on nobody finds these blocks; they keep their users. Unpublished ones stay so.
  void Unpublish(absl::Span<const int32_t> blocks);

 private:
  static constexpr int32_t kNone = -1;
  struct Block {
    // When published; prefix is kEmptyPrefix otherwise.
    PrefixId prefix = kEmptyPrefix;
    PrefixId previous = kEmptyPrefix;
    BlockHash hash;
    // When published and free: neighbours in the order of last use.
    int32_t older = kNone;
    int32_t newer = kNone;
  };

  template <typename T>
  using Table = std::vector<T, HugePageAllocator<T>>;
  // Of the table by which published blocks are found: the lowest bits of a block's hash, which tell
  // most others from it without a look at the block, and the block.
  struct Place {
    uint32_t hash = 0;
    int32_t block = kNone;
  };
  size_t HomeOf(uint64_t hash) const { return hash & (places_.size() - 1); }
  size_t After(size_t place) const { return (place + 1) & (places_.size() - 1); }
  bool Holds(int32_t block, const BlockContent& content) const;
  // Into and out of the table by which published blocks are found.
  void Enter(int32_t block, PrefixId prefix, const BlockContent& content);
  void Remove(int32_t block);
  // Into and out of the published free blocks, where `block` becomes the last used.
  void Append(int32_t block);
  void Unlink(int32_t block);
  int32_t TakeOne();

  const int num_blocks_;
  const int block_size_;
  int num_free_;
  PrefixId last_prefix_ = kEmptyPrefix;
  Table<int> num_users_;  // by block id
  // By block id. One more stands at both ends of the published free blocks: the block newer than
  // it is the least recently used one.
  Table<Block> blocks_;
  Table<uint32_t> token_ids_;  // of published blocks: block_size_ for each block id
  // Open addressing: a block is in the first place from its home on that was free. A power of two
  // of places, of which a quarter at least are free.
  Table<Place> places_;
  std::vector<int32_t> unnamed_;  // free and not published; a stack
};

}  // namespace fathom
