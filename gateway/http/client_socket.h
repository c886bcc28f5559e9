// A client's TCP socket with a deadline on everything. I/O thread only.
//
// Reads and writes are tried at once and wait only when the kernel says so; a write that fits the
// socket's buffer is therefore one send and no trip through the reactor. With TLS the same holds of
// its records.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>  // Boost 1.74 forgets it (std::exchange)

#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/steady_timer.hpp"
#include "gateway/http/task.h"
#include "gateway/http/tls.h"

namespace fathom {

class ClientSocket {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  enum class Outcome { kOk, kClosed, kTimedOut };

  // `tls` null: plain.
  ClientSocket(boost::asio::ip::tcp::socket socket, const TlsContext* tls);

  // Before anything else; does nothing without TLS.
  Task<Outcome> Handshake(TimePoint deadline);

  // Appends at least a byte to `buffer`.
  Task<Outcome> Read(std::string& buffer, TimePoint deadline);

  // Writes all of `bytes`; times out when the peer takes nothing for `stall_timeout`.
  Task<Outcome> Write(std::string_view bytes, std::chrono::milliseconds stall_timeout);

  // Writes what the kernel takes at once and removes it from `bytes`; some may be left unless the
  // peer closed.
  Outcome WriteNow(std::string_view& bytes);

  // Until StopWatching: appends what arrives to `buffer` (which must live as long) while that holds
  // fewer than `max_bytes`, and calls `on_closed` once when the peer closes. Do not Read meanwhile.
  void Watch(std::string& buffer, size_t max_bytes, std::function<void()> on_closed);
  void StopWatching();

  void ShutdownSend();
  void Close();

  std::string PeerAddress() const;

 private:
  // Of one attempt: done, or what to wait for.
  using Attempt = TlsSession::Result;
  struct Watcher;

  Attempt TryRead(std::string& buffer);
  Attempt TryWrite(std::string_view bytes, size_t& size);
  // Waits until the socket can be read or written.
  Task<Outcome> WaitFor(boost::asio::ip::tcp::socket::wait_type what, TimePoint deadline);
  void WatchAgain(std::shared_ptr<Watcher> watcher);

  Task<Outcome> WaitFor(Attempt what, TimePoint deadline);

  boost::asio::ip::tcp::socket socket_;
  const std::unique_ptr<TlsSession> tls_;  // null: plain
  boost::asio::steady_timer timer_;
  std::shared_ptr<Watcher> watcher_;
};

}  // namespace fathom
