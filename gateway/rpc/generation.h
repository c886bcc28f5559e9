// The generate calls of one client request, as one stream of events.
//
// What a slow reader has not taken waits here: kMaxWaitingResponses of each call, then newer tokens
// join the last of them, so a call never costs more than the tokens it asked for. I/O thread only.
#pragma once

#include <cstdint>
#include <deque>
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
    // Absent: the call has ended with `status`. That, or a finish_reason, makes it the last event.
    std::optional<v1::GenerateResponse> response;
    absl::Status status;
  };

  static constexpr size_t kMaxWaitingResponses = 64;

  // Starts one call for each request. `client` must outlive this.
  Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests);

  // Cancels the calls that still run.
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // The next event of any call; nullopt when all have ended, or after CancelAll.
  Task<std::optional<Event>> Next();

  // The coordinator stops working on that request; no more of its events come.
  void Cancel(size_t call);
  void CancelAll();

 private:
  class Call;

  GenerateLink& link_;
  std::deque<size_t> ready_;  // calls, one entry for each event that waits
  Wakeup wakeup_;
  std::vector<std::unique_ptr<Call>> calls_;  // null: ended or cancelled
};

}  // namespace fathom
