// What everything in one simulated run shares: its clock, its chance, its record, and the first
// thing that was found wrong.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "tests/simulation/event_queue.h"
#include "tests/simulation/random.h"

namespace fathom {

// What happened, as a hash of all of it and the words of the last of it.
class EventLog {
 public:
  // `what` is a literal.
  void Add(absl::Duration time, const char* what, uint64_t a, uint64_t b, uint64_t c);

  uint64_t hash() const { return hash_; }
  std::string Tail() const;  // the last events, a line each

 private:
  struct Event {
    absl::Duration time;
    const char* what;
    std::array<uint64_t, 3> numbers;
  };
  static constexpr uint64_t kNumKept = 60;

  uint64_t hash_ = 0;
  uint64_t num_events_ = 0;
  std::array<Event, kNumKept> last_ = {};
};

// How often what happened; a sweep in which something never did has tested less than it says.
struct Tally {
  int64_t requests = 0;
  int64_t tokens = 0;
  int64_t steps = 0;
  int64_t refused_invalid = 0;
  int64_t refused_full = 0;
  int64_t refused_unavailable = 0;
  int64_t cancelled = 0;
  int64_t faulty = 0;
  int64_t lost = 0;
  int64_t resumed = 0;
  int64_t expired = 0;   // waited for too long
  int64_t prepared = 0;  // a grammar
  int64_t outgrown = 0;  // did not fit into the group that formed since
  int64_t preemptions = 0;
  int64_t found_in_cache = 0;
  int64_t groups_broken = 0;
  int64_t forming_failed = 0;
  int64_t deaths = 0;
  int64_t poisoned = 0;  // died of a request
  int64_t silences = 0;
  int64_t slow_steps = 0;
  int64_t stale_results = 0;
  int64_t duplicates = 0;
  int64_t spoiled = 0;

  Tally& operator+=(const Tally& other);
  std::string Text() const;
  // The names of those that are 0.
  std::string Missing() const;
};

class World {
 public:
  explicit World(uint64_t seed) : random(seed) {}

  EventQueue clock;
  Random random;
  EventLog log;
  Tally tally;
  std::optional<std::string> failure;  // the first

  void Log(const char* what, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
    log.Add(clock.now(), what, a, b, c);
  }
  void Fail(std::string what) {
    if (!failure.has_value()) failure = std::move(what);
  }
};

}  // namespace fathom
