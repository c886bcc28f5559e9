#include "coordinator/inbox.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace fathom {

Inbox::Inbox(int max_queued_requests, std::function<void()> on_arrival)
    : max_queued_requests_(max_queued_requests),
      on_arrival_(std::move(on_arrival)),
      refusal_(absl::UnavailableError("the server is starting")) {}

absl::StatusOr<SequenceId> Inbox::Submit(LiveRequest live) {
  SequenceId id;
  {
    const std::lock_guard lock(mutex_);
    if (!refusal_.ok()) return refusal_;
    const int num_waiting = num_waiting_ + static_cast<int>(content_.submissions.size());
    if (num_waiting >= max_queued_requests_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the queue is full: ", num_waiting,
                       " requests are waiting (--max-queued-requests); try again later"));
    }
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

SequenceId Inbox::Put(LiveRequest live) {
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
      refusal_ = absl::UnavailableError(order == Order::kStop
                                            ? "the server is stopping"
                                            : "the server is draining: it is about to stop");
    }
  }
  on_arrival_();
  return was_open;
}

Inbox::Content Inbox::Take() {
  const std::lock_guard lock(mutex_);
  num_waiting_ += static_cast<int>(content_.submissions.size());  // until SetNumWaiting
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

void Inbox::SetNumWaiting(int num_waiting) {
  const std::lock_guard lock(mutex_);
  num_waiting_ = num_waiting;
}

}  // namespace fathom
