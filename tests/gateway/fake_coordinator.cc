#include "tests/gateway/fake_coordinator.h"

#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <thread>
#include <utility>

#include "base/check.h"
#include "grpcpp/health_check_service_interface.h"

namespace fathom {

bool FakeStream::Send(const v1::GenerateResponse& response) {
  if (is_cancelled_) return false;
  v1::StreamEvent event;
  event.set_stream(number_);
  *event.mutable_response() = response;
  has_ended_ = has_ended_ || response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  return send_(event);
}

void FakeStream::Fail(const grpc::Status& status) {
  v1::StreamEvent event;
  event.set_stream(number_);
  event.mutable_failure()->set_code(status.error_code());
  event.mutable_failure()->set_message(status.error_message());
  event.mutable_failure()->set_retry_after_seconds(atoi(status.error_details().c_str()));
  send_(event);
}

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

bool FakeStream::RefuseGrammar(const std::string& message) {
  v1::StreamEvent event;
  event.set_stream(number_);
  event.mutable_failure()->set_code(grpc::StatusCode::INVALID_ARGUMENT);
  event.mutable_failure()->set_message(message);
  event.mutable_failure()->set_is_of_grammar(true);
  has_ended_ = true;
  return send_(event);
}

bool FakeStream::WaitUntilCancelled() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!is_cancelled_) {
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

grpc::Status FakeCoordinator::GenerateMany(grpc::ServerContext*, Wire* wire) {
  std::mutex mutex;  // one write at a time
  const auto send = [&](const v1::StreamEvent& event) {
    v1::GenerateEvents events;
    *events.add_others() = event;
    const std::lock_guard lock(mutex);
    return wire->Write(events);
  };
  std::map<uint64_t, std::unique_ptr<FakeStream>> streams;
  std::vector<std::thread> scripts;
  v1::GenerateCommand command;
  while (wire->Read(&command)) {
    if (command.has_start()) {
      auto& stream = streams[command.stream()];
      CHECK(stream == nullptr) << "stream " << command.stream() << " was started twice";
      stream = std::make_unique<FakeStream>(command.stream(), send);
      scripts.emplace_back(
          [this, request = command.start(), &stream = *stream] { Run(request, stream); });
    } else {
      streams.at(command.stream())->Cancel();
    }
  }
  for (const auto& [number, stream] : streams) stream->Cancel();
  for (std::thread& script : scripts) script.join();
  return grpc::Status::OK;
}

void FakeCoordinator::Run(const v1::GenerateRequest& request, FakeStream& stream) {
  ++num_running_;
  Script script;
  {
    const std::lock_guard lock(mutex_);
    requests_.push_back(request);
    script = script_;
  }
  const grpc::Status status = script(request, stream);
  if (stream.cancelled()) {
    ++num_cancelled_;
  } else if (!stream.has_ended()) {
    stream.Fail(status);
  }
  --num_running_;
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
