#include "coordinator/inbox.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/retry_after.h"

namespace fathom {

Inbox::Inbox(Limits limits, std::function<void()> on_arrival)
    : limits_(limits),
      on_arrival_(std::move(on_arrival)),
      refusal_(absl::UnavailableError("the server is starting")) {}

absl::StatusOr<SequenceId> Inbox::Submit(LiveRequest live) {
  SequenceId id;
  {
    const std::lock_guard lock(mutex_);
    if (!refusal_.ok()) return refusal_;
    if (absl::Status room = CheckRoom(live.request->num_prompt_tokens()); !room.ok()) return room;
    id = Put(std::move(live));
  }
  on_arrival_();
  return id;
}

absl::StatusOr<SequenceId> Inbox::Resume(LiveRequest live) {
  SequenceId id;
  {
    const std::lock_guard lock(mutex_);
    if (!refusal_.ok()) return refusal_;
    id = Put(std::move(live));
  }
  on_arrival_();
  return id;
}

absl::Status Inbox::CheckRoom(int num_tokens) const {
  std::string full;
  if (waiting_.num_requests >= limits_.max_requests) {
    full = absl::StrCat(waiting_.num_requests, " requests are waiting (--max-queued-requests)");
  } else if (limits_.max_tokens > 0 && waiting_.num_tokens > 0 &&
             waiting_.num_tokens + num_tokens > limits_.max_tokens) {
    full = absl::StrCat(waiting_.num_tokens, " tokens are waiting, and ", num_tokens,
                        " more are too many (--max-queued-tokens ", limits_.max_tokens, ")");
  } else {
    return absl::OkStatus();
  }
  // A server that has just started, or reads long prompts, has begun nothing lately.
  constexpr double kLeastSeconds = 1, kMostSeconds = 600, kSecondsIfUnknown = 10;
  double seconds = kSecondsIfUnknown;
  if (waiting_.tokens_per_second > 0) {
    seconds = std::clamp(static_cast<double>(waiting_.num_tokens) / waiting_.tokens_per_second,
                         kLeastSeconds, kMostSeconds);
  }
  absl::Status status =
      absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", full, "; try again later"));
  SetRetryAfter(status, static_cast<int>(std::ceil(seconds)));
  return status;
}

SequenceId Inbox::Put(LiveRequest live) {
  ++waiting_.num_requests;
  waiting_.num_tokens += live.request->num_prompt_tokens();
  content_.submissions.push_back({.id = ++last_id_, .live = std::move(live)});
  return last_id_;
}

void Inbox::Cancel(SequenceId id) {
  {
    const std::lock_guard lock(mutex_);
    content_.cancellations.push_back(id);
  }
  on_arrival_();
}

bool Inbox::Give(Order order) {
  bool was_open;
  {
    const std::lock_guard lock(mutex_);
    was_open = refusal_.ok();
    if (order > order_) {
      order_ = order;
      refusal_ = absl::UnavailableError(
          order == Order::kStop ? "the server is stopping; try again"
                                : "the server is draining: it is about to stop; try again");
    }
  }
  on_arrival_();
  return was_open;
}

Inbox::Content Inbox::Take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(content_, {});
}

Inbox::Order Inbox::order() const {
  const std::lock_guard lock(mutex_);
  return order_;
}

void Inbox::Open() {
  const std::lock_guard lock(mutex_);
  if (order_ == Order::kServe) refusal_ = absl::OkStatus();
}

void Inbox::Close(absl::Status refusal) {
  const std::lock_guard lock(mutex_);
  if (order_ == Order::kServe) refusal_ = std::move(refusal);
}

void Inbox::SetLoad(const Load& waiting) {
  const std::lock_guard lock(mutex_);
  waiting_ = waiting;
  waiting_.num_requests += static_cast<int>(content_.submissions.size());
  for (const Submission& submission : content_.submissions) {
    waiting_.num_tokens += submission.live.request->num_prompt_tokens();
  }
}

}  // namespace fathom
