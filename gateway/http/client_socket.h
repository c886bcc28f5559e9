// A client's TCP socket with a deadline on everything. I/O thread only.
//
// Reads and writes are tried at once and wait only when the kernel says so; a write that fits the
// socket's buffer is therefore one send and no trip through the reactor.
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

namespace fathom {

class ClientSocket {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  enum class Outcome { kOk, kClosed, kTimedOut };

  explicit ClientSocket(boost::asio::ip::tcp::socket socket);

  // Appends at least a byte to `buffer`.
  Task<Outcome> Read(std::string& buffer, TimePoint deadline);

  // Writes all of `bytes`; times out when the peer takes nothing for `stall_timeout`.
  Task<Outcome> Write(std::string_view bytes, std::chrono::milliseconds stall_timeout);

  // Writes what the kernel takes at once and removes it from `bytes`; kTimedOut when some is left.
  Outcome WriteNow(std::string& bytes);

  // Until StopWatching: appends what arrives to `buffer` (which must live as long) while that holds
  // fewer than `max_bytes`, and calls `on_closed` once when the peer closes. Do not Read meanwhile.
  void Watch(std::string& buffer, size_t max_bytes, std::function<void()> on_closed);
  void StopWatching();

  void ShutdownSend();
  void Close();

  std::string PeerAddress() const;

 private:
  enum class ReadResult { kSome, kNothing, kClosed };
  struct Watcher;

  ReadResult TryRead(std::string& buffer);
  // Waits until the socket can be read or written.
  Task<Outcome> WaitFor(boost::asio::ip::tcp::socket::wait_type what, TimePoint deadline);
  void WatchAgain(std::shared_ptr<Watcher> watcher);

  boost::asio::ip::tcp::socket socket_;
  boost::asio::steady_timer timer_;
  std::shared_ptr<Watcher> watcher_;
};

}  // namespace fathom
