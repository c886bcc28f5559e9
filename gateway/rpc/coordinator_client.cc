#include "gateway/rpc/coordinator_client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "gateway/http/wakeup.h"
#include "gateway/rpc/generate_link.h"
#include "gateway/rpc/outstanding.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/generate.grpc.pb.h"
#include "proto/status.h"

namespace fathom {
namespace {

// Less than a step of a thousand streams: gRPC makes room for the message that is to be read, and
// for little beyond. What a busy gateway does not get to gathers in the coordinator, which joins
// it: the gateway then writes fewer events with more tokens, and has caught up. On the way it would
// only be late, and the first tokens behind it too.
constexpr int kReadAheadBytes = 1 << 10;

// grpc.health.v1.HealthCheckRequest{service}, written by hand: field 1, a short string.
grpc::ByteBuffer HealthCheckRequestFor(const std::string& service) {
  CHECK_LT(service.size(), 128u);
  std::string bytes = "\x0a";
  bytes.push_back(static_cast<char>(service.size()));
  bytes += service;
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

// Whether it is HealthCheckResponse{status: SERVING}: field 1, varint 1.
bool SaysServing(const grpc::ByteBuffer& response) {
  grpc::Slice slice;
  if (!response.DumpToSingleSlice(&slice).ok()) return false;
  return std::string_view(reinterpret_cast<const char*>(slice.begin()), slice.size()) ==
         std::string_view("\x08\x01", 2);
}

}  // namespace

struct CoordinatorClient::Stubs {
  explicit Stubs(std::shared_ptr<grpc::Channel> channel)
      : channel(channel), generate(v1::Generate::NewStub(channel)), generic(channel) {}

  // A call with one response, started by `start(context, request, response, done)`.
  template <typename Request, typename Response, typename Start>
  static Task<absl::StatusOr<Response>> CallOnce(Stubs& stubs, IoThread& io_thread,
                                                 std::chrono::milliseconds timeout, Request request,
                                                 Start start);

  const std::shared_ptr<grpc::Channel> channel;
  const std::unique_ptr<v1::Generate::Stub> generate;
  grpc::GenericStub generic;
  Outstanding outstanding;
};

template <typename Request, typename Response, typename Start>
Task<absl::StatusOr<Response>> CoordinatorClient::Stubs::CallOnce(Stubs& stubs, IoThread& io_thread,
                                                                  std::chrono::milliseconds timeout,
                                                                  Request request, Start start) {
  struct State {
    explicit State(IoThread& io_thread) : wakeup(io_thread) {}
    grpc::ClientContext context;
    Request request;
    Response response;
    grpc::Status status;
    bool done = false;
    Wakeup wakeup;
  };
  auto state = std::make_shared<State>(io_thread);
  state->request = std::move(request);
  state->context.set_deadline(std::chrono::system_clock::now() + timeout);
  stubs.outstanding.Add();
  Outstanding& outstanding = stubs.outstanding;
  start(&state->context, &state->request, &state->response,
        // Keeps nothing of the state: gRPC lets go of this after the I/O thread may have gone.
        [state, &io_thread, &outstanding](grpc::Status status) mutable {
          io_thread.Post([state = std::move(state), status = std::move(status)] {
            state->status = status;
            state->done = true;
            state->wakeup.Notify();
          });
          outstanding.Remove();
        });
  while (!state->done) co_await state->wakeup.Wait();
  if (!state->status.ok()) co_return FromGrpc(state->status);
  co_return std::move(state->response);
}

absl::StatusOr<std::unique_ptr<CoordinatorClient>> CoordinatorClient::Create(
    CoordinatorClientOptions options, IoThread& io_thread) {
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel,
                   ConnectTo(options.address, options.tls, kReadAheadBytes));
  return std::unique_ptr<CoordinatorClient>(new CoordinatorClient(
      std::move(options), io_thread, std::make_unique<Stubs>(std::move(channel))));
}

CoordinatorClient::CoordinatorClient(CoordinatorClientOptions options, IoThread& io_thread,
                                     std::unique_ptr<Stubs> stubs)
    : options_(std::move(options)), io_thread_(io_thread), stubs_(std::move(stubs)) {
  link_ = std::make_unique<GenerateLink>(*stubs_->generate, io_thread_, stubs_->outstanding);
}

CoordinatorClient::~CoordinatorClient() {
  link_ = nullptr;
  stubs_->outstanding.WaitForNone();
}

// By a call, because gRPC makes progress with a TCP connection only while a call waits for it. It
// fails at once when the coordinator is known to be away.
Task<absl::Status> CoordinatorClient::Connect() {
  Stubs& stubs = *stubs_;
  if (stubs.channel->GetState(/*try_to_connect=*/true) == GRPC_CHANNEL_READY) {
    co_return absl::OkStatus();
  }
  auto start = [&stubs](grpc::ClientContext* context, const v1::GetServerInfoRequest* request,
                        v1::ServerInfo* response, std::function<void(grpc::Status)> done) {
    stubs.generate->async()->GetServerInfo(context, request, response, std::move(done));
  };
  v1::GetServerInfoRequest request;
  const absl::StatusOr<v1::ServerInfo> response =
      co_await Stubs::CallOnce<v1::GetServerInfoRequest, v1::ServerInfo>(
          stubs, io_thread_, options_.connect_timeout, std::move(request), start);
  if (absl::IsUnavailable(response.status()) || absl::IsDeadlineExceeded(response.status())) {
    co_return absl::UnavailableError("the coordinator cannot be reached; try again shortly");
  }
  co_return absl::OkStatus();
}

Task<absl::Status> CoordinatorClient::CheckHealth() {
  Stubs& stubs = *stubs_;
  auto start = [&stubs](grpc::ClientContext* context, const grpc::ByteBuffer* request,
                        grpc::ByteBuffer* response, std::function<void(grpc::Status)> done) {
    stubs.generic.UnaryCall(context, "/grpc.health.v1.Health/Check", grpc::StubOptions(), request,
                            response, std::move(done));
  };
  grpc::ByteBuffer request = HealthCheckRequestFor("fathom.v1.Generate");
  absl::StatusOr<grpc::ByteBuffer> response =
      co_await Stubs::CallOnce<grpc::ByteBuffer, grpc::ByteBuffer>(
          stubs, io_thread_, options_.health_timeout, std::move(request), start);
  if (!response.ok()) co_return response.status();
  if (SaysServing(*response)) co_return absl::OkStatus();
  co_return absl::UnavailableError("the coordinator cannot make steps at the moment");
}

Task<absl::StatusOr<v1::ModelInfo>> CoordinatorClient::GetModelInfo() {
  absl::Status connected = co_await Connect();
  if (!connected.ok()) co_return connected;
  Stubs& stubs = *stubs_;
  auto start = [&stubs](grpc::ClientContext* context, const v1::GetModelInfoRequest* request,
                        v1::ModelInfo* response, std::function<void(grpc::Status)> done) {
    stubs.generate->async()->GetModelInfo(context, request, response, std::move(done));
  };
  v1::GetModelInfoRequest request;
  absl::StatusOr<v1::ModelInfo> response =
      co_await Stubs::CallOnce<v1::GetModelInfoRequest, v1::ModelInfo>(
          stubs, io_thread_, options_.call_timeout, std::move(request), start);
  co_return response;
}

Task<absl::StatusOr<v1::ServerInfo>> CoordinatorClient::GetServerInfo() {
  Stubs& stubs = *stubs_;
  auto start = [&stubs](grpc::ClientContext* context, const v1::GetServerInfoRequest* request,
                        v1::ServerInfo* response, std::function<void(grpc::Status)> done) {
    stubs.generate->async()->GetServerInfo(context, request, response, std::move(done));
  };
  v1::GetServerInfoRequest request;
  absl::StatusOr<v1::ServerInfo> response =
      co_await Stubs::CallOnce<v1::GetServerInfoRequest, v1::ServerInfo>(
          stubs, io_thread_, options_.health_timeout, std::move(request), start);
  co_return response;
}

Task<absl::StatusOr<std::string>> CoordinatorClient::GetMetrics() {
  Stubs& stubs = *stubs_;
  auto start = [&stubs](grpc::ClientContext* context, const v1::GetMetricsRequest* request,
                        v1::MetricsText* response, std::function<void(grpc::Status)> done) {
    stubs.generate->async()->GetMetrics(context, request, response, std::move(done));
  };
  v1::GetMetricsRequest request;
  absl::StatusOr<v1::MetricsText> response =
      co_await Stubs::CallOnce<v1::GetMetricsRequest, v1::MetricsText>(
          stubs, io_thread_, options_.health_timeout, std::move(request), start);
  if (!response.ok()) co_return response.status();
  co_return std::move(*response->mutable_text());
}

}  // namespace fathom
