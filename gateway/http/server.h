// An HTTP/1.1 server on one I/O thread: accepts connections, reads requests strictly and within
// limits, hands them to the router's handlers, and notices when clients go away.
//
// All functions are called on the I/O thread, except before it runs.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "gateway/http/access_guard.h"
#include "gateway/http/cross_origin.h"
#include "gateway/http/handler.h"
#include "gateway/http/io_thread.h"
#include "gateway/http/request_parser.h"
#include "gateway/http/router.h"
#include "gateway/http/task.h"
#include "gateway/http/tls.h"

namespace fathom {

struct ServerOptions {
  std::string host = "0.0.0.0";
  uint16_t port = 8000;  // 0: any free one
  HttpsOptions https;
  CrossOriginOptions cross_origin;
  RequestLimits request_limits;
  // A further one takes the place of the one that has waited longest without a request being
  // answered; when there is none, it gets a 503.
  size_t max_connections = 20'000;
  std::chrono::milliseconds head_timeout{10'000};        // from the first byte of a request
  std::chrono::milliseconds body_timeout{30'000};        // from the end of its head
  std::chrono::milliseconds keep_alive_timeout{60'000};  // between requests
  std::chrono::milliseconds write_timeout{30'000};       // a reader that takes nothing is gone
};

// One request, when its response is out or the client is gone.
struct RequestRecord {
  std::string_view id;        // request_id.h
  std::string_view trace_id;  // the client's, "" if it has none
  std::string_view client;    // address
  std::string_view caller;    // of the guard's verdict
  std::string_view method;
  std::string_view path;     // decoded: may hold any byte but NUL
  std::string_view pattern;  // the route's path; "" when there is none
  int status = 0;            // 0: the client went away before there was one
  bool complete = false;     // the whole response was handed to the kernel
  std::chrono::nanoseconds duration{0};
  const RequestNotes* notes = nullptr;
};

class RequestObserver {
 public:
  virtual ~RequestObserver() = default;
  virtual void OnRequestEnd(const RequestRecord& record) = 0;
};

class Server {
 public:
  // All references must outlive the server.
  Server(ServerOptions options, IoThread& io_thread, const Router& router, AccessGuard& guard,
         RequestObserver& observer, ErrorFormatter error_formatter);
  ~Server();

  // Binds and listens; InvalidArgument when an option is wrong, AlreadyExists when the port is in
  // use. Accepting begins when the I/O thread runs. Reads the files of TLS.
  absl::Status Start();

  // Reads them again, for new connections; those that cannot be used change nothing.
  absl::Status ReloadTls();

  // The port it listens on.
  uint16_t port() const;

  // Closes idle connections and lets the requests that run finish. New connections, and those that
  // have not asked yet, are answered one request each: which, is for the guard to know.
  void Drain();

  // Returns when the requests from before Drain are answered, or when the timeout is over.
  Task<> WaitUntilDrained(std::chrono::milliseconds timeout);
  // Returns when no connection is left, or when the timeout is over.
  Task<> WaitUntilClosed(std::chrono::milliseconds timeout);

  // Accepts no more, and ends every response that is under way with a 503 that says why: as a whole
  // response, or as the last event of its stream. The handlers see their clients gone. Returns
  // before slow readers have taken it.
  void EndAll(std::string_view why);

  // Accepts no more and closes every connection; the handlers see their clients gone.
  void CloseAll();

  size_t num_connections() const;

 private:
  struct State;  // shared with the connections
  std::shared_ptr<State> state_;
};

}  // namespace fathom
