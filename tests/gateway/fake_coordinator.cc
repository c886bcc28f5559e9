#include "tests/gateway/fake_coordinator.h"

#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <thread>
#include <utility>

#include "base/check.h"
#include "grpcpp/health_check_service_interface.h"

namespace fathom {

bool FakeStream::SendTokens(const std::vector<uint32_t>& token_ids) {
  v1::GenerateResponse response;
  for (const uint32_t id : token_ids) response.add_token_ids(id);
  return Send(response);
}

bool FakeStream::SendEnd(const std::vector<uint32_t>& last_tokens, v1::FinishReason reason) {
  v1::GenerateResponse response;
  for (const uint32_t id : last_tokens) response.add_token_ids(id);
  response.set_finish_reason(reason);
  return Send(response);
}

bool FakeStream::WaitUntilCancelled() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!context_.IsCancelled()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

FakeCoordinator::FakeCoordinator() {
  std::string folder = "/tmp/fathom-gateway-test-XXXXXX";
  CHECK(mkdtemp(folder.data()) != nullptr);
  folder_ = folder;
  model_info_.set_architecture("DeepseekV3ForCausalLM");
  model_info_.set_vocab_size(512);
  model_info_.set_max_model_len(128);
  model_info_.add_eos_token_ids(1);
  script_ = Saying({100, 101, 102});
  grpc::EnableDefaultHealthCheckService(true);
  Start();
}

FakeCoordinator::~FakeCoordinator() {
  Kill();
  std::filesystem::remove_all(folder_);
}

std::string FakeCoordinator::address() const { return "unix:" + folder_ + "/socket"; }

void FakeCoordinator::Start() {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address(), grpc::InsecureServerCredentials());
  builder.AddListeningPort(tcp_address(), grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  CHECK(server_ != nullptr);
  SetServing(true);
}

void FakeCoordinator::Kill() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_ = nullptr;
}

void FakeCoordinator::SetServing(bool serving) {
  server_->GetHealthCheckService()->SetServingStatus("fathom.v1.Generate", serving);
}

void FakeCoordinator::SetScript(Script script) {
  const std::lock_guard lock(mutex_);
  script_ = std::move(script);
}

std::vector<v1::GenerateRequest> FakeCoordinator::requests() const {
  const std::lock_guard lock(mutex_);
  return requests_;
}

grpc::Status FakeCoordinator::Generate(grpc::ServerContext* context,
                                       const v1::GenerateRequest* request,
                                       grpc::ServerWriter<v1::GenerateResponse>* writer) {
  Script script;
  {
    const std::lock_guard lock(mutex_);
    requests_.push_back(*request);
    script = script_;
  }
  ++num_running_;
  FakeStream stream(*context, *writer);
  const grpc::Status status = script(*request, stream);
  if (context->IsCancelled()) ++num_cancelled_;
  --num_running_;
  return status;
}

grpc::Status FakeCoordinator::GetModelInfo(grpc::ServerContext*, const v1::GetModelInfoRequest*,
                                           v1::ModelInfo* info) {
  *info = model_info_;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetMetrics(grpc::ServerContext*, const v1::GetMetricsRequest*,
                                         v1::MetricsText* text) {
  text->set_text("vllm:num_requests_running{model_name=\"tiny\"} 3\n");
  return grpc::Status::OK;
}

FakeCoordinator::Script Saying(std::vector<uint32_t> token_ids, v1::FinishReason reason) {
  return [token_ids = std::move(token_ids), reason](const v1::GenerateRequest& request,
                                                    FakeStream& stream) {
    size_t count = token_ids.size();
    v1::FinishReason end = reason;
    if (request.has_max_tokens() && request.max_tokens() < count) {
      count = request.max_tokens();
      end = v1::FINISH_REASON_LENGTH;
    }
    const uint32_t num_top = request.sampling().num_logprobs();
    for (int i = 1; i < request.prompt_token_ids_size(); ++i) {
      if (!request.sampling().has_num_prompt_logprobs()) break;
      v1::GenerateResponse response;
      v1::TokenLogprobs& logprobs = *response.add_prompt_logprobs();
      logprobs.set_token_id(request.prompt_token_ids(i));
      logprobs.set_logprob(-0.25f * static_cast<float>(i));
      logprobs.set_rank(1);
      stream.Send(response);
    }
    if (count == 0) stream.SendEnd({}, v1::FINISH_REASON_LENGTH);
    for (size_t i = 0; i < count; ++i) {
      v1::GenerateResponse response;
      response.add_token_ids(token_ids[i]);
      if (request.sampling().has_num_logprobs()) {
        v1::TokenLogprobs& logprobs = *response.add_logprobs();
        logprobs.set_token_id(token_ids[i]);
        logprobs.set_logprob(-0.5f);
        logprobs.set_rank(1);
        for (uint32_t top = 0; top < num_top; ++top) {
          logprobs.add_top_token_ids(token_ids[i] + top);
          logprobs.add_top_logprobs(-0.5f - static_cast<float>(top));
        }
      }
      if (i + 1 == count) response.set_finish_reason(end);
      if (!stream.Send(response)) break;
    }
    return grpc::Status::OK;
  };
}

}  // namespace fathom
