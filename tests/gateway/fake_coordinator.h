// A coordinator that does what the test says, behind the real protocol on a unix socket and a port.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {

// One request, as a script sees it.
class FakeStream {
 public:
  // Sends an event of this stream; false when the client is gone.
  using SendEvent = std::function<bool(const v1::StreamEvent&)>;

  FakeStream(uint64_t number, SendEvent send) : number_(number), send_(std::move(send)) {}

  // False when the client is gone, or has cancelled.
  bool Send(const v1::GenerateResponse& response);
  bool SendTokens(const std::vector<uint32_t>& token_ids);
  bool SendEnd(const std::vector<uint32_t>& last_tokens, v1::FinishReason reason);
  // The end of a request that wants what cannot be.
  bool RefuseGrammar(const std::string& message);

  // Whether the client cancelled within ten seconds.
  bool WaitUntilCancelled();
  bool cancelled() const { return is_cancelled_; }

  // For the coordinator.
  void Cancel() { is_cancelled_ = true; }
  void Fail(const grpc::Status& status);
  bool has_ended() const { return has_ended_; }

 private:
  const uint64_t number_;
  const SendEvent send_;
  std::atomic<bool> is_cancelled_{false};
  bool has_ended_ = false;  // of the script's thread
};

class FakeCoordinator : public v1::Generate::Service {
 public:
  // Runs on a thread of the request's own; what it returns ends the request, if it has no end yet.
  using Script = std::function<grpc::Status(const v1::GenerateRequest&, FakeStream&)>;

  // Listens on a socket of a fresh folder.
  FakeCoordinator();
  ~FakeCoordinator() override;

  std::string address() const;
  std::string tcp_address() const { return "127.0.0.1:" + std::to_string(port_); }
  void SetScript(Script script);
  void SetServing(bool serving);

  // As after a kill: connections break at once. Start brings it back at the same address.
  void Kill();
  void Start();

  // So far.
  std::vector<v1::GenerateRequest> requests() const;
  int num_cancelled() const { return num_cancelled_; }
  int num_running() const { return num_running_; }

  v1::ModelInfo& model_info() { return model_info_; }

 private:
  using Wire = grpc::ServerReaderWriter<v1::GenerateEvents, v1::GenerateCommand>;
  grpc::Status GenerateMany(grpc::ServerContext* context, Wire* wire) override;
  void Run(const v1::GenerateRequest& request, FakeStream& stream);
  grpc::Status GetModelInfo(grpc::ServerContext* context, const v1::GetModelInfoRequest* request,
                            v1::ModelInfo* info) override;
  grpc::Status GetMetrics(grpc::ServerContext* context, const v1::GetMetricsRequest* request,
                          v1::MetricsText* text) override;

  std::string folder_;
  int port_ = 0;  // the same after Kill and Start
  v1::ModelInfo model_info_;
  std::unique_ptr<grpc::Server> server_;
  mutable std::mutex mutex_;
  Script script_;
  std::vector<v1::GenerateRequest> requests_;
  std::atomic<int> num_cancelled_{0};
  std::atomic<int> num_running_{0};
};

// A script that generates `token_ids` one by one and ends as it must: at max_tokens, or where the
// list ends, with `reason`.
FakeCoordinator::Script Saying(std::vector<uint32_t> token_ids,
                               v1::FinishReason reason = v1::FINISH_REASON_STOP);

}  // namespace fathom
