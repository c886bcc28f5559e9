// The last few thousand values of something, each with its time, and what they looked like lately.
//
// Not thread-safe.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace fathom {

class RecentValues {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  void Add(TimePoint now, double value) {
    if (values_.size() < kMaxValues) {
      values_.push_back({now, value});
    } else {
      values_[next_] = {now, value};
    }
    next_ = (next_ + 1) % kMaxValues;
  }

  struct Quantiles {
    size_t count = 0;  // of the values that these are of; all are 0 when there is none
    double p50 = 0;
    double p90 = 0;
    double p99 = 0;
  };
  // Of the values since then, as far as they are remembered.
  Quantiles Since(TimePoint begin) const {
    std::vector<double> recent;
    for (const Value& value : values_) {
      if (value.time >= begin) recent.push_back(value.value);
    }
    Quantiles quantiles;
    quantiles.count = recent.size();
    if (recent.empty()) return quantiles;
    std::sort(recent.begin(), recent.end());
    // The smallest value that at least that share of them does not exceed.
    const auto at = [&recent](double share) {
      const auto rank = static_cast<size_t>(share * static_cast<double>(recent.size()));
      return recent[std::min(rank, recent.size() - 1)];
    };
    quantiles.p50 = at(0.5);
    quantiles.p90 = at(0.9);
    quantiles.p99 = at(0.99);
    return quantiles;
  }

 private:
  static constexpr size_t kMaxValues = 4096;
  struct Value {
    TimePoint time;
    double value;
  };

  std::vector<Value> values_;
  size_t next_ = 0;  // to be overwritten
};

}  // namespace fathom
