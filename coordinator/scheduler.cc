#include "coordinator/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"

namespace fathom {
namespace {

// Of a sequence that waits for room; a long prompt has thousands of blocks to look up.
constexpr int kStepsBetweenLookups = 8;

// How far ahead loops over sequences ask for memory.
constexpr size_t kAhead = 8;

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
// Of the time that decoding takes: what prompts get whatever the target is.
constexpr double kPromptShare = 1.0 / 3;

// That may follow each other before one must only decode.
constexpr uint64_t kMostStepsWithPrompts = 64;

bool IsOlder(const Sequence* a, const Sequence* b) {
  return a->priority != b->priority ? a->priority < b->priority : a->id < b->id;
}

template <typename Container>
void InsertByAge(Container& container, Sequence* sequence) {
  container.insert(std::upper_bound(container.begin(), container.end(), sequence, IsOlder),
                   sequence);
}

template <typename Container>
void EraseByAge(Container& container, Sequence* sequence) {
  const auto place = std::lower_bound(container.begin(), container.end(), sequence, IsOlder);
  CHECK(place != container.end() && *place == sequence);
  container.erase(place);
}

bool Contains(const std::vector<uint32_t>& sorted, uint32_t token_id) {
  return std::binary_search(sorted.begin(), sorted.end(), token_id);
}

// Rows of prompt logprobs that come of computing `num_tokens` more tokens: computing position p
// gives the logprob of the prompt token at p + 1.
int PromptLogprobRows(const Sequence& sequence, int num_tokens) {
  if (!sequence.wants_prompt_logprobs) return 0;
  const int first = std::max(sequence.num_computed, sequence.num_prompt_logprobs_done);
  const int end = std::min(sequence.num_computed + num_tokens, sequence.num_prompt_tokens - 1);
  return std::max(0, end - first);
}

// As many pending tokens as the allowances let it have; 0 when it must wait.
int TokensToCompute(const Sequence& sequence, int token_budget, int row_budget) {
  const int num_tokens = std::min(sequence.num_pending(), token_budget);
  const int excess = PromptLogprobRows(sequence, num_tokens) - row_budget;
  // The rows are of the last tokens of the chunk, up to the end of the prompt; a chunk that must
  // be cut ends inside the prompt.
  if (excess <= 0) return num_tokens;
  const int end =
      std::min(sequence.num_computed + num_tokens, sequence.request->num_prompt_tokens() - 1);
  return std::max(0, end - excess - sequence.num_computed);
}

void StopAt(uint32_t token_id, const Sequence& sequence, SequenceUpdate& update) {
  const Request& request = *sequence.request;
  if (sequence.num_generated() < request.min_tokens) return;
  if (Contains(request.eos_token_ids, token_id)) {
    update.end = EndReason::kStop;
  } else if (Contains(request.stop_token_ids, token_id)) {
    update.end = EndReason::kStopTokenId;
  }
}

}  // namespace

Scheduler::Scheduler(Options options) : options_(options), hasher_(options.hash) {
  CHECK_GT(options_.max_tokens_per_step, 0);
  CHECK_GT(options_.max_sequences, 0);
  CHECK_GT(options_.max_prompt_logprob_rows_per_step, 0);
  CHECK(options_.block_size > 0 && options_.block_size <= BlockHasher::kMaxBlockTokens);
  CHECK_GT(options_.num_kv_domains, 0);
  for (int i = 0; i < options_.num_kv_domains; ++i) {
    block_pools_.emplace_back(options_.num_kv_blocks, options_.block_size);
  }
  for (int slot = options_.max_sequences - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  by_slot_.resize(options_.max_sequences);
}

void Scheduler::Add(SequenceId id, std::shared_ptr<const Request> request,
                    const SequenceProgress& progress) {
  CHECK_GT(id, last_id_);
  CHECK_GT(request->num_prompt_tokens(), 0);
  CHECK_LE(BlocksFor(request->max_total_tokens()), options_.num_kv_blocks)
      << "validation refuses what can never fit";
  last_id_ = id;
  Sequence& sequence = sequences_
                           .emplace(std::piecewise_construct, std::forward_as_tuple(id),
                                    std::forward_as_tuple(id, std::move(request), progress))
                           .first->second;
  CHECK_LE(sequence.num_generated(), sequence.request->max_tokens);
  if (options_.policy == SchedulingPolicy::kPriority)
    sequence.priority = sequence.request->priority;
  Enqueue(sequence);
}

bool Scheduler::Cancel(SequenceId id) {
  if (sequences_.find(id) == sequences_.end()) return false;
  Forget(id);
  return true;
}

bool Scheduler::CancelUnlessStarted(SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end() || found->second.num_admissions > 0) return false;
  Forget(id);
  return true;
}

void Scheduler::Enqueue(Sequence& sequence) {
  InsertByAge(waiting_, &sequence);
  num_waiting_tokens_ += sequence.num_tokens;
}

Step Scheduler::Schedule() {
  Step step;
  Budget budget{.tokens = options_.max_tokens_per_step,
                .prompt_logprob_rows = options_.max_prompt_logprob_rows_per_step,
                .microseconds = kNoLimit,
                .load = {},
                .filled = {}};
  step.scheduled.reserve(running_.size());
  const int64_t preemptions_before = num_preemptions_;
  std::vector<Sequence*> prompts = Decode(step, budget);
  const StepLoad decoding = budget.load;
  if (options_.target_step_us > 0 && !step.scheduled.empty()) {
    budget.microseconds =
        std::max(options_.target_step_us, (1 + kPromptShare) * step_cost_.Predict(decoding));
    if (last_step_ - last_step_without_prompts_ >= kMostStepsWithPrompts) budget.tokens = 0;
  }
  ReadPrompts(std::move(prompts), step, budget);
  Publish(budget.filled);  // before others look for them
  // What was just thrown out must not come straight back and throw out the next.
  if (num_preemptions_ == preemptions_before) AdmitWaiting(step, budget);
  if (step.empty()) return step;

  step.number = ++last_step_;
  if (budget.num_prompts == 0) last_step_without_prompts_ = step.number;
  step.released_slots = std::exchange(released_slots_, {});
  step.num_prefill_tokens = step.num_tokens - static_cast<int>(decoding.tokens);
  in_flight_.push_back({.number = step.number, .load = budget.load, .decoding = decoding});
  return step;
}

// What decoding leaves to the prompts that run. More sequences than a step has tokens are rare.
int Scheduler::LeastPromptTokens() const {
  const int most_tokens = options_.max_tokens_per_step;
  if (num_running() + kLeastPromptTokens <= most_tokens) return 0;
  const bool has_prompts = std::any_of(running_.begin(), running_.end(),
                                       [](const Sequence* s) { return s->num_pending() > 1; });
  return has_prompts ? std::min(kLeastPromptTokens, most_tokens / 2) : 0;
}

// Those that have one token pending, oldest first. Returns those that have more.
std::vector<Sequence*> Scheduler::Decode(Step& step, Budget& budget) {
  std::vector<Sequence*> prompts;
  // Preemption takes from the end of running_, so positions up to i stay what they are.
  const int tokens_left = LeastPromptTokens();
  for (size_t i = 0; i < running_.size(); ++i) {
    if (i + 2 * kAhead < running_.size()) running_[i + 2 * kAhead]->Prefetch();
    if (i + kAhead < running_.size() && BlocksToAdd(*running_[i + kAhead], 1) > 0) {
      running_[i + kAhead]->PrefetchBlocks();
    }
    Sequence& sequence = *running_[i];
    const int num_pending = sequence.num_pending();
    if (num_pending > 1) prompts.push_back(&sequence);
    if (num_pending != 1 || budget.tokens <= tokens_left) continue;
    if (PromptLogprobRows(sequence, 1) > budget.prompt_logprob_rows) continue;
    if (!MakeRoomFor(sequence, 1)) {
      Preempt(sequence);
      --i;
      continue;
    }
    Place(sequence, 1, step, budget);
  }
  return prompts;
}

// In the order and with the shares that the header tells of. `prompts` are the oldest first.
void Scheduler::ReadPrompts(std::vector<Sequence*> prompts, Step& step, Budget& budget) {
  if (prompts.empty()) return;
  std::stable_sort(prompts.begin() + 1, prompts.end(), [](const Sequence* a, const Sequence* b) {
    return a->num_pending() < b->num_pending();
  });
  std::vector<PromptsBehind> behind(prompts.size());
  if (MayAdmit()) behind.back() = WaitingFrom(0);
  for (size_t i = prompts.size() - 1; i > 0; --i) {
    behind[i - 1] = behind[i];
    behind[i - 1].Add(prompts[i]->num_pending());
  }
  for (size_t i = 0; i < prompts.size() && budget.tokens > 0; ++i) {
    Sequence& prompt = *prompts[i];
    if (prompt.slot < 0) continue;  // the oldest took its blocks
    int num_tokens = ShareOf(prompt, behind[i], budget);
    // Only the oldest throws out others, younger ones, or else itself; the rest have later what
    // they cannot have now.
    if (i == 0 && num_tokens > 0 && !MakeRoomFor(prompt, num_tokens)) {
      Preempt(prompt);
      continue;
    }
    num_tokens = std::min(num_tokens, TokensThatFit(prompt));
    if (num_tokens > 0) Place(prompt, num_tokens, step, budget);
  }
}

// As many of those that wait, from a place in the queue on, as could have a part in this step.
Scheduler::PromptsBehind Scheduler::WaitingFrom(size_t place) const {
  PromptsBehind behind;
  const size_t end = std::min(waiting_.size(), place + free_slots_.size());
  while (place < end && behind.all < options_.max_tokens_per_step) {
    behind.Add(waiting_[place++]->num_pending());
  }
  return behind;
}

int Scheduler::ShareOf(const Sequence& prompt, const PromptsBehind& behind,
                       const Budget& budget) const {
  int num_tokens = std::min(budget.tokens, MostTokensInTime(prompt, budget));
  if (num_tokens < prompt.num_pending() && behind.shortest <= prompt.num_pending() / 2) {
    num_tokens -= static_cast<int>(std::min<int64_t>(num_tokens / 2, behind.all));
  }
  return TokensToCompute(prompt, num_tokens, budget.prompt_logprob_rows);
}

// How many of its pending tokens the step can take on and stay within its time.
int Scheduler::MostTokensInTime(const Sequence& sequence, const Budget& budget) const {
  const int num_pending = sequence.num_pending();
  if (budget.microseconds == kNoLimit) return num_pending;
  const auto is_in_time = [&](int num_tokens) {
    StepLoad load = budget.load;
    load.Add(num_tokens, sequence.num_computed);
    return step_cost_.Predict(load) <= budget.microseconds;
  };
  int most = 0;
  for (int end = num_pending + 1; most + 1 < end;) {
    const int middle = most + (end - most) / 2;
    (is_in_time(middle) ? most : end) = middle;
  }
  if (budget.num_prompts == 0) most = std::max(most, std::min(num_pending, kLeastPromptTokens));
  return most;
}

// Whether the first in the queue could be admitted, as far as can be told without looking it up.
bool Scheduler::MayAdmit() const {
  if (waiting_.empty() || free_slots_.empty()) return false;
  if (waiting_.front()->id != blocked_id_ || last_step_ >= blocked_until_step_) return true;
  const std::vector<int> room = RoomOfDomains();
  return *std::max_element(room.begin(), room.end()) > blocked_room_;
}

void Scheduler::AdmitWaiting(Step& step, Budget& budget) {
  if (!MayAdmit()) return;
  PublishFullBlocks();
  std::vector<int> room = RoomOfDomains();
  while (!waiting_.empty() && !free_slots_.empty() && budget.tokens > 0) {
    Sequence& sequence = *waiting_.front();
    const int most_room = *std::max_element(room.begin(), room.end());
    const std::optional<Home> home = ChooseHome(sequence, room);
    if (!home.has_value()) {
      blocked_id_ = sequence.id;
      blocked_room_ = most_room;
      blocked_until_step_ = last_step_ + kStepsBetweenLookups;
      return;
    }
    sequence.num_computed = static_cast<int>(home->blocks.size()) * options_.block_size;
    const bool is_last = waiting_.size() == 1 || free_slots_.size() == 1;
    const int num_tokens = ShareOf(sequence, is_last ? PromptsBehind() : WaitingFrom(1), budget);
    if (num_tokens == 0) {
      sequence.num_computed = 0;
      return;
    }
    waiting_.pop_front();
    num_waiting_tokens_ -= sequence.num_tokens;
    Admit(sequence, *home, step);
    Place(sequence, num_tokens, step, budget);
    Sequence* const admitted = &sequence;
    Publish({&admitted, 1});
    room[home->kv_domain] -= home->num_wanted - BlocksFor(sequence.num_tokens) +
                             sequence.num_blocks + BlocksAboutToBeWanted(sequence);
  }
}

void Scheduler::Admit(Sequence& sequence, const Home& home, Step& step) {
  CHECK_EQ(sequence.slot, -1);
  sequence.slot = free_slots_.back();
  free_slots_.pop_back();
  by_slot_[sequence.slot] = &sequence;
  sequence.kv_domain = home.kv_domain;
  block_pools_[home.kv_domain].Share(home.blocks, sequence.block_table);
  sequence.num_blocks = sequence.num_blocks_published = static_cast<int>(home.blocks.size());
  sequence.is_shared = options_.share_prefixes;
  sequence.prefix = home.prefix;
  if (options_.share_prefixes) {
    sequence.last_hash = home.blocks.empty() ? hasher_.Root(sequence.request->cache_salt)
                                             : HashOf(sequence.num_blocks_published - 1, sequence);
  }
  ++sequence.num_admissions;
  if (sequence.num_admissions == 1) num_started_tokens_ += sequence.num_tokens;
  if (!sequence.num_cached_tokens.has_value()) {
    sequence.num_cached_tokens = sequence.num_computed;
    if (options_.share_prefixes && !sequence.request->wants_prompt_logprobs) {
      prefix_figures_.num_queried += sequence.num_tokens;
      prefix_figures_.num_found += sequence.num_computed;
    }
  }
  InsertByAge(running_, &sequence);
  step.admitted.push_back({.sequence = &sequence, .num_computed = sequence.num_computed});
}

void Scheduler::Place(Sequence& sequence, int num_tokens, Step& step, Budget& budget) {
  const int num_to_add = BlocksToAdd(sequence, num_tokens);
  if (num_to_add > 0) {
    block_pools_[sequence.kv_domain].Take(num_to_add, sequence.block_table);
    sequence.num_blocks += num_to_add;
  }
  const int num_new_blocks = sequence.num_blocks - sequence.num_blocks_sent;
  while (sequence.num_blocks_sent < sequence.num_blocks) {
    step.new_block_ids.push_back(sequence.block_table[sequence.num_blocks_sent++]);
  }

  const int num_rows = PromptLogprobRows(sequence, num_tokens);
  step.scheduled.push_back({.id = sequence.id,
                            .slot = sequence.slot,
                            .num_tokens = num_tokens,
                            .num_new_blocks = num_new_blocks,
                            .num_prompt_logprobs = num_rows,
                            .samples = num_tokens == sequence.num_pending(),
                            .wants_logprobs = sequence.wants_logprobs,
                            .first_token = sequence.num_computed,
                            .admission = sequence.num_admissions});
  step.num_tokens += num_tokens;
  budget.load.Add(num_tokens, sequence.num_computed);
  sequence.last_step = last_step_ + 1;
  if (step.scheduled.back().samples) ++sequence.num_unknown;
  sequence.num_computed += num_tokens;
  if (num_tokens > 1) {
    ++budget.num_prompts;
    if (HasFullBlock(sequence)) budget.filled.push_back(&sequence);
  } else {
    PublishLater(sequence);
  }
  budget.tokens -= num_tokens;
  budget.prompt_logprob_rows -= num_rows;
  CHECK_GE(budget.tokens, 0);
  CHECK_GE(budget.prompt_logprob_rows, 0);
}

// Makes blocks free for `num_tokens` more tokens by preempting the youngest sequences of the
// domain that have no part in this step. False when `sequence` is the youngest of them itself.
bool Scheduler::MakeRoomFor(Sequence& sequence, int num_tokens) {
  const BlockPool& pool = block_pools_[sequence.kv_domain];
  const int num_wanted = BlocksToAdd(sequence, num_tokens);
  while (pool.num_free() < num_wanted) {
    const auto youngest = std::find_if(running_.rbegin(), running_.rend(), [&](const Sequence* s) {
      return s->kv_domain == sequence.kv_domain && s->last_step <= last_step_;
    });
    CHECK(youngest != running_.rend());
    if (*youngest == &sequence) return false;
    Preempt(**youngest);
  }
  return true;
}

void Scheduler::Preempt(Sequence& sequence) {
  EraseByAge(running_, &sequence);
  FreeBlocksAndSlot(sequence);
  sequence.num_computed = 0;  // its tokens stay; only their KV is computed again
  sequence.num_unknown = 0;   // and those in flight are sampled again
  Enqueue(sequence);
  ++num_preemptions_;
}

void Scheduler::FreeBlocksAndSlot(Sequence& sequence) {
  if (HasFullBlock(sequence)) {
    Sequence* const freed = &sequence;
    Publish({&freed, 1});
  }
  sequence.is_unpublished = false;
  block_pools_[sequence.kv_domain].Release(sequence.block_table);
  by_slot_[sequence.slot] = nullptr;
  free_slots_.push_back(sequence.slot);
  released_slots_.push_back(sequence.slot);
  sequence.slot = -1;
  sequence.kv_domain = -1;
  sequence.num_blocks = 0;
  sequence.num_blocks_sent = 0;
  sequence.num_blocks_published = 0;
  sequence.prefix = kEmptyPrefix;
}

void Scheduler::Forget(SequenceId id) {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  Sequence& sequence = found->second;
  if (sequence.slot >= 0) {
    EraseByAge(running_, &sequence);
    FreeBlocksAndSlot(sequence);
  } else {
    EraseByAge(waiting_, &sequence);
    num_waiting_tokens_ -= sequence.num_tokens;
  }
  sequences_.erase(found);
}

std::vector<SequenceUpdate> Scheduler::Commit(const Step& step, const StepOutcome& outcome) {
  CHECK(!in_flight_.empty());
  CHECK_EQ(step.number, in_flight_.front().number);
  CHECK_EQ(outcome.sequences.size(), step.scheduled.size());
  LearnCost(in_flight_.front(), outcome.compute_us);
  in_flight_.pop_front();

  std::vector<SequenceUpdate> updates;
  updates.reserve(step.scheduled.size());
  for (size_t i = 0; i < step.scheduled.size(); ++i) {
    if (i + 3 * kAhead < step.scheduled.size()) {
      const Sequence* const later = by_slot_[step.scheduled[i + 3 * kAhead].slot];
      if (later != nullptr) {
        later->Prefetch();
        later->PrefetchTokens();
      }
    }
    if (i + kAhead < step.scheduled.size()) {
      const Sequence* const next = by_slot_[step.scheduled[i + kAhead].slot];
      if (next != nullptr) next->tokens.Prefetch();
    }
    const ScheduledSequence& scheduled = step.scheduled[i];
    Sequence* const sequence = Find(scheduled);
    if (sequence == nullptr) continue;
    SequenceUpdate& update = updates.emplace_back();
    update.batch_index = static_cast<int>(i);
    Apply(scheduled, outcome.sequences[i], *sequence, update);
    PublishLater(*sequence);
  }
  for (const SequenceUpdate& update : updates) {
    if (update.end.has_value()) Forget(update.id);
  }
  return updates;
}

void Scheduler::LearnCost(const StepInFlight& step, double compute_us) {
  step_cost_.Learn(step.load, compute_us);
  const double decoding_us = step.decoding.tokens > 0 ? step_cost_.Predict(step.decoding) : 0;
  const double all_us = step_cost_.Predict(step.load);
  if (step.load.tokens > step.decoding.tokens && all_us > 0) {
    prefill_us_ += compute_us * (1 - decoding_us / all_us);
  }
}

Sequence* Scheduler::Find(const ScheduledSequence& scheduled) const {
  Sequence* const sequence = by_slot_[scheduled.slot];
  // It ended while the step was in flight; or it was preempted: then the workers have forgotten the
  // token too, and will sample the same again.
  if (sequence == nullptr || sequence->id != scheduled.id) return nullptr;
  return sequence->num_admissions == scheduled.admission ? sequence : nullptr;
}

void Scheduler::Apply(const ScheduledSequence& scheduled, const SequenceOutcome& outcome,
                      Sequence& sequence, SequenceUpdate& update) {
  update.id = sequence.id;
  update.num_prompt_tokens = sequence.num_prompt_tokens;
  update.num_cached_tokens = sequence.num_cached_tokens.value_or(0);
  update.num_generated_tokens = sequence.num_generated();

  const int computed = scheduled.first_token + scheduled.num_tokens;
  const int prompt_computed = std::min(computed, sequence.num_prompt_tokens);
  update.num_prompt_tokens_done = std::max(0, prompt_computed - sequence.num_prompt_tokens_done);
  sequence.num_prompt_tokens_done += update.num_prompt_tokens_done;
  sequence.num_prompt_logprobs_done += scheduled.num_prompt_logprobs;
  if (scheduled.samples) --sequence.num_unknown;

  if (outcome.fault != nullptr) {
    update.end = EndReason::kFault;
    // Whatever is wrong with its numbers, nobody else is to inherit it.
    sequence.is_shared = false;
    for (const absl::Span<const int32_t> piece : sequence.block_table.pieces()) {
      block_pools_[sequence.kv_domain].Unpublish(piece);
    }
    return;
  }
  CHECK_EQ(outcome.sampled_token_id.has_value(), scheduled.samples);
  if (!scheduled.samples) return;
  if (sequence.max_tokens == 0) {  // the token is a by-product of reading the prompt
    update.end = EndReason::kLength;
    return;
  }

  const uint32_t token_id = *outcome.sampled_token_id;
  sequence.Append(token_id);
  update.token_id = token_id;
  update.num_generated_tokens = sequence.num_generated();
  if (sequence.may_stop) StopAt(token_id, sequence, update);
  if (!update.end.has_value() && sequence.num_generated() >= sequence.max_tokens) {
    update.end = EndReason::kLength;
  }
}

std::vector<const Sequence*> Scheduler::Sequences() const {
  std::vector<const Sequence*> all;
  for (const auto& [id, sequence] : sequences_) all.push_back(&sequence);
  std::sort(all.begin(), all.end(),
            [](const Sequence* a, const Sequence* b) { return a->id < b->id; });
  return all;
}

}  // namespace fathom
