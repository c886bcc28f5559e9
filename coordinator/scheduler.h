// Chooses what the workers compute next, and takes in what came of it.
//
// A sequence has tokens, some of them computed, and each step gives it as many of the pending ones
// as common budgets allow. When none are left the step samples the next token, and so on. Prompts
// are thereby cut into chunks and mixed with decoding, which comes first: a sequence with a single
// pending token decodes, oldest first; one with more is a prompt.
//
// With SchedulingPolicy::kPriority "older" means: of lower priority, or the same and come earlier.
//
// Prompts get what is left of the step's tokens, kLeastPromptTokens or half of them at least, and,
// while others decode and a target is set, of the time that the step may take (step_cost): until
// the target, or kLeastPromptTokens, or a third of what decoding takes if that is more. So about as
// many sequences start as end, and no gap between tokens is half as long again as its neighbours;
// reading prompts evenly costs least, because the more tokens a step has the more it waits for
// arithmetic instead of memory. One step in some tens reads nothing: no other tells what decoding
// costs alone, and a wrong idea of it would keep a server half empty.
//
// Prompts make a gap between tokens longer than the target only when decoding alone takes three
// quarters of it. They share it so:
//   - the oldest prompt comes first, then the running ones with the fewest pending tokens, then the
//     waiting ones in order of arrival;
//   - each takes all it can, unless it cannot finish in this step and one behind it is at most half
//     as long: then it leaves what those behind it have pending, up to half of what there is.
// So the oldest prompt has at least half of the prompt tokens of every step, which bounds how long
// any prompt takes; and a short one does not wait for long ones before it.
//
// Compared with vLLM's V1 scheduler (vllm/v1/core/sched/scheduler.py), the same: no phases in the
// workers; running before waiting; first come, first served, where the first that does not fit
// blocks those behind it; preemption of the youngest by recomputation, and no admission in a step
// that preempted. Different: decoding before prompts, and the above; a sequence is admitted only
// when all its tokens would fit beside what the running ones are about to need (not just its first
// chunk), so that a prompt is not thrown out half computed; rows of prompt logprobs have a budget
// of their own.
//
// Sequences that begin alike share KV blocks. A block is published as soon as somebody looks for
// blocks, or has time, and its tokens are known; the step that fills it need not have been made:
// workers store what a layer keeps of all tokens of a step before they read any of it, so even a
// sequence admitted in the same step may use it. On admission a
// sequence takes over the longest run of blocks that are published for its tokens, but always
// computes its last token, and those whose prompt logprobs it still owes. What a sequence with a
// fault has touched is not found any more.
//
// Steps may be scheduled while earlier ones are in flight, as long as they are sent and committed
// in order. A token that a step in flight samples counts as pending for the next: the workers know
// it by then. A sequence is never scheduled past max_tokens, which is known in advance; one that a
// stop token or a fault ends has a row in each step scheduled since, whose outcome is dropped. A
// block that holds unknown tokens is published when the last of them is known. Blocks freed
// meanwhile are safe to hand out, because the workers make steps in order.
//
// Pure state: no clock, no threads, no wire, no metrics.
//
// Not thread-safe; only Engine calls it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <memory_resource>
#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"
#include "coordinator/block_pool.h"
#include "coordinator/sequence.h"
#include "coordinator/step.h"
#include "coordinator/step_cost.h"

namespace fathom {

// Who comes first: who came first, or who has the lower priority, and among those who came first.
enum class SchedulingPolicy { kFirstComeFirstServed, kPriority };

// kStop: at an end-of-sequence token; kStopTokenId: at one that the client named.
enum class EndReason : uint8_t { kStop, kStopTokenId, kLength, kFault };

// What a committed step did to one sequence.
struct SequenceUpdate {
  SequenceId id = 0;
  std::optional<uint32_t> token_id;  // newly generated
  int batch_index = 0;               // in the step
  int num_prompt_tokens_done = 0;    // prompt tokens computed or found for the first time
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;     // of them, found when it was first admitted
  int num_generated_tokens = 0;  // so far
  std::optional<EndReason> end;  // the sequence is gone
};

class Scheduler {
 public:
  static constexpr int kLeastPromptTokens = 16;

  struct Options {
    int max_tokens_per_step = 2048;
    int max_sequences = 256;  // slots are numbered [0, max_sequences)
    int max_prompt_logprob_rows_per_step = 256;
    int block_size = 16;    // tokens per KV block, at most BlockHasher::kMaxBlockTokens
    int num_kv_blocks = 0;  // of each domain
    int num_kv_domains = 1;
    double target_step_us = 0;  // that a step should take at most while sequences decode; 0: any
    SchedulingPolicy policy = SchedulingPolicy::kFirstComeFirstServed;
    bool share_prefixes = false;
    BlockHasher::Options hash = {};
  };

  explicit Scheduler(Options options);

  // Queues a request, perhaps one that goes on from where another scheduler left it. Ids must
  // ascend. The request must be able to fit when it is alone.
  void Add(SequenceId id, std::shared_ptr<const Request> request,
           const SequenceProgress& progress = {});

  // Forgets a sequence and frees its blocks and slot now, even with a step in flight. False when
  // there is none (it ended before).
  bool Cancel(SequenceId id);

  // The same if it waits and has never been admitted.
  bool CancelUnlessStarted(SequenceId id);

  // The next step; empty when there is nothing to compute.
  Step Schedule();

  // Takes in the outcome of the oldest step in flight. One update per sequence of that step which
  // is still there and was not preempted since, in batch order.
  std::vector<SequenceUpdate> Commit(const Step& step, const StepOutcome& outcome);

  // Lets others find what the last steps have filled. Schedule does it itself before it looks for
  // something: this is for the time in which the workers compute.
  void PublishFullBlocks();

  // All that have not ended, by id. Valid until anything is called that changes them.
  std::vector<const Sequence*> Sequences() const;

  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int64_t num_waiting_tokens() const { return num_waiting_tokens_; }  // theirs, generated included
  int num_blocks() const { return options_.num_kv_blocks * options_.num_kv_domains; }
  int num_free_blocks() const;
  int64_t num_started_tokens() const { return num_started_tokens_; }  // when first admitted
  int64_t num_preemptions() const { return num_preemptions_; }

  // Of sequences when they were first admitted, but for those that want prompt logprobs: tokens,
  // and how many of them were found.
  struct PrefixFigures {
    int64_t num_queried = 0;
    int64_t num_found = 0;
  };
  const PrefixFigures& prefix_figures() const { return prefix_figures_; }

  const StepCost& step_cost() const { return step_cost_; }

  // Of the time that the workers took so far: how much longer they took because of prompts, as
  // step_cost has it.
  double prefill_us() const { return prefill_us_; }

 private:
  // What is left of a step's allowances, and what it has so far.
  struct Budget {
    int tokens;
    int prompt_logprob_rows;
    double microseconds;  // of the whole step, what it has included; infinite until decoding is in
    StepLoad load;
    std::vector<Sequence*> filled;  // prompts: some block that is not published yet
    int num_prompts = 0;            // it has a part in
  };
  // Those that come after another one: how many tokens they have pending.
  struct PromptsBehind {
    int64_t all = 0;
    int shortest = std::numeric_limits<int>::max();
    void Add(int num_pending) {
      all += num_pending;
      shortest = std::min(shortest, num_pending);
    }
  };
  struct StepInFlight {
    uint64_t number;
    StepLoad load;
    StepLoad decoding;  // of it
  };
  // Where a waiting sequence is to go, and what is there for it.
  struct Home {
    int kv_domain = -1;
    int num_wanted = 0;           // free blocks that all its tokens take
    std::vector<int32_t> blocks;  // found, from the first on
    PrefixId prefix = kEmptyPrefix;
  };

  int BlocksFor(int num_tokens) const;
  int NumFullBlocks(const Sequence& sequence) const;
  bool HasFullBlock(const Sequence& sequence) const;
  int BlocksToAdd(const Sequence& sequence, int num_tokens) const;
  // Blocks a running sequence is going to want: for all its tokens, and one to grow into.
  int BlocksAboutToBeWanted(const Sequence& sequence) const;
  std::vector<int> RoomOfDomains() const;

  int LeastPromptTokens() const;
  std::vector<Sequence*> Decode(Step& step, Budget& budget);
  void ReadPrompts(std::vector<Sequence*> prompts, Step& step, Budget& budget);
  void AdmitWaiting(Step& step, Budget& budget);
  // What a prompt gets by the rule above.
  int ShareOf(const Sequence& prompt, const PromptsBehind& behind, const Budget& budget) const;
  PromptsBehind WaitingFrom(size_t place) const;
  int MostTokensInTime(const Sequence& sequence, const Budget& budget) const;
  bool MayAdmit() const;
  Home FindIn(int kv_domain, Sequence& sequence) const;
  std::optional<Home> ChooseHome(Sequence& sequence, const std::vector<int>& room) const;
  void Admit(Sequence& sequence, const Home& home, Step& step);
  void Place(Sequence& sequence, int num_tokens, Step& step, Budget& budget);
  bool MakeRoomFor(Sequence& sequence, int num_tokens);
  int TokensThatFit(const Sequence& sequence) const;
  void Preempt(Sequence& sequence);
  void FreeBlocksAndSlot(Sequence& sequence);
  void Enqueue(Sequence& sequence);
  void Forget(SequenceId id);
  // The sequence that a step in flight scheduled, if it is still there and was not preempted since.
  Sequence* Find(const ScheduledSequence& scheduled) const;
  void LearnCost(const StepInFlight& step, double compute_us);
  void Apply(const ScheduledSequence& scheduled, const SequenceOutcome& outcome, Sequence& sequence,
             SequenceUpdate& update);

  absl::Span<const uint32_t> TokensOf(int block_index, Sequence& sequence) const;
  const BlockHash& HashOf(int block_index, Sequence& sequence) const;
  void PublishLater(Sequence& sequence);
  void Publish(absl::Span<Sequence* const> sequences);

  const Options options_;
  const BlockHasher hasher_;
  std::vector<BlockPool> block_pools_;  // by domain
  std::vector<int> free_slots_;         // a stack
  std::vector<int> released_slots_;     // the workers do not know yet
  std::vector<Sequence*> by_slot_;      // who is in it; null: free
  std::vector<int> unpublished_slots_;  // whose sequences may have full blocks to publish

  // They lie close together, which a step needs that looks at all of them.
  std::pmr::unsynchronized_pool_resource sequence_memory_;
  std::pmr::unordered_map<SequenceId, Sequence> sequences_{&sequence_memory_};
  std::deque<Sequence*> waiting_;   // oldest first
  std::vector<Sequence*> running_;  // oldest first
  int64_t num_waiting_tokens_ = 0;
  std::deque<StepInFlight> in_flight_;
  StepCost step_cost_;
  double prefill_us_ = 0;

  SequenceId last_id_ = 0;
  uint64_t last_step_ = 0;
  uint64_t last_step_without_prompts_ = 0;
  int64_t num_preemptions_ = 0;
  int64_t num_started_tokens_ = 0;
  PrefixFigures prefix_figures_;

  // The first in the queue did not fit while the roomiest domain had so much room. It is looked up
  // again when there is more, or after some steps, which may have published what it begins with.
  SequenceId blocked_id_ = 0;
  int blocked_room_ = 0;
  uint64_t blocked_until_step_ = 0;
};

}  // namespace fathom
