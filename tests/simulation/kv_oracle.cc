#include "tests/simulation/kv_oracle.h"

#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"

namespace fathom {

KvOracle::KvOracle(const SlotTableOptions& limits, std::function<uint64_t(uint64_t seed)> salt_of)
    : block_size_(limits.block_size),
      salt_of_(std::move(salt_of)),
      kv_(size_t{1} * limits.num_kv_blocks * limits.block_size),
      salts_(limits.max_sequences) {}

template <typename Visit>
void KvOracle::ForEachPosition(const v1::StepCommand& command, const StepPlan& plan,
                               const SlotTable& slots, Visit visit) {
  int index = 0;  // in the batch
  for (int k = 0; k < command.slots_size(); ++k) {
    const auto slot = static_cast<int>(command.slots(k));
    if (absl::c_linear_search(plan.slots_with_faults, slot)) continue;  // nothing is computed
    const int32_t* const blocks = plan.batch.block_tables.data() + index * plan.batch.max_blocks;
    const absl::Span<const int32_t> tokens = slots.token_ids(slot);
    const int end = plan.batch.context_lens[index++];
    const int first = end - static_cast<int>(command.num_tokens(k));
    uint64_t hash = salts_[slot];
    for (int i = 0; i < end; ++i) {
      hash = (hash ^ static_cast<uint64_t>(tokens[i] + 1)) * 0xbf58476d1ce4e5b9u;
      hash ^= hash >> 31;
      uint64_t& kv = kv_[size_t{1} * blocks[i / block_size_] * block_size_ + i % block_size_];
      visit({.slot = slot, .position = i, .is_new = i >= first, .expected = hash}, kv);
    }
  }
}

std::optional<std::string> KvOracle::Compute(const v1::StepCommand& command, const StepPlan& plan,
                                             const SlotTable& slots) {
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    salts_[admission.slot()] = salt_of_(admission.sampling().seed());
  }
  ForEachPosition(command, plan, slots, [](const Position& position, uint64_t& kv) {
    if (position.is_new) kv = position.expected;
  });
  std::optional<std::string> wrong;
  ForEachPosition(command, plan, slots, [&](const Position& position, uint64_t kv) {
    if (kv == position.expected || wrong.has_value()) return;
    wrong = absl::StrCat("step ", command.step(), ", slot ", position.slot,
                         " reads KV that is not its own at position ", position.position);
  });
  return wrong;
}

}  // namespace fathom
