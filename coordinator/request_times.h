// How long requests wait, are read and are generated, for the metrics.
//
// Time is an argument, monotonic from any origin. A request that is preempted goes on as it was: it
// waited until it was first scheduled, and what is computed again counts as generating. Not
// thread-safe; only Engine calls it.
#pragma once

#include <optional>
#include <unordered_map>
#include <vector>

#include "absl/time/time.h"
#include "coordinator/metrics.h"
#include "coordinator/scheduler.h"
#include "coordinator/sequence.h"
#include "coordinator/step.h"

namespace fathom {

class RequestTimes {
 public:
  // `metrics` must outlive this.
  explicit RequestTimes(Metrics& metrics) : metrics_(metrics) {}

  // Of a request that lost its workers it is when it went on with others.
  void OnSubmitted(SequenceId id, absl::Duration now) { times_[id].submitted = now; }
  void OnStepSent(const Step& step, absl::Duration now);
  void OnCommitted(const std::vector<SequenceUpdate>& updates, absl::Duration now);
  void OnCancelled(SequenceId id) { times_.erase(id); }
  void Clear() { times_.clear(); }

 private:
  struct Times {
    absl::Duration submitted;
    std::optional<absl::Duration> scheduled;
    std::optional<absl::Duration> first_token;
  };

  void OnEnd(const SequenceUpdate& update, const Times& times, absl::Duration now);

  Metrics& metrics_;
  std::unordered_map<SequenceId, Times> times_;
};

}  // namespace fathom
