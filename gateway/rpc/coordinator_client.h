// The gateway's only neighbour: the coordinator, over gRPC.
//
// gRPC's own threads read and write the wire; results come back to the I/O thread, where every
// function here is called. Nothing waits for a coordinator that is not there: a call that finds
// none ends with Unavailable within the connect timeout.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gateway/http/io_thread.h"
#include "gateway/http/task.h"
#include "proto/endpoint.h"
#include "proto/generate.pb.h"

namespace fathom {

class GenerateLink;

struct CoordinatorClientOptions {
  std::string address;  // unix:/path or host:port
  TlsOptions tls;
  std::chrono::milliseconds connect_timeout{3'000};
  std::chrono::milliseconds call_timeout{5'000};    // of everything that does not generate
  std::chrono::milliseconds health_timeout{1'000};  // /health must answer while the probe waits
};

class CoordinatorClient {
 public:
  // Does not connect yet; `io_thread` must outlive this. Errors: those of the address and the TLS
  // files (proto/endpoint.h).
  static absl::StatusOr<std::unique_ptr<CoordinatorClient>> Create(CoordinatorClientOptions options,
                                                                   IoThread& io_thread);

  // Waits until gRPC has let go of every call: those with a deadline, and the one that generates.
  ~CoordinatorClient();
  CoordinatorClient(const CoordinatorClient&) = delete;
  CoordinatorClient& operator=(const CoordinatorClient&) = delete;

  // Ok when there is a connection, or one can be made in time.
  Task<absl::Status> Connect();

  // Ok when the coordinator can make steps (grpc.health.v1, service fathom.v1.Generate).
  Task<absl::Status> CheckHealth();

  Task<absl::StatusOr<v1::ModelInfo>> GetModelInfo();

  Task<absl::StatusOr<v1::ServerInfo>> GetServerInfo();

  // The coordinator's metrics, in the Prometheus text format.
  Task<absl::StatusOr<std::string>> GetMetrics();

  // For Generation.
  GenerateLink& link() { return *link_; }
  IoThread& io_thread() { return io_thread_; }

 private:
  struct Stubs;

  CoordinatorClient(CoordinatorClientOptions options, IoThread& io_thread,
                    std::unique_ptr<Stubs> stubs);

  const CoordinatorClientOptions options_;
  IoThread& io_thread_;
  const std::unique_ptr<Stubs> stubs_;
  std::unique_ptr<GenerateLink> link_;
};

}  // namespace fathom
