#include "coordinator/load_progress.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_format.h"
#include "base/human_bytes.h"

namespace fathom {

std::string LoadProgress::Line(absl::Duration now) const {
  int num_ready = 0;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
  v1::JoinProgress::Phase slowest = v1::JoinProgress::PHASE_READY;
  for (const v1::JoinProgress& progress : latest_) {
    slowest = std::min(slowest, progress.phase());
    num_ready += progress.phase() == v1::JoinProgress::PHASE_READY ? 1 : 0;
    bytes_done += progress.bytes_done();
    bytes_total += progress.bytes_total();
  }
  switch (slowest) {
    case v1::JoinProgress::PHASE_READY:
      return "all workers are ready";
    case v1::JoinProgress::PHASE_ALLOCATING_KV:
      return "allocating the KV cache";
    case v1::JoinProgress::PHASE_CONNECTING:
      return absl::StrFormat("connecting: %d of %d workers ready", num_ready, latest_.size());
    default:
      break;
  }
  if (bytes_total == 0) return "loading weights";
  const double seconds = absl::ToDoubleSeconds(now - started_);
  const double bytes_per_second = seconds > 0 ? bytes_done / seconds : 0;
  std::string line = absl::StrFormat(
      "loading weights: %.0f %% (%s of %s", 100.0 * bytes_done / bytes_total,
      HumanBytes(static_cast<double>(bytes_done)), HumanBytes(static_cast<double>(bytes_total)));
  if (bytes_per_second > 0) {
    const double bytes_left =
        static_cast<double>(bytes_total) - static_cast<double>(std::min(bytes_done, bytes_total));
    absl::StrAppendFormat(&line, ", %s/s, %.0f s left", HumanBytes(bytes_per_second),
                          bytes_left / bytes_per_second);
  }
  return line + ")";
}

}  // namespace fathom
