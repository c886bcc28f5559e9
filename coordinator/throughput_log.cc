#include "coordinator/throughput_log.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace fathom {

void ThroughputLog::Add(int num_prompt_tokens, int num_generated_tokens) {
  num_prompt_tokens_ += num_prompt_tokens;
  num_generated_tokens_ += num_generated_tokens;
}

std::optional<std::string> ThroughputLog::Line(absl::Duration now, const Load& load) {
  if (!since_.has_value()) since_ = now;
  const double seconds = absl::ToDoubleSeconds(now - *since_);
  if (now - *since_ < interval_) return std::nullopt;
  std::string line = absl::StrFormat(
      "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
      "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%",
      num_prompt_tokens_ / seconds, num_generated_tokens_ / seconds, load.num_running,
      load.num_waiting, 100 * load.kv_cache_usage);
  since_ = now;
  num_prompt_tokens_ = 0;
  num_generated_tokens_ = 0;
  return line;
}

absl::Duration ThroughputLog::DueIn(absl::Duration now) const {
  if (num_prompt_tokens_ + num_generated_tokens_ == 0) return absl::InfiniteDuration();
  return std::max(absl::ZeroDuration(), interval_ - (now - since_.value_or(now)));
}

void ThroughputLog::Wake(absl::Duration now) {
  if (num_prompt_tokens_ + num_generated_tokens_ == 0) since_ = now;
}

}  // namespace fathom
