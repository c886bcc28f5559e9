// A request being generated: its tokens so far, and which KV blocks hold what is computed of them.
//
// Plain state that Scheduler alone changes; it knows no wire and no time. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "coordinator/block_hash.h"
#include "coordinator/block_pool.h"
#include "coordinator/long_list.h"
#include "coordinator/request.h"

namespace fathom {

// Numbers sequences in order of arrival, from 1.
using SequenceId = uint64_t;

// How far a request has come, as clients were told: what it takes to go on with it elsewhere.
struct SequenceProgress {
  std::vector<uint32_t> generated_token_ids;
  int num_prompt_logprobs_done = 0;
  int num_prompt_tokens_done = 0;
  std::optional<int> num_cached_tokens;
};

struct alignas(64) Sequence {
  Sequence(SequenceId id, std::shared_ptr<const Request> request, const SequenceProgress& progress)
      : id(id),
        max_tokens(request->max_tokens),
        num_prompt_tokens(request->num_prompt_tokens()),
        num_prompt_tokens_done(progress.num_prompt_tokens_done),
        wants_prompt_logprobs(request->wants_prompt_logprobs),
        wants_logprobs(request->sampling.has_num_logprobs()),
        may_stop(!request->eos_token_ids.empty() || !request->stop_token_ids.empty()),
        tokens(request->prompt_token_ids),
        num_prompt_logprobs_done(progress.num_prompt_logprobs_done),
        num_cached_tokens(progress.num_cached_tokens),
        request(std::move(request)) {
    num_tokens = tokens.size();
    for (const uint32_t token_id : progress.generated_token_ids) Append(token_id);
  }

  // What every step reads and writes stands in one cache line.
  const SequenceId id;
  uint64_t last_step = 0;       // that it is part of
  const int max_tokens;         // the request's
  const int num_prompt_tokens;  // the request's
  int num_tokens = 0;           // of `tokens`
  // Tokens whose KV is in the blocks once the steps in flight have finished.
  int num_computed = 0;
  // Tokens that steps in flight sample. The workers have them before they make the next step, so
  // that they can be computed there although nobody here knows them yet.
  int num_unknown = 0;
  int num_prompt_tokens_done = 0;  // computed or found at least once: survives preemption
  // Set while the sequence runs.
  int slot = -1;
  int num_admissions = 0;        // tells results of an earlier stay in a slot apart
  int num_blocks = 0;            // of block_table
  int num_blocks_sent = 0;       // of them: the workers know them
  int num_blocks_published = 0;  // of them, found ones included
  int16_t kv_domain = -1;        // whose blocks block_table names
  const bool wants_prompt_logprobs : 1;
  const bool wants_logprobs : 1;    // of generated tokens
  const bool may_stop : 1;          // there are tokens that end it
  bool is_shared : 1 = false;       // others may find its full blocks
  bool is_unpublished : 1 = false;  // it has a place in the scheduler's list of those to publish

  LongList<uint32_t> tokens;  // prompt, then what was generated; survives preemption
  BlockTable block_table;
  PrefixId prefix = kEmptyPrefix;  // that the published blocks hold
  BlockHash last_hash;             // and its name

  // Seldom needed.
  int priority = 0;                      // as far as the scheduler heeds it
  int num_prompt_logprobs_done = 0;      // delivered; the first prompt token has none
  std::optional<int> num_cached_tokens;  // of the prompt, found when it was first admitted
  const std::shared_ptr<const Request> request;
  // Of the full blocks of `tokens`, as far as somebody looked for them; survives preemption.
  std::vector<BlockHash> block_hashes;

  // Hints that a step is about to look at the first line, to append a token, and to append blocks
  // or to publish them: memory needs a while.
  void Prefetch() const { __builtin_prefetch(this, 1); }
  void PrefetchTokens() const { PrefetchLines(&tokens, &tokens + 1); }
  void PrefetchBlocks() const { PrefetchLines(&block_table, &last_hash + 1); }

  void Append(uint32_t token_id) {
    tokens.push_back(token_id);
    ++num_tokens;
  }

  int num_generated() const { return num_tokens - num_prompt_tokens; }
  // To be computed next. None when the steps in flight sample the last token that it may have.
  int num_pending() const {
    const bool ends_in_flight = num_generated() + num_unknown >= std::max(1, max_tokens);
    return ends_in_flight ? 0 : num_tokens + num_unknown - num_computed;
  }

  SequenceProgress progress() const {
    return {.generated_token_ids = tokens.CopyFrom(num_prompt_tokens),
            .num_prompt_logprobs_done = num_prompt_logprobs_done,
            .num_prompt_tokens_done = num_prompt_tokens_done,
            .num_cached_tokens = num_cached_tokens};
  }

 private:
  static void PrefetchLines(const void* begin, const void* end) {
    constexpr size_t kCacheLine = 64;
    for (auto* line = static_cast<const char*>(begin); line < end; line += kCacheLine) {
      __builtin_prefetch(line, 1);
    }
  }
};

}  // namespace fathom
