// The gateway's only neighbour: the coordinator, over gRPC.
//
// gRPC's own threads read and write the wire; results come back to the I/O thread, where every
// function here is called. Nothing waits for a coordinator that is not there: a call that finds
// none ends with Unavailable within the connect timeout.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gateway/http/io_thread.h"
#include "gateway/http/task.h"
#include "proto/endpoint.h"
#include "proto/generate.pb.h"

namespace fathom {

struct CoordinatorClientOptions {
  std::string address;  // unix:/path or host:port
  TlsOptions tls;
  std::chrono::milliseconds connect_timeout{3'000};
  std::chrono::milliseconds call_timeout{5'000};    // of everything but Generate
  std::chrono::milliseconds health_timeout{1'000};  // /health must answer while the probe waits
};

class CoordinatorClient {
 public:
  // Does not connect yet; `io_thread` must outlive this. Errors: those of the address and the TLS
  // files (proto/endpoint.h).
  static absl::StatusOr<std::unique_ptr<CoordinatorClient>> Create(CoordinatorClientOptions options,
                                                                   IoThread& io_thread);

  // Waits until gRPC has let go of every call: those with a deadline, and those that a Generation
  // left to end.
  ~CoordinatorClient();
  CoordinatorClient(const CoordinatorClient&) = delete;
  CoordinatorClient& operator=(const CoordinatorClient&) = delete;

  // Ok when there is a connection, or one can be made in time.
  Task<absl::Status> Connect();

  // Ok when the coordinator can make steps (grpc.health.v1, service fathom.v1.Generate).
  Task<absl::Status> CheckHealth();

  Task<absl::StatusOr<v1::ModelInfo>> GetModelInfo();

  // The coordinator's metrics, in the Prometheus text format.
  Task<absl::StatusOr<std::string>> GetMetrics();

 private:
  friend class Generation;
  struct Stubs;

  CoordinatorClient(CoordinatorClientOptions options, IoThread& io_thread,
                    std::unique_ptr<Stubs> stubs);

  const CoordinatorClientOptions options_;
  IoThread& io_thread_;
  const std::unique_ptr<Stubs> stubs_;
};

// The Generate calls of one client request, as one stream of events. A call that the reader does
// not keep up with is read no further until it does: memory stays bounded.
class Generation {
 public:
  struct Event {
    size_t call = 0;  // index of the request it belongs to
    // Absent: the call has ended with `status`, and this is its last event.
    std::optional<v1::GenerateResponse> response;
    absl::Status status;
  };

  // Starts one call for each request. `client` must outlive this.
  Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests);

  // Cancels the calls that still run.
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // The next event of any call; nullopt when all have ended, or after CancelAll.
  Task<std::optional<Event>> Next();

  // The coordinator stops working on that request; its events end without a last one.
  void Cancel(size_t call);
  // The call is left to end by itself; no more of its events are wanted.
  void Release(size_t call);
  void CancelAll();

 private:
  class Call;
  struct Inbox;

  // Takes the call out of calls_; null when it is not there.
  std::shared_ptr<Call> TakeOut(size_t call);

  const std::shared_ptr<Inbox> inbox_;
  std::vector<std::shared_ptr<Call>> calls_;  // null: ended, cancelled or released
};

}  // namespace fathom
