// One run of the coordinator in a made-up world: the real Admission, GroupRouter, Engine, Scheduler
// and WorkerGroup, with no thread, no clock and no wire. Everything that happens follows from the
// seed, so a seed replays a run exactly.
//
// Clients come in bursts with odd and hostile requests, hang up alone and all together; workers
// misbehave (simulated_cluster). Then the faults stop, everybody is served, and the loops drain.
// What must hold:
//   - every token, logprob, count and reason for an end is what the hash of the prefix says;
//   - every request ends exactly once, and badly only if its own sequence failed, or its workers
//     were lost and nothing waits, or too often; none is lost otherwise;
//   - no command is one that a worker must refuse, and no sequence reads KV that is not its own, of
//     an epoch that is over, or of another salt;
//   - no waiting request is overtaken by one that comes after it by time, or priority where that
//     counts, but for kMaxOvertakers; the oldest of those that run goes on within a bounded number
//     of steps, so that none starves;
//   - no more wait than may, and none is refused for a full queue that is not;
//   - in the end all KV blocks are free, and nothing holds on to a request or its stream.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "coordinator/metrics.h"
#include "tests/simulation/world.h"

namespace fathom {

struct SimulationResult {
  std::optional<std::string> failure;
  std::string last_events;
  uint64_t log_hash = 0;  // of all events
  Tally tally;
};

// `metrics` only counts on; it may be that of another run.
SimulationResult Simulate(uint64_t seed, Metrics& metrics);

// From now on a CHECK that fails during a run also prints the seed and the last events.
void TellSeedOnAbort();

}  // namespace fathom
