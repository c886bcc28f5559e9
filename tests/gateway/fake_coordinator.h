// A coordinator that does what the test says, behind the real protocol on a unix socket and a port.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {

// One call, as a script sees it.
class FakeStream {
 public:
  FakeStream(grpc::ServerContext& context, grpc::ServerWriter<v1::GenerateResponse>& writer)
      : context_(context), writer_(writer) {}

  // False when the client is gone.
  bool Send(const v1::GenerateResponse& response) { return writer_.Write(response); }
  bool SendTokens(const std::vector<uint32_t>& token_ids);
  bool SendEnd(const std::vector<uint32_t>& last_tokens, v1::FinishReason reason);

  // Whether the client cancelled within ten seconds.
  bool WaitUntilCancelled();
  bool cancelled() const { return context_.IsCancelled(); }

 private:
  grpc::ServerContext& context_;
  grpc::ServerWriter<v1::GenerateResponse>& writer_;
};

class FakeCoordinator : public v1::Generate::Service {
 public:
  // Runs on a thread of the call's own; what it returns ends the call.
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

  // The calls so far.
  std::vector<v1::GenerateRequest> requests() const;
  int num_cancelled() const { return num_cancelled_; }
  int num_running() const { return num_running_; }

  v1::ModelInfo& model_info() { return model_info_; }

 private:
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override;
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
