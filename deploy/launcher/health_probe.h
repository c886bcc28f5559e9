// Asks the gateway's GET /health without blocking.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "deploy/launcher/child_process.h"

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

  // `host` is a numeric address; the wildcard addresses are asked at the loopback.
  HealthProbe(const std::string& host, int port);

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

  const std::string host_;
  const int port_;
  UniqueFd socket_;
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
