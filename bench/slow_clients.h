// Clients that send next to nothing and wait ("slowloris"), to see what they cost the others.
//
// Each holds a connection on which it has sent a part of a request's head, sends one byte more
// every second, and opens another when it is hung up on. All of them are one thread, which sleeps
// most of the time: what the others lose, they lose to the server.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string_view>
#include <thread>
#include <vector>

#include "base/check.h"

namespace fathom {

class SlowClients {
 public:
  // Returns when all are connected.
  SlowClients(const sockaddr_in& server, int count) : server_(server), sockets_(count) {
    for (int& socket : sockets_) socket = Connect();
    thread_ = std::thread([this] { Run(); });
  }
  ~SlowClients() {
    is_over_ = true;
    thread_.join();
    for (const int socket : sockets_) close(socket);
  }
  SlowClients(const SlowClients&) = delete;
  SlowClients& operator=(const SlowClients&) = delete;

 private:
  static constexpr std::chrono::milliseconds kTick{10};
  static constexpr size_t kTicksPerByte = 100;

  int Connect() const {
    constexpr std::string_view kBeginning = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ";
    const int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connection >= 0) << "no more sockets: raise ulimit -n";
    const auto* address = reinterpret_cast<const sockaddr*>(&server_);
    if (connect(connection, address, sizeof(server_)) == 0) {  // else it is found out at its turn
      send(connection, kBeginning.data(), kBeginning.size(), MSG_NOSIGNAL);
    }
    return connection;
  }

  // A client's turn comes every kTicksPerByte ticks, those of neighbours one after the other.
  void Run() {
    auto next = std::chrono::steady_clock::now();
    for (size_t tick = 0; !is_over_; ++tick) {
      for (size_t i = tick % kTicksPerByte; i < sockets_.size(); i += kTicksPerByte) Dribble(i);
      std::this_thread::sleep_until(next += kTick);
    }
  }

  void Dribble(size_t index) {
    char response;
    const bool is_refused = recv(sockets_[index], &response, 1, MSG_DONTWAIT) >= 0;
    if (!is_refused && send(sockets_[index], "a", 1, MSG_NOSIGNAL) == 1) return;
    close(sockets_[index]);
    sockets_[index] = Connect();
  }

  const sockaddr_in server_;
  std::vector<int> sockets_;
  std::atomic<bool> is_over_ = false;
  std::thread thread_;
};

}  // namespace fathom
