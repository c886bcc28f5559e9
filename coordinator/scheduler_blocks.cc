// What Scheduler knows of KV blocks: how many a sequence takes, where there is room, what is found
// there, and which full blocks others may find.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "coordinator/scheduler.h"

namespace fathom {
namespace {

// How far ahead a loop over blocks asks for memory.
constexpr size_t kPrefetched = 16;

// How many tokens need not be computed if their KV is there: those whose outcome nobody waits for.
int MostTokensToSkip(const Sequence& sequence) {
  const Request& request = *sequence.request;
  const bool owes_prompt_logprobs =
      request.wants_prompt_logprobs &&
      sequence.num_prompt_logprobs_done < request.num_prompt_tokens() - 1;
  return owes_prompt_logprobs ? sequence.num_prompt_logprobs_done : sequence.num_tokens - 1;
}

}  // namespace

int Scheduler::BlocksFor(int num_tokens) const {
  return (num_tokens + options_.block_size - 1) / options_.block_size;
}

// Whose tokens are all known, and computed once the steps in flight have finished.
int Scheduler::NumFullBlocks(const Sequence& sequence) const {
  return std::min(sequence.num_computed, sequence.num_tokens) / options_.block_size;
}

// As above, and not published. Every step asks it of every sequence, so it does not divide.
bool Scheduler::HasFullBlock(const Sequence& sequence) const {
  const int end = (sequence.num_blocks_published + 1) * options_.block_size;
  return sequence.is_shared && std::min(sequence.num_computed, sequence.num_tokens) >= end;
}

// How many more it takes to compute so many tokens.
int Scheduler::BlocksToAdd(const Sequence& sequence, int num_tokens) const {
  const int excess = sequence.num_computed + num_tokens - sequence.num_blocks * options_.block_size;
  return excess <= 0 ? 0 : BlocksFor(excess);
}

int Scheduler::BlocksAboutToBeWanted(const Sequence& sequence) const {
  const int wanted = std::min(BlocksFor(sequence.num_tokens) + 1,
                              BlocksFor(sequence.num_prompt_tokens + sequence.max_tokens));
  return std::max(0, wanted - sequence.num_blocks);
}

std::vector<int> Scheduler::RoomOfDomains() const {
  std::vector<int> room;
  for (const BlockPool& pool : block_pools_) room.push_back(pool.num_free());
  for (const Sequence* sequence : running_) {
    room[sequence->kv_domain] -= BlocksAboutToBeWanted(*sequence);
  }
  return room;
}

int Scheduler::num_free_blocks() const {
  int num_free = 0;
  for (const BlockPool& pool : block_pools_) num_free += pool.num_free();
  return num_free;
}

int Scheduler::TokensThatFit(const Sequence& sequence) const {
  const int64_t num_blocks =
      int64_t{sequence.num_blocks} + block_pools_[sequence.kv_domain].num_free();
  const int64_t num_tokens = num_blocks * options_.block_size - sequence.num_computed;
  return static_cast<int>(std::min<int64_t>(num_tokens, sequence.num_pending()));
}

// The longest run of blocks in that domain that hold the beginning of the sequence.
Scheduler::Home Scheduler::FindIn(int kv_domain, Sequence& sequence) const {
  Home home{.kv_domain = kv_domain,
            .num_wanted = BlocksFor(sequence.num_tokens),
            .blocks = {},
            .prefix = kEmptyPrefix};
  if (!options_.share_prefixes) return home;
  const BlockPool& pool = block_pools_[kv_domain];
  const int most_blocks = MostTokensToSkip(sequence) / options_.block_size;
  for (int i = 0; i < most_blocks; ++i) {
    const std::optional<BlockPool::Found> found = pool.Find(
        {.hash = HashOf(i, sequence), .previous = home.prefix, .token_ids = TokensOf(i, sequence)});
    if (!found.has_value()) break;
    home.blocks.push_back(found->block);
    home.prefix = found->prefix;
    if (!pool.is_free(found->block)) --home.num_wanted;
  }
  return home;
}

// Of the domains with enough room the one with the most room, where every block that is found
// counts as one more. None when no domain has enough.
std::optional<Scheduler::Home> Scheduler::ChooseHome(Sequence& sequence,
                                                     const std::vector<int>& room) const {
  std::optional<Home> best;
  int best_score = 0;
  for (int kv_domain = 0; kv_domain < options_.num_kv_domains; ++kv_domain) {
    Home home = FindIn(kv_domain, sequence);
    const int score = room[kv_domain] + static_cast<int>(home.blocks.size());
    if (home.num_wanted > room[kv_domain] || (best.has_value() && score <= best_score)) continue;
    best = std::move(home);
    best_score = score;
  }
  return best;
}

// The tokens of a full block. Valid until tokens are appended.
absl::Span<const uint32_t> Scheduler::TokensOf(int block_index, Sequence& sequence) const {
  return sequence.tokens.Slice(block_index * options_.block_size, options_.block_size);
}

// The name of a full block, made when first asked for.
const BlockHash& Scheduler::HashOf(int block_index, Sequence& sequence) const {
  std::vector<BlockHash>& hashes = sequence.block_hashes;
  while (static_cast<int>(hashes.size()) <= block_index) {
    const BlockHash& last =
        hashes.empty() ? hasher_.Root(sequence.request->cache_salt) : hashes.back();
    hashes.push_back(hasher_.Next(last, TokensOf(static_cast<int>(hashes.size()), sequence)));
  }
  return hashes[block_index];
}

void Scheduler::PublishLater(Sequence& sequence) {
  if (sequence.is_unpublished || !HasFullBlock(sequence)) return;
  sequence.is_unpublished = true;
  unpublished_slots_.push_back(sequence.slot);
}

void Scheduler::PublishFullBlocks() {
  std::vector<Sequence*> unpublished;
  for (const int slot : unpublished_slots_) {
    Sequence* const sequence = by_slot_[slot];
    // The slot may have another owner by now, and be in the list for that one, too.
    if (sequence == nullptr || !sequence->is_unpublished) continue;
    sequence->is_unpublished = false;
    if (HasFullBlock(*sequence)) unpublished.push_back(sequence);
  }
  unpublished_slots_.clear();
  Publish(unpublished);
}

void Scheduler::Publish(absl::Span<Sequence* const> sequences) {
  struct FullBlock {
    Sequence* sequence;
    BlockPool* pool;
    int index;
    BlockHash hash;
  };
  std::vector<FullBlock> full_blocks;
  full_blocks.reserve(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (i + kPrefetched < sequences.size()) sequences[i + kPrefetched]->PrefetchBlocks();
    Sequence& sequence = *sequences[i];
    BlockPool* const pool = &block_pools_[sequence.kv_domain];
    const int num_full_blocks = NumFullBlocks(sequence);
    for (int k = sequence.num_blocks_published; k < num_full_blocks; ++k) {
      sequence.last_hash = hasher_.Next(sequence.last_hash, TokensOf(k, sequence));
      full_blocks.push_back(
          {.sequence = &sequence, .pool = pool, .index = k, .hash = sequence.last_hash});
    }
  }
  for (size_t k = 0; k < full_blocks.size(); ++k) {
    // The pool's table is large and its places are random: some are fetched at a time.
    if (k % kPrefetched == 0) {
      const size_t end = std::min(k + kPrefetched, full_blocks.size());
      for (size_t i = k; i < end; ++i) full_blocks[i].pool->Touch(full_blocks[i].hash);
    }
    const FullBlock& full = full_blocks[k];
    Sequence& sequence = *full.sequence;
    sequence.prefix = full.pool->Publish(sequence.block_table[full.index],
                                         {.hash = full.hash,
                                          .previous = sequence.prefix,
                                          .token_ids = TokensOf(full.index, sequence)});
    sequence.num_blocks_published = full.index + 1;
  }
}

}  // namespace fathom
