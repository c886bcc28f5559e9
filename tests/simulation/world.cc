#include "tests/simulation/world.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace fathom {
namespace {

struct Named {
  const char* name;
  int64_t Tally::*count;
};
constexpr Named kCounts[] = {
    {"requests", &Tally::requests},
    {"tokens", &Tally::tokens},
    {"steps", &Tally::steps},
    {"refused_invalid", &Tally::refused_invalid},
    {"refused_full", &Tally::refused_full},
    {"refused_unavailable", &Tally::refused_unavailable},
    {"cancelled", &Tally::cancelled},
    {"faulty", &Tally::faulty},
    {"lost", &Tally::lost},
    {"resumed", &Tally::resumed},
    {"expired", &Tally::expired},
    {"prepared", &Tally::prepared},
    {"outgrown", &Tally::outgrown},
    {"preemptions", &Tally::preemptions},
    {"found_in_cache", &Tally::found_in_cache},
    {"groups_broken", &Tally::groups_broken},
    {"forming_failed", &Tally::forming_failed},
    {"deaths", &Tally::deaths},
    {"poisoned", &Tally::poisoned},
    {"silences", &Tally::silences},
    {"slow_steps", &Tally::slow_steps},
    {"stale_results", &Tally::stale_results},
    {"duplicates", &Tally::duplicates},
    {"spoiled", &Tally::spoiled},
};

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0xbf58476d1ce4e5b9u;
  return hash ^ (hash >> 29);
}

}  // namespace

void EventLog::Add(absl::Duration time, const char* what, uint64_t a, uint64_t b, uint64_t c) {
  hash_ = Mix(hash_, static_cast<uint64_t>(absl::ToInt64Nanoseconds(time)));
  for (const char* letter = what; *letter != '\0'; ++letter) hash_ = Mix(hash_, *letter);
  for (const uint64_t number : {a, b, c}) hash_ = Mix(hash_, number);
  last_[num_events_++ % kNumKept] = {.time = time, .what = what, .numbers = {a, b, c}};
}

std::string EventLog::Tail() const {
  std::string text;
  for (uint64_t i = num_events_ - std::min(num_events_, kNumKept); i < num_events_; ++i) {
    const Event& event = last_[i % kNumKept];
    absl::StrAppendFormat(&text, "%12.6f  %-28s %d %d %d\n", absl::ToDoubleSeconds(event.time),
                          event.what, event.numbers[0], event.numbers[1], event.numbers[2]);
  }
  return text;
}

Tally& Tally::operator+=(const Tally& other) {
  for (const Named& named : kCounts) this->*named.count += other.*named.count;
  return *this;
}

std::string Tally::Text() const {
  std::string text;
  for (const Named& named : kCounts) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", this->*named.count, " ", named.name);
  }
  return text;
}

std::string Tally::Missing() const {
  std::string missing;
  for (const Named& named : kCounts) {
    if (this->*named.count == 0) absl::StrAppend(&missing, missing.empty() ? "" : ", ", named.name);
  }
  return missing;
}

}  // namespace fathom
