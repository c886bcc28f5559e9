#include "coordinator/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace fathom {
namespace {

bool ById(const Sequence* a, const Sequence* b) { return a->id < b->id; }

template <typename Container>
void InsertById(Container& container, Sequence* sequence) {
  container.insert(std::upper_bound(container.begin(), container.end(), sequence, ById), sequence);
}

template <typename Container>
void EraseById(Container& container, Sequence* sequence) {
  const auto place = std::lower_bound(container.begin(), container.end(), sequence, ById);
  CHECK(place != container.end() && *place == sequence);
  container.erase(place);
}

bool Contains(const std::vector<uint32_t>& sorted, uint32_t token_id) {
  return std::binary_search(sorted.begin(), sorted.end(), token_id);
}

// Rows of prompt logprobs that come of computing `num_tokens` more tokens: computing position p
// gives the logprob of the prompt token at p + 1.
int PromptLogprobRows(const Sequence& sequence, int num_tokens) {
  if (!sequence.request->wants_prompt_logprobs) return 0;
  const int first = std::max(sequence.num_computed, sequence.num_prompt_logprobs_done);
  const int end =
      std::min(sequence.num_computed + num_tokens, sequence.request->num_prompt_tokens() - 1);
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

}  // namespace

Scheduler::Scheduler(Options options) : options_(options) {
  CHECK_GT(options_.max_tokens_per_step, 0);
  CHECK_GT(options_.max_sequences, 0);
  CHECK_GT(options_.max_prompt_logprob_rows_per_step, 0);
  CHECK_GT(options_.block_size, 0);
  CHECK_GT(options_.num_kv_domains, 0);
  for (int i = 0; i < options_.num_kv_domains; ++i) {
    block_pools_.emplace_back(options_.num_kv_blocks);
  }
  for (int slot = options_.max_sequences - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

void Scheduler::Add(SequenceId id, std::shared_ptr<const Request> request) {
  CHECK_GT(id, last_id_);
  CHECK_GT(request->num_prompt_tokens(), 0);
  CHECK_LE(BlocksFor(request->max_total_tokens()), options_.num_kv_blocks)
      << "validation refuses what can never fit";
  last_id_ = id;
  auto sequence = std::make_unique<Sequence>(id, std::move(request));
  waiting_.push_back(sequence.get());
  sequences_.emplace(id, std::move(sequence));
}

bool Scheduler::Cancel(SequenceId id) {
  if (sequences_.find(id) == sequences_.end()) return false;
  Forget(id);
  return true;
}

Step Scheduler::Schedule() {
  Step step;
  Budget budget{.tokens = options_.max_tokens_per_step,
                .prompt_logprob_rows = options_.max_prompt_logprob_rows_per_step};
  const int64_t preemptions_before = num_preemptions_;
  ScheduleRunning(step, budget);
  // What was just thrown out must not come straight back and throw out the next.
  if (num_preemptions_ == preemptions_before) AdmitWaiting(step, budget);
  if (step.empty()) return step;

  step.number = ++last_step_;
  step.released_slots = std::exchange(released_slots_, {});
  in_flight_.push_back({.number = step.number, .scheduled = step.scheduled});
  return step;
}

void Scheduler::ScheduleRunning(Step& step, Budget& budget) {
  // Preemption takes from the end of running_, so positions up to i stay what they are.
  for (size_t i = 0; i < running_.size() && budget.tokens > 0; ++i) {
    Sequence& sequence = *running_[i];
    const int num_tokens = TokensToCompute(sequence, budget.tokens, budget.prompt_logprob_rows);
    if (num_tokens == 0) continue;
    if (!MakeRoomFor(sequence, num_tokens)) {
      --i;  // it was the youngest of its domain, and is no longer in running_
      continue;
    }
    Place(sequence, num_tokens, step, budget);
  }
}

void Scheduler::AdmitWaiting(Step& step, Budget& budget) {
  std::vector<int> room = RoomOfDomains();
  while (!waiting_.empty() && !free_slots_.empty() && budget.tokens > 0) {
    Sequence& sequence = *waiting_.front();
    const auto roomiest = std::max_element(room.begin(), room.end());
    if (*roomiest < BlocksFor(sequence.num_tokens())) return;
    const int num_tokens = TokensToCompute(sequence, budget.tokens, budget.prompt_logprob_rows);
    if (num_tokens == 0) return;
    waiting_.pop_front();
    Admit(sequence, static_cast<int>(roomiest - room.begin()), step);
    Place(sequence, num_tokens, step, budget);
    *roomiest -= static_cast<int>(sequence.block_table.size()) + BlocksAboutToBeWanted(sequence);
  }
}

void Scheduler::Admit(Sequence& sequence, int kv_domain, Step& step) {
  CHECK_EQ(sequence.slot, -1);
  sequence.slot = free_slots_.back();
  free_slots_.pop_back();
  sequence.kv_domain = kv_domain;
  ++sequence.num_admissions;
  InsertById(running_, &sequence);
  step.admitted.push_back({.sequence = &sequence, .num_computed = sequence.num_computed});
}

void Scheduler::Place(Sequence& sequence, int num_tokens, Step& step, Budget& budget) {
  const int num_new_blocks =
      BlocksFor(sequence.num_computed + num_tokens) - static_cast<int>(sequence.block_table.size());
  CHECK_GE(num_new_blocks, 0);
  block_pools_[sequence.kv_domain].Take(num_new_blocks, sequence.block_table);
  step.new_block_ids.insert(step.new_block_ids.end(), sequence.block_table.end() - num_new_blocks,
                            sequence.block_table.end());

  const int num_rows = PromptLogprobRows(sequence, num_tokens);
  step.scheduled.push_back({.id = sequence.id,
                            .slot = sequence.slot,
                            .num_tokens = num_tokens,
                            .num_new_blocks = num_new_blocks,
                            .num_prompt_logprobs = num_rows,
                            .samples = num_tokens == sequence.num_pending(),
                            .wants_logprobs = sequence.request->sampling.has_num_logprobs(),
                            .first_token = sequence.num_computed,
                            .admission = sequence.num_admissions});
  step.num_tokens += num_tokens;
  sequence.num_computed += num_tokens;
  budget.tokens -= num_tokens;
  budget.prompt_logprob_rows -= num_rows;
  CHECK_GE(budget.tokens, 0);
  CHECK_GE(budget.prompt_logprob_rows, 0);
}

// Makes blocks free for `num_tokens` more tokens by preempting the youngest sequences of the
// domain. False when that was `sequence` itself.
bool Scheduler::MakeRoomFor(Sequence& sequence, int num_tokens) {
  const BlockPool& pool = block_pools_[sequence.kv_domain];
  const int num_wanted =
      BlocksFor(sequence.num_computed + num_tokens) - static_cast<int>(sequence.block_table.size());
  while (pool.num_free() < num_wanted) {
    const auto youngest = std::find_if(running_.rbegin(), running_.rend(), [&](const Sequence* s) {
      return s->kv_domain == sequence.kv_domain;
    });
    CHECK(youngest != running_.rend());
    Sequence& victim = **youngest;
    Preempt(victim);
    if (&victim == &sequence) return false;
  }
  return true;
}

void Scheduler::Preempt(Sequence& sequence) {
  EraseById(running_, &sequence);
  FreeBlocksAndSlot(sequence);
  sequence.num_computed = 0;  // its tokens stay; only their KV is computed again
  InsertById(waiting_, &sequence);
  ++num_preemptions_;
}

void Scheduler::FreeBlocksAndSlot(Sequence& sequence) {
  block_pools_[sequence.kv_domain].Release(sequence.block_table);
  free_slots_.push_back(sequence.slot);
  released_slots_.push_back(sequence.slot);
  sequence.slot = -1;
  sequence.kv_domain = -1;
}

void Scheduler::Forget(SequenceId id) {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  Sequence& sequence = *found->second;
  if (sequence.slot >= 0) {
    EraseById(running_, &sequence);
    FreeBlocksAndSlot(sequence);
  } else {
    EraseById(waiting_, &sequence);
  }
  sequences_.erase(found);
}

std::vector<SequenceUpdate> Scheduler::Commit(const StepOutcome& outcome) {
  CHECK(!in_flight_.empty());
  const StepInFlight step = std::move(in_flight_.front());
  in_flight_.pop_front();
  CHECK_EQ(outcome.number, step.number);
  CHECK_EQ(outcome.sequences.size(), step.scheduled.size());

  std::vector<SequenceUpdate> updates;
  updates.reserve(step.scheduled.size());
  for (size_t i = 0; i < step.scheduled.size(); ++i) {
    const ScheduledSequence& scheduled = step.scheduled[i];
    const auto found = sequences_.find(scheduled.id);
    if (found == sequences_.end()) continue;  // cancelled while the step was in flight
    // Preempted since: the workers have forgotten the token too, and will sample the same again.
    const Sequence& sequence = *found->second;
    if (sequence.slot < 0 || sequence.num_admissions != scheduled.admission) continue;
    updates.push_back(Apply(scheduled, outcome.sequences[i]));
    updates.back().batch_index = static_cast<int>(i);
    if (updates.back().end.has_value()) Forget(scheduled.id);
  }
  return updates;
}

SequenceUpdate Scheduler::Apply(const ScheduledSequence& scheduled,
                                const SequenceOutcome& outcome) {
  Sequence& sequence = *sequences_.at(scheduled.id);
  const Request& request = *sequence.request;
  SequenceUpdate update;
  update.id = sequence.id;
  update.num_prompt_tokens = request.num_prompt_tokens();
  update.num_generated_tokens = sequence.num_generated();

  const int computed = scheduled.first_token + scheduled.num_tokens;
  const int prompt_computed = std::min(computed, request.num_prompt_tokens());
  update.num_prompt_tokens_done = std::max(0, prompt_computed - sequence.num_prompt_tokens_done);
  sequence.num_prompt_tokens_done += update.num_prompt_tokens_done;
  sequence.num_prompt_logprobs_done += scheduled.num_prompt_logprobs;

  if (outcome.fault.has_value()) {
    update.end = EndReason::kFault;
    update.fault = *outcome.fault;
    return update;
  }
  CHECK_EQ(outcome.sampled_token_id.has_value(), scheduled.samples);
  if (!scheduled.samples) return update;
  if (request.max_tokens == 0) {  // the token is a by-product of reading the prompt
    update.end = EndReason::kLength;
    return update;
  }

  const uint32_t token_id = *outcome.sampled_token_id;
  sequence.tokens.push_back(token_id);
  update.token_ids.push_back(token_id);
  update.num_generated_tokens = sequence.num_generated();
  const bool may_stop = sequence.num_generated() >= request.min_tokens;
  if (may_stop && Contains(request.eos_token_ids, token_id)) {
    update.end = EndReason::kStop;
  } else if (may_stop && Contains(request.stop_token_ids, token_id)) {
    update.end = EndReason::kStop;
    update.stop_token_id = token_id;
  } else if (sequence.num_generated() >= request.max_tokens) {
    update.end = EndReason::kLength;
  }
  return update;
}

int Scheduler::BlocksFor(int num_tokens) const {
  return (num_tokens + options_.block_size - 1) / options_.block_size;
}

int Scheduler::BlocksAboutToBeWanted(const Sequence& sequence) const {
  const int wanted = std::min(BlocksFor(sequence.num_tokens()) + 1,
                              BlocksFor(sequence.request->max_total_tokens()));
  return std::max(0, wanted - static_cast<int>(sequence.block_table.size()));
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

}  // namespace fathom
