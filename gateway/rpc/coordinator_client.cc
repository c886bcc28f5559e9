#include "gateway/rpc/coordinator_client.h"

#include <condition_variable>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "gateway/http/wakeup.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/client_callback.h"
#include "proto/generate.grpc.pb.h"
#include "proto/status.h"

namespace fathom {
namespace {

// Of one call, received and not yet taken by Generation::Next.
constexpr int kMaxWaitingResponses = 64;

// Counts what gRPC still holds, so that the client can wait for it before it goes. Thread-safe.
class Outstanding {
 public:
  void Add() {
    std::lock_guard lock(mutex_);
    ++count_;
  }
  void Remove() {
    std::lock_guard lock(mutex_);
    if (--count_ == 0) none_.notify_all();
  }
  void WaitForNone() {
    std::unique_lock lock(mutex_);
    none_.wait(lock, [this] { return count_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  int count_ ABSL_GUARDED_BY(mutex_) = 0;
};

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
        [state, &io_thread, &outstanding](grpc::Status status) {
          io_thread.Post([state, status = std::move(status)] {
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
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, ConnectTo(options.address, options.tls));
  return std::unique_ptr<CoordinatorClient>(new CoordinatorClient(
      std::move(options), io_thread, std::make_unique<Stubs>(std::move(channel))));
}

CoordinatorClient::CoordinatorClient(CoordinatorClientOptions options, IoThread& io_thread,
                                     std::unique_ptr<Stubs> stubs)
    : options_(std::move(options)), io_thread_(io_thread), stubs_(std::move(stubs)) {}

// Whoever owns a Generation owns a reference to the client, so only calls with a deadline, and
// cancelled ones, can still be under way here.
CoordinatorClient::~CoordinatorClient() { stubs_->outstanding.WaitForNone(); }

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

// Where the calls of a Generation leave their events. I/O thread only.
struct Generation::Inbox {
  explicit Inbox(IoThread& io_thread) : wakeup(io_thread) {}
  std::deque<Event> events;
  Wakeup wakeup;
};

// One Generate call. gRPC's reactions come from its threads; it owns itself until OnDone. Reading
// pauses while kMaxWaitingResponses wait for the reader.
class Generation::Call : public grpc::ClientReadReactor<v1::GenerateResponse>,
                         public std::enable_shared_from_this<Call> {
 public:
  Call(size_t index, v1::GenerateRequest request, std::shared_ptr<Inbox> inbox, IoThread& io_thread,
       Outstanding& outstanding)
      : index_(index),
        request_(std::move(request)),
        inbox_(std::move(inbox)),
        io_thread_(io_thread),
        outstanding_(outstanding) {}

  void Start(v1::Generate::Stub& stub) {
    self_ = shared_from_this();
    outstanding_.Add();
    stub.async()->Generate(&context_, &request_, this);
    AddHold();  // for reads that Taken and Release start
    StartRead(&response_);
    StartCall();
  }

  // I/O thread: the reader took one response.
  void Taken() {
    {
      std::lock_guard lock(mutex_);
      --num_waiting_;
      if (!paused_ || num_waiting_ > kMaxWaitingResponses / 2) return;
      paused_ = false;
    }
    StartRead(&response_);
  }

  void Cancel() {
    context_.TryCancel();
    Release();
  }

  // I/O thread: nothing that still arrives is delivered.
  void Release() {
    wanted_ = false;
    {
      std::lock_guard lock(mutex_);
      released_ = true;
      if (!std::exchange(paused_, false)) return;
    }
    StartRead(&response_);  // goes on until it finds that the call is over
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return RemoveHold();
    io_thread_.Post([self = shared_from_this(), response = std::move(response_)]() mutable {
      self->Deliver({self->index_, std::move(response), absl::OkStatus()});
    });
    response_.Clear();
    {
      std::lock_guard lock(mutex_);
      ++num_waiting_;
      if (num_waiting_ >= kMaxWaitingResponses && !released_) {
        paused_ = true;
        return;
      }
    }
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    Outstanding& outstanding = outstanding_;  // `this` may be gone once the I/O thread has it
    io_thread_.Post([self = std::move(self_), status = FromGrpc(status)]() mutable {
      self->Deliver({self->index_, std::nullopt, std::move(status)});
    });
    outstanding.Remove();
  }

  void Deliver(Event event) {
    if (!wanted_) return;
    inbox_->events.push_back(std::move(event));
    inbox_->wakeup.Notify();
  }

  const size_t index_;
  const v1::GenerateRequest request_;
  const std::shared_ptr<Inbox> inbox_;
  IoThread& io_thread_;
  Outstanding& outstanding_;
  grpc::ClientContext context_;
  v1::GenerateResponse response_;  // being read
  std::shared_ptr<Call> self_;
  bool wanted_ = true;  // I/O thread only

  std::mutex mutex_;
  int num_waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;  // no read is under way
  bool released_ ABSL_GUARDED_BY(mutex_) = false;
};

Generation::Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests)
    : inbox_(std::make_shared<Inbox>(client.io_thread_)) {
  CoordinatorClient::Stubs& stubs = *client.stubs_;
  for (size_t i = 0; i < requests.size(); ++i) {
    calls_.push_back(std::make_shared<Call>(i, std::move(requests[i]), inbox_, client.io_thread_,
                                            stubs.outstanding));
    calls_.back()->Start(*stubs.generate);
  }
}

Generation::~Generation() { CancelAll(); }

Task<std::optional<Generation::Event>> Generation::Next() {
  while (true) {
    while (!inbox_->events.empty()) {
      Event event = std::move(inbox_->events.front());
      inbox_->events.pop_front();
      if (calls_[event.call] == nullptr) continue;  // not wanted any more
      if (event.response) {
        calls_[event.call]->Taken();
      } else {
        calls_[event.call] = nullptr;
      }
      co_return event;
    }
    bool running = false;
    for (const std::shared_ptr<Call>& call : calls_) running = running || call != nullptr;
    if (!running) co_return std::nullopt;
    co_await inbox_->wakeup.Wait();
  }
}

std::shared_ptr<Generation::Call> Generation::TakeOut(size_t call) {
  return std::exchange(calls_[call], nullptr);
}

void Generation::Cancel(size_t call) {
  if (const std::shared_ptr<Call> taken = TakeOut(call)) taken->Cancel();
}

void Generation::Release(size_t call) {
  if (const std::shared_ptr<Call> taken = TakeOut(call)) taken->Release();
}

void Generation::CancelAll() {
  for (size_t i = 0; i < calls_.size(); ++i) Cancel(i);
  inbox_->wakeup.Notify();
}

}  // namespace fathom
