// A coordinator with fake workers, all in this process, as the tests of serving see it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/generate_service.h"
#include "coordinator/group_router.h"
#include "coordinator/metrics.h"
#include "coordinator/step_loop.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "proto/generate.grpc.pb.h"
#include "spdlog/sinks/ringbuffer_sink.h"
#include "tests/coordinator/fake_worker.h"

namespace fathom {

// What a client got.
struct Answer {
  grpc::Status status;
  bool is_of_grammar = false;  // the failure, as GenerateMany tells it
  std::vector<uint32_t> token_ids;
  std::vector<v1::TokenLogprobs> logprobs;
  std::vector<v1::TokenLogprobs> prompt_logprobs;
  v1::GenerateResponse last;
  int num_messages = 0;
  bool prompt_logprobs_came_first = true;
};

class ServingTest : public ::testing::Test {
 protected:
  static constexpr int kNumWorkers = 3;

  ServingTest();
  ~ServingTest() override;

  // Adds workers for a further group, numbered after those that are there.
  void AddGroup();

  // `options_` and the workers may be changed before. Returns at once; see WaitUntilServing.
  void Start();
  void StartAndWait();
  void WaitUntilServing();
  // Until the condition holds; fails the test after 30 seconds.
  void WaitUntil(const std::string& what, const std::function<bool()>& condition);
  void WaitUntilAllIsFree();
  void StopServer();

  static v1::GenerateRequest Asking(int num_prompt_tokens, int max_tokens, uint64_t seed = 1);
  // The tokens that the request must get, and why it ends.
  static std::vector<uint32_t> ExpectedTokens(const v1::GenerateRequest& request);

  // `on_message` may look at each message; when it returns false the call is cancelled.
  Answer Generate(const v1::GenerateRequest& request,
                  const std::function<bool(const v1::GenerateResponse&)>& on_message = nullptr);
  // Generates and checks everything that can be known of the answer.
  void ExpectServed(const v1::GenerateRequest& request);
  v1::ServerInfo ServerInfo();
  // What the standard health service says: SERVING, NOT_SERVING, or an error.
  std::string Health(const std::string& service_name);
  // What the operator can read of this test.
  std::string Log() const;
  std::unique_ptr<v1::Generate::Stub> NewStub() const;
  void ExpectNoViolations() const;

  std::shared_ptr<spdlog::sinks::ringbuffer_sink_mt> log_ =
      std::make_shared<spdlog::sinks::ringbuffer_sink_mt>(1000);
  std::string folder_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
  StepLoop::Options options_;  // of every group, but for the addresses
  absl::Duration recovery_timeout_ = absl::Seconds(30);
  uint64_t seed_ = 0;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<GroupRouter> router_;
  std::unique_ptr<Admission> admission_;
  std::unique_ptr<GenerateService> service_;
  std::unique_ptr<GenerateServer> server_;
  std::unique_ptr<v1::Generate::Stub> stub_;
};

}  // namespace fathom
