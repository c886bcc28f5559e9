// The generate calls of one client request, as one stream of events.
//
// An event goes straight from the message it came in to whoever listens. What a slow reader has not
// taken waits here: kMaxWaitingResponses of each call, then newer tokens join the last of them, so
// a call never costs more than the tokens it asked for. I/O thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "gateway/http/task.h"
#include "gateway/http/wakeup.h"
#include "gateway/rpc/coordinator_client.h"
#include "proto/generate.pb.h"

namespace fathom {

class Generation {
 public:
  struct Event {
    size_t call = 0;  // index of the request it belongs to
    // Null: the call has ended with `status`. That, or a finish_reason, makes it the last event. It
    // may be moved from.
    v1::GenerateResponse* response = nullptr;
    absl::Status status;
  };

  // Takes an event; false when it wants no other for now. May cancel calls.
  using Listener = std::function<bool(const Event&)>;

  static constexpr size_t kMaxWaitingResponses = 64;

  // Starts one call for each request. `client` must outlive this.
  Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests);

  // Cancels the calls that still run.
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Tells `listener` the events of all calls as they come, until it wants no other or is_over().
  Task<> Listen(Listener listener);

  // All calls have ended and all their events were told, or they were cancelled.
  bool is_over() const { return num_running_ == 0; }

  // The coordinator stops working on that request; no more of its events come.
  void Cancel(size_t call);
  void CancelAll();

 private:
  class Call;

  void TellNow(const Event& event);
  void KeepEventOf(size_t call);
  void TellWaiting();
  void Tell(const Event& event);
  std::unique_ptr<Call> Release(size_t call);

  GenerateLink& link_;
  Wakeup wakeup_;
  std::vector<std::unique_ptr<Call>> calls_;  // null: ended or cancelled
  size_t num_running_;                        // of these
  Listener listener_;
  // Calls, one entry for each event that waits. A list: empty, as it mostly is, it takes no memory.
  std::list<size_t> waiting_;
  bool is_listening_ = false;  // Listen waits for an event, and none waits for it
  bool wants_more_ = false;    // the listener
};

}  // namespace fathom
