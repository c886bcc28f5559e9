#include "tests/gateway/gateway_fixture.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.h"
#include "spdlog/spdlog.h"

namespace fathom {

constexpr char kTinyTokenizer[] = "tests/golden/tokenizer_tiny";

GatewayTest::GatewayTest() {
  spdlog::set_level(spdlog::level::warn);
  options_.model_dir = kTinyTokenizer;
  options_.coordinator.address = coordinator_.address();
  options_.model.names = {"tiny"};
  options_.model.root = "/models/tiny";
  options_.server.host = "127.0.0.1";
  options_.server.port = 0;
  options_.version = "1.2.3";
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(kTinyTokenizer);
  CHECK(tokenizer.ok()) << tokenizer.status().ToString();
  tokenizer_ = *std::move(tokenizer);
}

GatewayTest::~GatewayTest() {
  if (gateway_ == nullptr) return;
  StopOnce();
  StopOnce();
  Join();
}

void GatewayTest::Start() {
  if (gateway_ != nullptr) return;
  absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Create(options_);
  CHECK(gateway.ok()) << gateway.status().ToString();
  gateway_ = *std::move(gateway);
  thread_ = std::thread([this] { gateway_->Run(); });
}

void GatewayTest::Reload() {
  gateway_->Reload();
  Ask(Get("/live"));  // whatever was posted before has run
}

void GatewayTest::StopOnce() { gateway_->Stop(); }

void GatewayTest::Join() {
  thread_.join();
  gateway_ = nullptr;
}

uint16_t GatewayTest::port() {
  Start();
  return gateway_->port();
}

HttpResponse GatewayTest::Ask(std::string_view request) {
  HttpClient client(port());
  client.Send(request);
  return client.Read();
}

HttpResponse GatewayTest::PostCompletion(std::string_view json) {
  return Ask(Post("/v1/completions", json));
}

HttpResponse GatewayTest::PostChat(std::string_view json) {
  return Ask(Post("/v1/chat/completions", json));
}

std::vector<uint32_t> GatewayTest::Ids(std::string_view text) const {
  return tokenizer_->Encode(text, BosPolicy::kNone);
}

void GatewayTest::CoordinatorSays(std::string_view text) {
  std::vector<uint32_t> ids = Ids(text);
  ids.push_back(kEos);
  coordinator_.SetScript(Saying(std::move(ids)));
}

bool GatewayTest::CoordinatorGetsIdle() const {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (coordinator_.num_running() > 0) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::string Timeless(std::string_view body) {
  constexpr std::string_view kCreated = "\"created\":";
  std::string timeless;
  size_t begin;
  while ((begin = body.find(kCreated)) != std::string_view::npos) {
    timeless += body.substr(0, begin + kCreated.size());
    timeless += '0';
    body.remove_prefix(begin + kCreated.size());
    body.remove_prefix(std::min(body.find_first_not_of("0123456789"), body.size()));
  }
  return timeless.append(body);
}

}  // namespace fathom
