#include "deploy/launcher/health_probe.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

// Size 0 when `host` is not a numeric address.
SocketAddress AddressOf(const std::string& host, int port) {
  SocketAddress address;
  auto* const v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
  auto* const v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
  if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    address.size = sizeof(*v4);
  } else if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    address.size = sizeof(*v6);
  }
  return address;
}

int PortOf(const SocketAddress& address) {
  return ntohs(address.storage.ss_family == AF_INET
                   ? reinterpret_cast<const sockaddr_in&>(address.storage).sin_port
                   : reinterpret_cast<const sockaddr_in6&>(address.storage).sin6_port);
}

}  // namespace

std::string ReachableHost(const std::string& host) {
  if (host == "0.0.0.0") return "127.0.0.1";
  if (host == "::") return "::1";
  return host;
}

HealthProbe::HealthProbe(Scheme scheme, const std::string& host, int port)
    : host_(ReachableHost(host)),
      port_(port),
      tls_context_(scheme == Scheme::kHttps ? SSL_CTX_new(TLS_client_method()) : nullptr,
                   SSL_CTX_free),
      tls_(nullptr, SSL_free) {}

HealthProbe::~HealthProbe() = default;

short HealthProbe::events() const { return wanted_; }  // NOLINT

ssize_t HealthProbe::TlsResult(int returned, size_t size) {
  if (returned == 1) return static_cast<ssize_t>(size);
  const int error = SSL_get_error(tls_.get(), returned);
  if (error == SSL_ERROR_ZERO_RETURN) return 0;
  const bool retries = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
  if (retries) wanted_ = error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT;
  errno = retries ? EAGAIN : EPROTO;
  return -1;
}

ssize_t HealthProbe::Send(const std::string& bytes) {
  wanted_ = POLLOUT;
  if (tls_ == nullptr) return send(fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  ERR_clear_error();
  size_t size = 0;
  const int returned = SSL_write_ex(tls_.get(), bytes.data(), bytes.size(), &size);
  return TlsResult(returned, size);
}

ssize_t HealthProbe::Receive(char* bytes, size_t capacity) {
  wanted_ = POLLIN;
  if (tls_ == nullptr) return recv(fd(), bytes, capacity, 0);
  ERR_clear_error();
  size_t size = 0;
  const int returned = SSL_read_ex(tls_.get(), bytes, capacity, &size);
  return TlsResult(returned, size);
}

void HealthProbe::Begin(Clock::time_point now) {
  deadline_ = now + std::chrono::seconds(1);
  request_is_sent_ = false;
  response_.clear();
  SocketAddress address = AddressOf(host_, port_);
  socket_ =
      UniqueFd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // A refusal shows when the request is written.
  (void)connect(socket_.get(), address.get(), address.size);
  wanted_ = POLLOUT;
  if (tls_context_ == nullptr) return;
  tls_.reset(SSL_new(tls_context_.get()));
  SSL_set_mode(tls_.get(), SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_set_fd(tls_.get(), socket_.get());
  SSL_set_connect_state(tls_.get());
}

std::optional<HealthProbe::Answer> HealthProbe::Continue(Clock::time_point now) {
  if (now >= deadline_) return End(Answer::kUnhealthy);
  if (!request_is_sent_) {
    const std::string request =
        absl::StrCat("GET /health HTTP/1.1\r\nHost: ", host_, "\r\nConnection: close\r\n\r\n");
    const ssize_t count = Send(request);
    if (count < 0 && errno == EAGAIN) return std::nullopt;
    if (count != static_cast<ssize_t>(request.size())) return End(Answer::kUnhealthy);
    request_is_sent_ = true;
  }
  char buffer[512];
  const ssize_t count = Receive(buffer, sizeof(buffer));
  if (count < 0 && errno == EAGAIN) return std::nullopt;
  if (count <= 0) return End(Answer::kUnhealthy);
  response_.append(buffer, count);
  constexpr size_t kStatusEnd = sizeof("HTTP/1.1 200") - 1;
  if (response_.size() < kStatusEnd) return std::nullopt;
  const bool healthy =
      absl::StartsWith(response_, "HTTP/1.") && response_.compare(kStatusEnd - 4, 4, " 200") == 0;
  return End(healthy ? Answer::kHealthy : Answer::kUnhealthy);
}

HealthProbe::Answer HealthProbe::End(Answer answer) {
  tls_.reset();
  socket_.reset();
  return answer;
}

absl::StatusOr<int> FindFreePort(const std::string& host, int port) {
  SocketAddress address = AddressOf(host, port);
  if (address.size == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--host '", host, "' is not a numeric address: expected e.g. 0.0.0.0, 127.0.0.1 or ::"));
  }
  const UniqueFd listener(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  setsockopt(listener.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const auto failed = [&](const char* what_to_do) {
    return absl::StrCat("cannot listen on ", host, " port ", port, ": ", std::strerror(errno),
                        what_to_do);
  };
  if (bind(listener.get(), address.get(), address.size) != 0 || listen(listener.get(), 1) != 0) {
    if (errno == EADDRINUSE) {
      return absl::AlreadyExistsError(failed("; stop the other server or give another --port"));
    }
    return absl::InvalidArgumentError(failed("; see --host and --port"));
  }
  getsockname(listener.get(), address.get(), &address.size);
  return PortOf(address);
}

}  // namespace fathom
