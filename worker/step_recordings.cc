#include "worker/step_recordings.h"

#include <algorithm>

#include "base/status_macros.h"

namespace fathom {

absl::Status StepRecordings::Run(const Shape& shape, const Owners& owners,
                                 absl::FunctionRef<absl::Status()> queue_step) {
  if (owners != owners_) entries_.clear();
  owners_ = owners;
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.shape == shape; });
  if (found == entries_.end()) {
    if (entries_.size() == kMostRecordings) entries_.pop_back();
    entries_.push_front({.shape = shape, .recording = nullptr});
    return queue_step();
  }
  entries_.splice(entries_.begin(), entries_, found);
  std::unique_ptr<Recording>& recording = entries_.front().recording;
  if (recording == nullptr) {
    ASSIGN_OR_RETURN(recording, device_.Record(queue_step));
    if (recording == nullptr) return queue_step();  // this device records nothing
  }
  recording->Replay();
  return absl::OkStatus();
}

}  // namespace fathom
