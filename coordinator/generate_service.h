// fathom.v1.Generate for clients: requests in, tokens out, and what the server says of itself.
//
// Requests are validated here, whoever sent them, and go to StepLoop's inbox. Each has a stream
// that keeps what its client has not read yet: while a message is on its way, everything newer
// gathers in the next one, so a slow client costs memory in proportion to its own tokens and holds
// up nobody. Cancelling the call cancels the request.
//
// A request without a seed gets one drawn from --seed and the request's number since the start
// (SplitMix64 of both), so the same requests in the same order get the same tokens again.
//
// Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/metrics.h"
#include "coordinator/status_board.h"
#include "coordinator/step_loop.h"
#include "grpcpp/server.h"
#include "proto/endpoint.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {

class GenerateService final : public v1::Generate::CallbackService {
 public:
  // All references outlive this and the server that it is registered with.
  GenerateService(uint64_t seed, StepLoop& step_loop, const StatusBoard& board, Metrics& metrics);

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
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

  absl::StatusOr<std::shared_ptr<const Request>> Admit(const v1::GenerateRequest& request);

  const uint64_t seed_;
  StepLoop& step_loop_;
  const StatusBoard& board_;
  Metrics& metrics_;
  std::atomic<uint64_t> num_requests_ = 0;
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
  ~GenerateServer();  // calls that are still open have a second, then they are cancelled

  // For the health names "" and "fathom.v1.Generate".
  void SetServing(bool serving);

  int port() const { return port_; }  // as bound, of the last address, when that one is TCP

 private:
  GenerateServer() = default;

  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace fathom
