// fathom.v1.Generate for clients: requests in, tokens out, and what the server says of itself.
//
// A Generate call is one request; while a message of it is on its way, everything newer gathers in
// the next one. Cancelling the call cancels the request. GenerateMany is in generate_session.
//
// Thread-safe.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/admission.h"
#include "coordinator/generate_session.h"
#include "coordinator/group_router.h"
#include "coordinator/metrics.h"
#include "grpcpp/server.h"
#include "proto/endpoint.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {

class GenerateService final : public v1::Generate::CallbackService {
 public:
  // All references outlive this and the server that it is registered with.
  GenerateService(Admission& admission, const GroupRouter& router, const Metrics& metrics);

  // Ends GenerateMany calls as soon as none of their requests runs, and refuses new ones.
  void Close();

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerBidiReactor<v1::GenerateCommand, v1::GenerateEvents>* GenerateMany(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest* request,
                                         v1::ModelInfo* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::ServerInfo* response) override;
  grpc::ServerUnaryReactor* GetMetrics(grpc::CallbackServerContext* context,
                                       const v1::GetMetricsRequest* request,
                                       v1::MetricsText* response) override;

 private:
  class Stream;

  Admission& admission_;
  const GroupRouter& router_;
  const Metrics& metrics_;

  std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<std::weak_ptr<GenerateSession>> sessions_;  // some may have ended
  bool is_closed_ = false;
};

// The gRPC server around it, with the standard health service.
class GenerateServer {
 public:
  struct Options {
    std::vector<std::string> addresses;  // at least one: all serve the same
    TlsOptions tls;
    bool enable_reflection = false;
  };

  // InvalidArgument or NotFound for a bad address or missing TLS files, AlreadyExists when someone
  // else listens there. `service` outlives this. Health starts as NOT_SERVING.
  static absl::StatusOr<std::unique_ptr<GenerateServer>> Start(const Options& options,
                                                               GenerateService& service);
  // Closes the service; calls that are still open have a second, then they are cancelled.
  ~GenerateServer();

  // For the health names "" and "fathom.v1.Generate".
  void SetServing(bool serving);

  int port() const { return port_; }  // as bound, of the last address, when that one is TCP

 private:
  explicit GenerateServer(GenerateService& service) : service_(service) {}

  GenerateService& service_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace fathom
