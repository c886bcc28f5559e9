// What others want of Engine: requests, cancellations, and orders to drain or stop. Bounded.
//
// Whoever wants something puts it in, from any thread; Engine empties it at each heartbeat, and
// says how many requests may come in. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/live_request.h"

namespace fathom {

class Inbox {
 public:
  // In order of severity: there is no way back.
  enum class Order { kServe, kDrain, kStop };

  struct Submission {
    SequenceId id;
    LiveRequest live;
  };
  struct Content {
    std::vector<Submission> submissions;  // by id
    std::vector<SequenceId> cancellations;
  };

  // Of those that wait; beyond these new ones are refused.
  struct Limits {
    int max_requests = 1024;
    int64_t max_tokens = 0;  // of their prompts together, unless one waits alone; 0: any
  };

  // `on_arrival` is called after something was put in, from the thread that did. Starts closed.
  Inbox(Limits limits, std::function<void()> on_arrival);

  // Puts a new request in. Unavailable while closed; when the queue is full ResourceExhausted, with
  // the time that it takes to begin all that waits (RetryAfterOf).
  absl::StatusOr<SequenceId> Submit(LiveRequest live);
  // Puts one in that was let in elsewhere, even into a full queue. Unavailable while closed.
  absl::StatusOr<SequenceId> Resume(LiveRequest live);
  void Cancel(SequenceId id);

  // From now on requests are refused, for good. True when it was open until now.
  bool Give(Order order);

  // For Engine.
  Content Take();
  Order order() const;
  // Lets requests in; not after an order.
  void Open();
  // Requests are refused with this; after an order the order's reason stays.
  void Close(absl::Status refusal);
  // What waits of that which was taken out, and how fast it is begun.
  struct Load {
    int num_requests = 0;
    int64_t num_tokens = 0;
    double tokens_per_second = 0;  // 0: unknown
  };
  void SetLoad(const Load& waiting);

 private:
  SequenceId Put(LiveRequest live);              // requires mutex_
  absl::Status CheckRoom(int num_tokens) const;  // requires mutex_

  const Limits limits_;
  const std::function<void()> on_arrival_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  Content content_;
  absl::Status refusal_;  // what new requests are told; OK while they are let in
  Order order_ = Order::kServe;
  SequenceId last_id_ = 0;
  Load waiting_;  // with all that is in content_
};

}  // namespace fathom
