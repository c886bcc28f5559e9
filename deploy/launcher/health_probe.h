// Asks the gateway's GET /health without blocking, over HTTP or HTTPS. Its certificate is not
// checked: it is our own child.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "deploy/launcher/child_process.h"

struct ssl_ctx_st;
struct ssl_st;

namespace fathom {

// One question at a time. Not thread-safe.
//
//   probe.Begin(now);
//   poll(probe.fd(), probe.events(), at the latest until probe.deadline());
//   if (auto answer = probe.Continue(now)) ...
class HealthProbe {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Answer { kHealthy, kUnhealthy };
  enum class Scheme { kHttp, kHttps };

  // `host` is a numeric address; the wildcard addresses are asked at the loopback.
  HealthProbe(Scheme scheme, const std::string& host, int port);
  ~HealthProbe();

  void Begin(Clock::time_point now);
  bool is_running() const { return socket_.get() >= 0; }
  int fd() const { return socket_.get(); }
  short events() const;  // NOLINT: poll's type
  Clock::time_point deadline() const { return deadline_; }

  // The answer, once there is one: unhealthy when it cannot be reached, is not a 200, or is not
  // there by the deadline. Ends the question.
  std::optional<Answer> Continue(Clock::time_point now);

 private:
  Answer End(Answer answer);
  // As send and recv; with EAGAIN, wanted_ says what for.
  ssize_t Send(const std::string& bytes);
  ssize_t Receive(char* bytes, size_t capacity);
  ssize_t TlsResult(int returned, size_t size);

  const std::string host_;
  const int port_;
  UniqueFd socket_;
  std::unique_ptr<ssl_ctx_st, void (*)(ssl_ctx_st*)> tls_context_;  // null: HTTP
  std::unique_ptr<ssl_st, void (*)(ssl_st*)> tls_;
  short wanted_ = 0;  // NOLINT: poll's type
  bool request_is_sent_ = false;
  std::string response_;
  Clock::time_point deadline_;
};

// The address at which a server listening on `host` is reached from here: 127.0.0.1 for 0.0.0.0.
std::string ReachableHost(const std::string& host);

// Opens and closes a listening socket: says before anything starts whether the port is free.
// Returns the port, chosen by the system when `port` is 0. InvalidArgument when `host` is not a
// numeric address or not of this host, AlreadyExists when the port is in use.
absl::StatusOr<int> FindFreePort(const std::string& host, int port);

}  // namespace fathom
