// A gateway in this process, a coordinator of the test's making behind it, clients before it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gateway/gateway.h"
#include "gateway/text/tokenizer.h"
#include "gtest/gtest.h"
#include "tests/gateway/fake_coordinator.h"
#include "tests/gateway/http_client.h"

namespace fathom {

// The model has the tiny tokenizer, 512 tokens of vocabulary and a context of 128 tokens.
class GatewayTest : public ::testing::Test {
 protected:
  GatewayTest();
  ~GatewayTest() override;

  // Called by the first request; options_ may be changed before.
  void Start();
  // What SIGHUP does; returns when it is done.
  void Reload();
  // What SIGTERM does; Join waits for the end.
  void StopOnce();
  void Join();
  uint16_t port();

  // One request on a connection of its own.
  HttpResponse Ask(std::string_view request);
  HttpResponse PostCompletion(std::string_view json);
  HttpResponse PostChat(std::string_view json);

  // The ids of a text, without BOS.
  std::vector<uint32_t> Ids(std::string_view text) const;
  // Makes the coordinator generate that text, token by token, and then the end of sequence.
  void CoordinatorSays(std::string_view text);

  // Waits until the coordinator has no call any more; false after ten seconds.
  bool CoordinatorGetsIdle() const;

  static constexpr uint32_t kEos = 1;
  GatewayOptions options_;
  FakeCoordinator coordinator_;
  std::unique_ptr<Tokenizer> tokenizer_;

 private:
  std::unique_ptr<Gateway> gateway_;
  std::thread thread_;
};

// The body with the time of creation as 0.
std::string Timeless(std::string_view body);

}  // namespace fathom
