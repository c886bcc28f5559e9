// One client's connection: its requests, one after the other.
//
// While a handler works the socket is watched, so that a client that goes away is noticed at once,
// also while nothing is being written. Requests that arrive meanwhile (pipelining) wait in the
// buffer, up to a limit. I/O thread only.
#pragma once

#include <memory>
#include <optional>
#include <utility>  // Boost 1.74 forgets it (std::exchange)

#include "boost/asio/ip/tcp.hpp"
#include "gateway/http/server.h"
#include "gateway/http/task.h"

namespace fathom {

// What all connections of a server share. Outlives them.
struct ConnectionEnvironment {
  const ServerOptions& options;
  const Router& router;
  AccessGuard& guard;
  const CrossOriginPolicy& cross_origin;
  RequestObserver& observer;
  const ErrorFormatter& error_formatter;
  const bool& draining;  // a connection closes after its next response
};

class Connection {
 public:
  virtual ~Connection() = default;

  // `tls` null: plain HTTP.
  static std::shared_ptr<Connection> Create(boost::asio::ip::tcp::socket socket,
                                            std::shared_ptr<const TlsContext> tls,
                                            const ConnectionEnvironment& environment);

  // Serves until either side closes. The connection lives at least as long as this runs.
  virtual Task<> Run() = 0;

  // Closes after the response under way, or now if there is none. One that has not asked yet is
  // about to: it is answered first.
  virtual void CloseWhenIdle() = 0;

  // No byte of a request is here, and none is being answered.
  virtual bool is_idle() const = 0;

  // Closes now if it is idle, else ends the response that is under way with that error: as a whole
  // response, or as the last event of its stream. Its handler sees the client gone.
  virtual void EndWith(const Response& error) = 0;

  // Closes now.
  virtual void Close() = 0;

  // Since when no request of it is being answered; nullopt while one is.
  virtual std::optional<std::chrono::steady_clock::time_point> waiting_since() const = 0;
};

}  // namespace fathom
