#include "coordinator/generate_service.h"

#include <chrono>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/unsent_responses.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/server_builder.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr char kHealthName[] = "fathom.v1.Generate";

// For clients that have ended but not read everything yet, when the server stops.
constexpr std::chrono::seconds kLastWords(1);

}  // namespace

// One Generate call. Lives until gRPC is done with it and GroupRouter has let go.
class GenerateService::Stream final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                                      public TokenStream {
 public:
  explicit Stream(Admission& admission) : admission_(admission) {}

  // Keeps `self` until OnDone, and submits.
  void Submit(std::shared_ptr<Stream> self, const v1::GenerateRequest& request) {
    {
      const std::lock_guard lock(mutex_);
      self_ = self;
    }
    const absl::StatusOr<RequestId> id = admission_.Submit(request, self);
    if (!id.ok()) {
      OnEnd(id.status());
      return Flush();
    }
    const std::lock_guard lock(mutex_);
    id_ = *id;
  }

  void OnTokens(v1::GenerateResponse response) override {
    const std::lock_guard lock(mutex_);
    if (end_.has_value()) return;
    unsent_.Add(std::move(response));
  }

  void OnEnd(const absl::Status& status) override {
    const std::lock_guard lock(mutex_);
    if (end_.has_value()) return;
    end_ = ToGrpc(status);
  }

  void Flush() override {
    const std::lock_guard lock(mutex_);
    Pump();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    is_writing_ = false;
    if (!ok) GiveUp();
    Pump();
  }

  void OnCancel() override {
    RequestId id;
    {
      const std::lock_guard lock(mutex_);
      id = id_;
      GiveUp();
      Pump();
    }
    if (id != 0) admission_.Cancel(id);
  }

  void OnDone() override {
    std::shared_ptr<Stream> self;  // released last: it may be the only owner
    const std::lock_guard lock(mutex_);
    self = std::move(self_);
  }

 private:
  // Nobody reads any more. Requires mutex_.
  void GiveUp() {
    unsent_.Clear();
    if (!end_.has_value()) end_ = grpc::Status(grpc::StatusCode::CANCELLED, "cancelled");
  }

  // Starts what can be started. Requires mutex_. gRPC never calls back from within.
  void Pump() {
    if (is_writing_ || is_finished_) return;
    if (!unsent_.empty()) {
      writing_ = unsent_.Take();
      is_writing_ = true;
      StartWrite(&writing_);
    } else if (end_.has_value()) {
      is_finished_ = true;
      Finish(*end_);
    }
  }

  Admission& admission_;
  std::mutex mutex_;
  // Guarded by mutex_.
  std::shared_ptr<Stream> self_;
  RequestId id_ = 0;  // 0: not queued
  v1::GenerateResponse writing_;
  UnsentResponses unsent_;
  std::optional<grpc::Status> end_;
  bool is_writing_ = false;
  bool is_finished_ = false;
};

GenerateService::GenerateService(Admission& admission, const GroupRouter& router,
                                 const Metrics& metrics)
    : admission_(admission), router_(router), metrics_(metrics) {}

grpc::ServerWriteReactor<v1::GenerateResponse>* GenerateService::Generate(
    grpc::CallbackServerContext*, const v1::GenerateRequest* request) {
  auto stream = std::make_shared<Stream>(admission_);
  stream->Submit(stream, *request);
  return stream.get();
}

grpc::ServerBidiReactor<v1::GenerateCommand, v1::GenerateEvents>* GenerateService::GenerateMany(
    grpc::CallbackServerContext*) {
  const std::shared_ptr<GenerateSession> session = GenerateSession::Open(admission_);
  bool is_closed;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(sessions_, [](const auto& other) { return other.expired(); });
    sessions_.push_back(session);
    is_closed = is_closed_;
  }
  if (is_closed) session->Close();
  return session.get();
}

void GenerateService::Close() {
  std::vector<std::weak_ptr<GenerateSession>> sessions;
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    sessions = sessions_;
  }
  for (const auto& weak : sessions) {
    if (const std::shared_ptr<GenerateSession> session = weak.lock()) session->Close();
  }
}

grpc::ServerUnaryReactor* GenerateService::GetModelInfo(grpc::CallbackServerContext* context,
                                                        const v1::GetModelInfoRequest*,
                                                        v1::ModelInfo* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const std::optional<ModelLimits> limits = router_.model_limits();
  if (limits.has_value()) {
    *response = limits->model;
    reactor->Finish(grpc::Status::OK);
  } else {
    reactor->Finish(grpc::Status(
        grpc::StatusCode::UNAVAILABLE,
        absl::StrCat("the model is not known yet: ", router_.server_info().state_detail())));
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerateService::GetServerInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetServerInfoRequest*,
                                                         v1::ServerInfo* response) {
  *response = router_.server_info();
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

  std::unique_ptr<GenerateServer> server(new GenerateServer(service));
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
  if (server_ == nullptr) return;
  service_.Close();
  server_->Shutdown(std::chrono::system_clock::now() + kLastWords);
}

void GenerateServer::SetServing(bool serving) {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(kHealthName, serving);
}

}  // namespace fathom
