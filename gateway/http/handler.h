// What answers the requests of a route, and the way it answers.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "gateway/http/http_request.h"
#include "gateway/http/response.h"
#include "gateway/http/task.h"

namespace fathom {

// What a handler adds to the line of its request in the access log.
struct RequestNotes {
  std::string id;  // cmpl-…, chatcmpl-…
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
};

// The way out for one request. Exactly one of: Send once; or SendEvent any number of times, then
// EndEvents. Once gone() everything else does nothing. I/O thread only.
class ResponseWriter {
 public:
  virtual ~ResponseWriter() = default;

  virtual Task<> Send(Response response) = 0;

  // Writes `data: PAYLOAD\n\n` of a text/event-stream in one send, with the head before the first.
  // What the kernel does not take at once is kept for CatchUp.
  virtual void SendEvent(std::string_view payload) = 0;

  // Writes whole events of AppendNamedEvent, perhaps none, in one send.
  virtual void SendNamedEvents(std::string_view events) = 0;

  // Ends the body; before that `data: [DONE]\n\n`, unless the events had names.
  virtual void EndEvents() = 0;

  // Whether something is kept. Who goes on sending makes it grow.
  virtual bool is_behind() const = 0;

  // Returns when the kernel has taken everything: a slow reader holds up only the caller. A reader
  // that takes nothing for the write timeout is gone.
  virtual Task<> CatchUp() = 0;

  // The client closed the connection, or takes nothing any more.
  virtual bool gone() const = 0;

  // Calls `on_gone` when gone() becomes true while the handler runs; at once if it is. Replaced by
  // the next call; not called after the handler returned.
  virtual void SetOnGone(std::function<void()> on_gone) = 0;

  // Whether the head of the response is out, and with it the status.
  virtual bool started() const = 0;

  virtual RequestNotes& notes() = 0;
};

class Handler {
 public:
  virtual ~Handler() = default;

  // Answers `request`; both references live until the task ends.
  virtual Task<> Handle(const HttpRequest& request, ResponseWriter& writer) = 0;
};

}  // namespace fathom
