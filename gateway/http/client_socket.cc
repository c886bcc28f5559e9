#include "gateway/http/client_socket.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "boost/asio/buffer.hpp"
#include "boost/asio/error.hpp"
#include "boost/asio/redirect_error.hpp"
#include "boost/asio/use_awaitable.hpp"

namespace fathom {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;
using tcp = asio::ip::tcp;

constexpr size_t kReadBytes = 16 << 10;

}  // namespace

// Outlives StopWatching while a wait of the reactor still refers to it.
struct ClientSocket::Watcher {
  std::string& buffer;
  const size_t max_bytes;
  std::function<void()> on_closed;  // empty once it was called or watching stopped
};

ClientSocket::ClientSocket(tcp::socket socket, const TlsContext* tls)
    : socket_(std::move(socket)),
      tls_(tls == nullptr ? nullptr : tls->Accept(socket_.native_handle())),
      timer_(socket_.get_executor()) {
  error_code ignored;  // a socket that is dead already shows it at the first read
  socket_.non_blocking(true, ignored);
  socket_.set_option(tcp::no_delay(true), ignored);
}

std::string ClientSocket::PeerAddress() const {
  error_code error;
  const tcp::endpoint peer = socket_.remote_endpoint(error);
  if (error) return "unknown";
  const std::string address = peer.address().to_string(error);
  return peer.address().is_v6() ? absl::StrCat("[", address, "]:", peer.port())
                                : absl::StrCat(address, ":", peer.port());
}

ClientSocket::Attempt ClientSocket::TryRead(std::string& buffer) {
  std::array<char, kReadBytes> bytes;
  size_t size = 0;
  if (!socket_.is_open()) return Attempt::kClosed;
  if (tls_ != nullptr) {
    const Attempt attempt = tls_->Read(bytes.data(), bytes.size(), size);
    if (attempt == Attempt::kDone) buffer.append(bytes.data(), size);
    return attempt;
  }
  error_code error;
  size = socket_.read_some(asio::buffer(bytes), error);
  if (size > 0) {
    buffer.append(bytes.data(), size);
    return Attempt::kDone;
  }
  return error == asio::error::would_block ? Attempt::kWantsRead : Attempt::kClosed;
}

ClientSocket::Attempt ClientSocket::TryWrite(std::string_view bytes, size_t& size) {
  size = 0;
  if (!socket_.is_open()) return Attempt::kClosed;
  if (tls_ != nullptr) return tls_->Write(bytes, size);
  error_code error;
  size = socket_.write_some(asio::buffer(bytes.data(), bytes.size()), error);
  if (!error) return Attempt::kDone;
  return error == asio::error::would_block ? Attempt::kWantsWrite : Attempt::kClosed;
}

Task<ClientSocket::Outcome> ClientSocket::Handshake(TimePoint deadline) {
  while (tls_ != nullptr) {
    const Attempt attempt = socket_.is_open() ? tls_->Handshake() : Attempt::kClosed;
    if (attempt == Attempt::kDone) break;
    const Outcome outcome = co_await WaitFor(attempt, deadline);
    if (outcome != Outcome::kOk) co_return outcome;
  }
  co_return Outcome::kOk;
}

Task<ClientSocket::Outcome> ClientSocket::Read(std::string& buffer, TimePoint deadline) {
  while (true) {
    const Attempt attempt = TryRead(buffer);
    if (attempt == Attempt::kDone) co_return Outcome::kOk;
    const Outcome outcome = co_await WaitFor(attempt, deadline);
    if (outcome != Outcome::kOk) co_return outcome;
  }
}

Task<ClientSocket::Outcome> ClientSocket::Write(std::string_view bytes,
                                                std::chrono::milliseconds stall_timeout) {
  while (!bytes.empty()) {
    size_t size = 0;
    const Attempt attempt = TryWrite(bytes, size);
    bytes.remove_prefix(size);
    if (attempt == Attempt::kDone) continue;
    const Outcome outcome =
        co_await WaitFor(attempt, std::chrono::steady_clock::now() + stall_timeout);
    if (outcome != Outcome::kOk) co_return outcome;
  }
  co_return Outcome::kOk;
}

ClientSocket::Outcome ClientSocket::WriteNow(std::string_view& bytes) {
  Attempt attempt = Attempt::kDone;
  while (!bytes.empty() && attempt == Attempt::kDone) {
    size_t size = 0;
    attempt = TryWrite(bytes, size);
    bytes.remove_prefix(size);
  }
  return attempt == Attempt::kClosed ? Outcome::kClosed : Outcome::kOk;
}

Task<ClientSocket::Outcome> ClientSocket::WaitFor(Attempt what, TimePoint deadline) {
  switch (what) {
    case Attempt::kWantsRead:
      co_return co_await WaitFor(tcp::socket::wait_read, deadline);
    case Attempt::kWantsWrite:
      co_return co_await WaitFor(tcp::socket::wait_write, deadline);
    case Attempt::kDone:
      co_return Outcome::kOk;
    case Attempt::kClosed:
      break;
  }
  co_return Outcome::kClosed;
}

Task<ClientSocket::Outcome> ClientSocket::WaitFor(tcp::socket::wait_type what, TimePoint deadline) {
  // The timer's callback may already be queued when the wait succeeds; `over` tells it so.
  struct Race {
    bool over = false;
    bool timed_out = false;
  };
  auto race = std::make_shared<Race>();
  timer_.expires_at(deadline);
  timer_.async_wait([this, race](error_code error) {
    if (error || race->over) return;
    race->timed_out = true;
    socket_.cancel(error);
  });
  error_code error;
  co_await socket_.async_wait(what, asio::redirect_error(asio::use_awaitable, error));
  race->over = true;
  timer_.cancel();
  if (race->timed_out) co_return Outcome::kTimedOut;
  co_return error ? Outcome::kClosed : Outcome::kOk;
}

void ClientSocket::Watch(std::string& buffer, size_t max_bytes, std::function<void()> on_closed) {
  watcher_ = std::make_shared<Watcher>(Watcher{buffer, max_bytes, std::move(on_closed)});
  WatchAgain(watcher_);
}

void ClientSocket::WatchAgain(std::shared_ptr<Watcher> watcher) {
  if (watcher->buffer.size() >= watcher->max_bytes) return;
  socket_.async_wait(tcp::socket::wait_read, [this, watcher](error_code error) {
    if (!watcher->on_closed) return;  // stopped: `this` may be gone
    // An error that is not ours (Write timed out and cancelled the wait): it will find out itself.
    if (error) return;
    if (TryRead(watcher->buffer) != Attempt::kClosed) return WatchAgain(watcher);
    std::exchange(watcher->on_closed, nullptr)();
  });
}

void ClientSocket::StopWatching() {
  if (!watcher_) return;
  watcher_->on_closed = nullptr;
  watcher_ = nullptr;
  error_code ignored;
  socket_.cancel(ignored);
}

void ClientSocket::ShutdownSend() {
  if (tls_ != nullptr && socket_.is_open()) tls_->ShutdownSend();
  error_code ignored;
  socket_.shutdown(tcp::socket::shutdown_send, ignored);
}

void ClientSocket::Close() {
  if (watcher_) watcher_->on_closed = nullptr;
  error_code ignored;
  timer_.cancel();
  socket_.close(ignored);
}

}  // namespace fathom
