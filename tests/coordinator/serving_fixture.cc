#include "tests/coordinator/serving_fixture.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <future>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "proto/endpoint.h"
#include "spdlog/spdlog.h"

namespace fathom {

ServingTest::ServingTest() {
  spdlog::set_default_logger(std::make_shared<spdlog::logger>("test", log_));
  std::string pattern = "/tmp/fathom-serving-XXXXXX";  // short: socket paths are limited
  folder_ = mkdtemp(pattern.data());
  AddGroup();
  options_.group.version = "test";
  options_.group.block_size = 4;
  options_.group.max_tokens_per_step = 64;
  options_.group.max_sequences = 16;
  options_.group.max_logit_rows = 16 + 20;
  options_.engine.max_prompt_logprob_rows_per_step = 20;
  options_.engine.min_backoff = absl::Milliseconds(10);
}

void ServingTest::AddGroup() {
  for (int rank = 0; rank < kNumWorkers; ++rank) {
    workers_.push_back(
        std::make_unique<FakeWorker>(absl::StrCat("unix:", folder_, "/worker-", workers_.size())));
  }
}

ServingTest::~ServingTest() {
  StopServer();
  workers_.clear();
  std::filesystem::remove_all(folder_);
}

void ServingTest::StopServer() {
  if (router_ != nullptr) {
    router_->Stop();
    router_->Join();
  }
  server_.reset();
  service_.reset();
  admission_.reset();
  router_.reset();
}

void ServingTest::Start() {
  GroupRouter::Options router_options{
      .version = "test", .groups = {}, .recovery_timeout = recovery_timeout_};
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (i % kNumWorkers == 0) router_options.groups.push_back(options_);
    router_options.groups.back().group.addresses.push_back(workers_[i]->address());
  }
  metrics_ = std::make_unique<Metrics>("a-model");
  router_ = std::make_unique<GroupRouter>(router_options, *metrics_,
                                          [this](bool serving) { server_->SetServing(serving); });
  admission_ = std::make_unique<Admission>(seed_, *router_, *metrics_);
  service_ = std::make_unique<GenerateService>(*admission_, *router_, *metrics_);
  GenerateServer::Options server_options;
  server_options.addresses = {absl::StrCat("unix:", folder_, "/coordinator")};
  auto server = GenerateServer::Start(server_options, *service_);
  CHECK(server.ok()) << server.status();
  server_ = *std::move(server);
  stub_ = NewStub();
  router_->Start();
}

std::unique_ptr<v1::Generate::Stub> ServingTest::NewStub() const {
  return v1::Generate::NewStub(*ConnectTo(absl::StrCat("unix:", folder_, "/coordinator"), {}));
}

void ServingTest::StartAndWait() {
  Start();
  WaitUntilServing();
}

void ServingTest::WaitUntilServing() {
  WaitUntil("the server is serving",
            [this] { return ServerInfo().state() == v1::ServerInfo::STATE_SERVING; });
}

void ServingTest::WaitUntilAllIsFree() {
  WaitUntil("all KV blocks are free", [this] {
    const v1::ServerInfo info = ServerInfo();
    return info.num_running() == 0 && info.num_waiting() == 0 && info.num_kv_blocks() > 0 &&
           info.num_free_kv_blocks() == info.num_kv_blocks();
  });
}

void ServingTest::WaitUntil(const std::string& what, const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline)
        << "waited in vain until " << what << "; state: " << ServerInfo().ShortDebugString();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

v1::GenerateRequest ServingTest::Asking(int num_prompt_tokens, int max_tokens, uint64_t seed) {
  v1::GenerateRequest request;
  for (int i = 0; i < num_prompt_tokens; ++i) {
    request.add_prompt_token_ids(
        static_cast<uint32_t>((seed * 31 + i * 17) % 600 + 8));  // neither end nor poison
  }
  request.set_max_tokens(max_tokens);
  request.mutable_sampling()->set_seed(seed);
  return request;
}

std::vector<uint32_t> ServingTest::ExpectedTokens(const v1::GenerateRequest& request) {
  v1::SamplingParams sampling = request.sampling();
  if (!request.ignore_eos()) sampling.add_stop_token_ids(FakeWorker::kEosTokenId);
  const auto& stops = sampling.stop_token_ids();
  std::vector<uint32_t> prefix(request.prompt_token_ids().begin(),
                               request.prompt_token_ids().end());
  const int num_prompt_tokens = static_cast<int>(prefix.size());
  std::vector<uint32_t> tokens;
  while (tokens.size() < request.max_tokens()) {
    tokens.push_back(TokenAfter(prefix, num_prompt_tokens, sampling, FakeWorker::kVocabSize));
    prefix.push_back(tokens.back());
    const bool may_stop = tokens.size() >= sampling.min_tokens();
    if (may_stop && std::find(stops.begin(), stops.end(), tokens.back()) != stops.end()) break;
  }
  return tokens;
}

Answer ServingTest::Generate(const v1::GenerateRequest& request,
                             const std::function<bool(const v1::GenerateResponse&)>& on_message) {
  Answer answer;
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    ++answer.num_messages;
    if (message.prompt_logprobs_size() > 0 && !answer.token_ids.empty()) {
      answer.prompt_logprobs_came_first = false;
    }
    answer.token_ids.insert(answer.token_ids.end(), message.token_ids().begin(),
                            message.token_ids().end());
    answer.logprobs.insert(answer.logprobs.end(), message.logprobs().begin(),
                           message.logprobs().end());
    answer.prompt_logprobs.insert(answer.prompt_logprobs.end(), message.prompt_logprobs().begin(),
                                  message.prompt_logprobs().end());
    answer.last = message;
    if (on_message != nullptr && !on_message(message)) context.TryCancel();
  }
  answer.status = reader->Finish();
  return answer;
}

void ServingTest::ExpectServed(const v1::GenerateRequest& request) {
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  const std::vector<uint32_t> expected = ExpectedTokens(request);
  EXPECT_EQ(answer.token_ids, expected);
  EXPECT_EQ(static_cast<int>(answer.last.usage().prompt_tokens()), request.prompt_token_ids_size());
  EXPECT_EQ(answer.last.usage().completion_tokens(), expected.size());
  const bool is_length = expected.size() == request.max_tokens();
  if (!is_length) {
    EXPECT_EQ(answer.last.finish_reason(), v1::FINISH_REASON_STOP);
  }
  const size_t num_logprobs = request.sampling().has_num_logprobs() ? expected.size() : 0;
  ASSERT_EQ(answer.logprobs.size(), num_logprobs);
  for (size_t i = 0; i < num_logprobs; ++i) {
    EXPECT_EQ(answer.logprobs[i].token_id(), expected[i]);
    EXPECT_EQ(answer.logprobs[i].top_token_ids_size(),
              static_cast<int>(request.sampling().num_logprobs()));
  }
  const size_t num_prompt_logprobs =
      request.sampling().has_num_prompt_logprobs() ? request.prompt_token_ids_size() - 1 : 0;
  ASSERT_EQ(answer.prompt_logprobs.size(), num_prompt_logprobs);
  for (size_t i = 0; i < num_prompt_logprobs; ++i) {
    EXPECT_EQ(answer.prompt_logprobs[i].token_id(),
              request.prompt_token_ids(static_cast<int>(i) + 1));
  }
  EXPECT_TRUE(answer.prompt_logprobs_came_first);
}

v1::ServerInfo ServingTest::ServerInfo() {
  grpc::ClientContext context;
  v1::ServerInfo info;
  const grpc::Status status = stub_->GetServerInfo(&context, {}, &info);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return info;
}

std::string ServingTest::Log() const { return absl::StrJoin(log_->last_formatted(), ""); }

std::string ServingTest::Health(const std::string& service_name) {
  // grpc.health.v1 by hand: HealthCheckRequest {string service = 1;},
  // HealthCheckResponse {enum status = 1;} with SERVING = 1 and NOT_SERVING = 2.
  std::string bytes;
  if (!service_name.empty()) {
    bytes =
        absl::StrCat("\x0a", std::string(1, static_cast<char>(service_name.size())), service_name);
  }
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::ClientContext context;
  std::promise<grpc::Status> done;
  grpc::GenericStub stub(*ConnectTo(absl::StrCat("unix:", folder_, "/coordinator"), {}));
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request, &response,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  const grpc::Status status = done.get_future().get();
  if (!status.ok()) return status.error_message();
  grpc::Slice answer;
  CHECK(response.DumpToSingleSlice(&answer).ok());
  CHECK_EQ(answer.size(), 2u);
  return answer.begin()[1] == 1 ? "SERVING" : "NOT_SERVING";
}

void ServingTest::ExpectNoViolations() const {
  for (const auto& worker : workers_) {
    EXPECT_THAT(worker->violations(), ::testing::IsEmpty());
  }
}

}  // namespace fathom
