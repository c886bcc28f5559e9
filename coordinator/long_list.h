// A list that grows at its end.
//
// The last elements stand in the object itself, and move to the others, which are somewhere else,
// all at once. So when thousands of sequences get a token in every step, what a step touches lies
// close together. Thousands of places far apart would cost it more than all the rest it does: most
// of all to find their pages.
//
// Not thread-safe.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace fathom {

template <typename T>
class LongList {
 public:
  LongList() = default;
  explicit LongList(std::vector<T> values) : first_(std::move(values)) {}

  int size() const { return static_cast<int>(first_.size()) + num_last_; }
  bool empty() const { return size() == 0; }

  T operator[](int index) const {
    const auto num_first = static_cast<int>(first_.size());
    return index < num_first ? first_[index] : last_[index - num_first];
  }

  T back() const { return (*this)[size() - 1]; }

  void push_back(T value) {
    if (num_last_ == kMostLast) MoveLast();
    last_[num_last_++] = value;
  }

  // Elements in one piece. Valid until the list changes.
  absl::Span<const T> Slice(int begin, int count) {
    const auto num_first = static_cast<int>(first_.size());
    if (begin >= num_first) return absl::MakeConstSpan(last_).subspan(begin - num_first, count);
    if (begin + count > num_first) MoveLast();
    return absl::MakeConstSpan(first_).subspan(begin, count);
  }

  // All of it, one after the other. Valid until the list changes.
  std::array<absl::Span<const T>, 2> pieces() const {
    return {absl::MakeConstSpan(first_), absl::MakeConstSpan(last_.data(), num_last_)};
  }

  std::vector<T> CopyFrom(int begin) const {
    std::vector<T> copy;
    for (const absl::Span<const T> piece : pieces()) {
      const int skipped = std::min(begin, static_cast<int>(piece.size()));
      copy.insert(copy.end(), piece.begin() + skipped, piece.end());
      begin -= skipped;
    }
    return copy;
  }

  // Hints that push_back is about to be called: memory needs a while.
  void Prefetch() const {
    if (num_last_ == kMostLast) __builtin_prefetch(first_.data() + first_.size(), 1);
  }

 private:
  static constexpr int kMostLast = 24;

  void MoveLast() {
    first_.insert(first_.end(), last_.begin(), last_.begin() + num_last_);
    num_last_ = 0;
  }

  std::vector<T> first_;
  int num_last_ = 0;
  std::array<T, kMostLast> last_ = {};
};

}  // namespace fathom
