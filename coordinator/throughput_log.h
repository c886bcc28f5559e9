// The line that operators of vLLM know: how fast, how many, how full.
//
//   Avg prompt throughput: 120.3 tokens/s, Avg generation throughput: 41.0 tokens/s,
//   Running: 8 reqs, Waiting: 0 reqs, KV cache usage: 3.1%          (one line)
//
// Time is an argument. Not thread-safe; only Engine calls it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/time/time.h"

namespace fathom {

class ThroughputLog {
 public:
  explicit ThroughputLog(absl::Duration interval) : interval_(interval) {}

  void Add(int num_prompt_tokens, int num_generated_tokens);

  struct Load {
    int num_running = 0;
    int num_waiting = 0;
    double kv_cache_usage = 0;  // [0, 1]
  };
  // The line, when the interval has passed since the last one. `now` is monotonic, from any origin.
  std::optional<std::string> Line(absl::Duration now, const Load& load);

  // How long until a line is due; forever when nothing was counted since the last one.
  absl::Duration DueIn(absl::Duration now) const;

  // After a pause: when nothing is left to report, the next line does not average over the pause.
  void Wake(absl::Duration now);

 private:
  const absl::Duration interval_;
  std::optional<absl::Duration> since_;
  int64_t num_prompt_tokens_ = 0;
  int64_t num_generated_tokens_ = 0;
};

}  // namespace fathom
