// The memory behind the block ids, with a hash of the prefix in place of keys and values: whoever
// is led to the KV of other tokens, of an earlier epoch or of another salt is caught.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "proto/worker.pb.h"
#include "worker/slot_table.h"

namespace fathom {

class KvOracle {
 public:
  // `salt_of` tells a request's salt, as a number, from its seed.
  KvOracle(const SlotTableOptions& limits, std::function<uint64_t(uint64_t seed)> salt_of);

  // Makes the step that `slots` has just applied: stores the KV of all its tokens, then reads that
  // of all positions up to them. What is wrong, if anything is.
  std::optional<std::string> Compute(const v1::StepCommand& command, const StepPlan& plan,
                                     const SlotTable& slots);

 private:
  struct Position {
    int slot;
    int position;
    bool is_new;        // computed in this step
    uint64_t expected;  // what it must hold
  };
  // Calls `visit` with each position that is in use, and what it holds.
  template <typename Visit>
  void ForEachPosition(const v1::StepCommand& command, const StepPlan& plan, const SlotTable& slots,
                       Visit visit);

  const int block_size_;
  const std::function<uint64_t(uint64_t seed)> salt_of_;
  std::vector<uint64_t> kv_;     // by block and offset
  std::vector<uint64_t> salts_;  // by slot
};

}  // namespace fathom
