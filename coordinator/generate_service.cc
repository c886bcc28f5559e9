#include "coordinator/generate_service.h"

#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/request_validation.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/server_builder.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr char kHealthName[] = "fathom.v1.Generate";

// A message this full is sent before more is added: clients commonly refuse more than 4 MB.
constexpr int kMaxEntriesPerMessage = 32768;

// For clients that have ended but not read everything yet, when the server stops.
constexpr std::chrono::seconds kLastWords(1);

// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
uint64_t SplitMix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Numbers in a message, about.
int CountEntries(const v1::GenerateResponse& response) {
  int count = response.token_ids_size();
  for (const auto* list : {&response.logprobs(), &response.prompt_logprobs()}) {
    for (const v1::TokenLogprobs& logprobs : *list) count += 3 + 2 * logprobs.top_token_ids_size();
  }
  return count;
}

}  // namespace

// One Generate call. Lives until gRPC is done with it and StepLoop has let go.
class GenerateService::Stream final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                                      public TokenStream {
 public:
  explicit Stream(StepLoop& step_loop) : step_loop_(step_loop) {}

  // Keeps `self` until OnDone, and submits.
  absl::Status Submit(std::shared_ptr<Stream> self, std::shared_ptr<const Request> request) {
    KeepAlive(self);
    absl::StatusOr<SequenceId> id = step_loop_.Submit(std::move(request), self);
    RETURN_IF_ERROR(id.status());
    const std::lock_guard lock(mutex_);
    id_ = *id;
    return absl::OkStatus();
  }
  void KeepAlive(std::shared_ptr<Stream> self) {
    const std::lock_guard lock(mutex_);
    self_ = std::move(self);
  }

  void OnTokens(v1::GenerateResponse response) override {
    const std::lock_guard lock(mutex_);
    if (end_.has_value()) return;
    const int num_entries = CountEntries(response);
    if (unsent_.empty() || entries_of_last_ + num_entries > kMaxEntriesPerMessage) {
      unsent_.push_back(std::move(response));
      entries_of_last_ = num_entries;
    } else {
      unsent_.back().MergeFrom(response);
      entries_of_last_ += num_entries;
    }
    Pump();
  }

  void OnEnd(const absl::Status& status) override {
    const std::lock_guard lock(mutex_);
    if (end_.has_value()) return;
    end_ = ToGrpc(status);
    Pump();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    is_writing_ = false;
    if (!ok) GiveUp();
    Pump();
  }

  void OnCancel() override {
    SequenceId id;
    {
      const std::lock_guard lock(mutex_);
      id = id_;
      GiveUp();
      Pump();
    }
    if (id != 0) step_loop_.Cancel(id);
  }

  void OnDone() override {
    std::shared_ptr<Stream> self;  // released last: it may be the only owner
    const std::lock_guard lock(mutex_);
    self = std::move(self_);
  }

 private:
  // Nobody reads any more. Requires mutex_.
  void GiveUp() {
    unsent_.clear();
    if (!end_.has_value()) end_ = grpc::Status(grpc::StatusCode::CANCELLED, "cancelled");
  }

  // Starts what can be started. Requires mutex_. gRPC never calls back from within.
  void Pump() {
    if (is_writing_ || is_finished_) return;
    if (!unsent_.empty()) {
      writing_ = std::move(unsent_.front());
      unsent_.pop_front();
      is_writing_ = true;
      StartWrite(&writing_);
    } else if (end_.has_value()) {
      is_finished_ = true;
      Finish(*end_);
    }
  }

  StepLoop& step_loop_;
  std::mutex mutex_;
  // Guarded by mutex_.
  std::shared_ptr<Stream> self_;
  SequenceId id_ = 0;  // 0: not queued
  v1::GenerateResponse writing_;
  std::deque<v1::GenerateResponse> unsent_;
  int entries_of_last_ = 0;  // of unsent_.back()
  std::optional<grpc::Status> end_;
  bool is_writing_ = false;
  bool is_finished_ = false;
};

GenerateService::GenerateService(uint64_t seed, StepLoop& step_loop, const StatusBoard& board,
                                 Metrics& metrics)
    : seed_(seed), step_loop_(step_loop), board_(board), metrics_(metrics) {}

absl::StatusOr<std::shared_ptr<const Request>> GenerateService::Admit(
    const v1::GenerateRequest& request) {
  const std::optional<ModelLimits> limits = board_.model_limits();
  if (!limits.has_value()) {
    return absl::UnavailableError(
        absl::StrCat("the server is starting: ", board_.server_info().state_detail()));
  }
  return ValidateRequest(request, *limits, SplitMix64(SplitMix64(seed_) + ++num_requests_));
}

grpc::ServerWriteReactor<v1::GenerateResponse>* GenerateService::Generate(
    grpc::CallbackServerContext*, const v1::GenerateRequest* request) {
  auto stream = std::make_shared<Stream>(step_loop_);
  absl::StatusOr<std::shared_ptr<const Request>> validated = Admit(*request);
  absl::Status status = validated.status();
  if (status.ok()) {
    status = stream->Submit(stream, *std::move(validated));
  } else {
    stream->KeepAlive(stream);
  }
  if (!status.ok()) {
    metrics_.CountRefusedRequest(absl::IsUnavailable(status) ? Metrics::Refusal::kUnavailable
                                 : absl::IsResourceExhausted(status) ? Metrics::Refusal::kQueueFull
                                                                     : Metrics::Refusal::kInvalid);
    stream->OnEnd(status);
  }
  return stream.get();
}

grpc::ServerUnaryReactor* GenerateService::GetModelInfo(grpc::CallbackServerContext* context,
                                                        const v1::GetModelInfoRequest*,
                                                        v1::ModelInfo* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const std::optional<ModelLimits> limits = board_.model_limits();
  if (limits.has_value()) {
    *response = limits->model;
    reactor->Finish(grpc::Status::OK);
  } else {
    reactor->Finish(grpc::Status(
        grpc::StatusCode::UNAVAILABLE,
        absl::StrCat("the model is not known yet: ", board_.server_info().state_detail())));
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerateService::GetServerInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetServerInfoRequest*,
                                                         v1::ServerInfo* response) {
  *response = board_.server_info();
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* GenerateService::GetMetrics(grpc::CallbackServerContext* context,
                                                      const v1::GetMetricsRequest*,
                                                      v1::MetricsText* response) {
  response->set_text(metrics_.Text());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

absl::StatusOr<std::unique_ptr<GenerateServer>> GenerateServer::Start(const Options& options,
                                                                      GenerateService& service) {
  CHECK(!options.addresses.empty());
  grpc::EnableDefaultHealthCheckService(true);
  if (options.enable_reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  std::unique_ptr<GenerateServer> server(new GenerateServer());
  grpc::ServerBuilder builder;
  for (const std::string& address : options.addresses) {
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::ServerCredentials> credentials,
                     ServerCredentialsFor(address, options.tls));
    RETURN_IF_ERROR(PrepareToListen(address));
    builder.AddListeningPort(address, credentials, &server->port_);
  }
  ConfigureServer(builder);
  builder.RegisterService(&service);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr) {
    return absl::AlreadyExistsError(
        absl::StrCat("cannot listen on '", absl::StrJoin(options.addresses, "', '"),
                     "': the port is in use, the address is not of this host, or ",
                     "--tls-… name no valid PEM files"));
  }
  server->SetServing(false);
  return server;
}

GenerateServer::~GenerateServer() {
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now() + kLastWords);
}

void GenerateServer::SetServing(bool serving) {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(kHealthName, serving);
}

}  // namespace fathom
