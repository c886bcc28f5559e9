#include "gateway/rpc/generate_link.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "proto/grammar_fault.h"
#include "proto/retry_after.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr int kSlice = 16;  // events; 0.2 ms of work or so

int NumTokensIn(const v1::GenerateEvents& events) {
  return std::min(events.streams_size(), events.token_ids_size());
}

int NumEventsIn(const v1::GenerateEvents& events) {
  return NumTokensIn(events) + events.others_size();
}

}  // namespace

// One call. gRPC's reactions come from its threads; it owns itself until OnDone.
class GenerateLink::Call final
    : public grpc::ClientBidiReactor<v1::GenerateCommand, v1::GenerateEvents>,
      public std::enable_shared_from_this<Call> {
 public:
  Call(GenerateLink& link, IoThread& io_thread, Outstanding& outstanding)
      : link_(&link), io_thread_(io_thread), outstanding_(outstanding) {}

  void Open(v1::Generate::Stub& stub) {
    self_ = shared_from_this();
    outstanding_.Add();
    stub.async()->GenerateMany(&context_, this);
    AddHold();  // for what starts outside of reactions; until the first failed read
    StartRead(&events_);
    StartCall();
  }

  void Send(v1::GenerateCommand command) {
    std::lock_guard lock(mutex_);
    if (!is_open_) return;  // OnDone is about to say so
    unsent_.push_back(std::move(command));
    if (unsent_.size() == 1) StartWrite(&unsent_.front());
  }

  // The link goes.
  void Close() {
    link_ = nullptr;
    context_.TryCancel();
    std::lock_guard lock(mutex_);
    is_closed_ = true;
    is_open_ = false;
    if (!is_reading_) LetGo();
  }

 private:
  void OnReadDone(bool ok) override {
    {
      std::lock_guard lock(mutex_);
      if (!ok) {
        is_open_ = false;
        return LetGo();
      }
      if (is_closed_) return StartRead(&events_);  // until one fails
      is_reading_ = false;
    }
    io_thread_.Post([self = shared_from_this()] { self->TakeSlice(); });
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mutex_);
    unsent_.pop_front();
    if (ok && is_open_ && !unsent_.empty()) StartWrite(&unsent_.front());
  }

  void OnDone(const grpc::Status& status) override {
    Outstanding& outstanding = outstanding_;  // `this` may be gone once the I/O thread has it
    io_thread_.Post([self = std::move(self_), status = FromGrpc(status)] {
      if (self->link_ != nullptr) self->link_->OnCallEnded(status);
    });
    outstanding.Remove();
  }

  // I/O thread. Between slices others get their turn: a step of a thousand streams takes some 10 ms
  // to be written out, for which new connections and requests would have to wait.
  void TakeSlice() {
    if (link_ != nullptr) {
      taken_ = link_->Take(events_, taken_);
      if (taken_ < NumEventsIn(events_)) {
        return io_thread_.Post([self = shared_from_this()] { self->TakeSlice(); });
      }
    }
    taken_ = 0;
    std::lock_guard lock(mutex_);
    if (is_closed_) return;
    is_reading_ = true;
    StartRead(&events_);
  }

  void LetGo() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (std::exchange(has_hold_, false)) RemoveHold();
  }

  GenerateLink* link_;  // I/O thread only
  IoThread& io_thread_;
  Outstanding& outstanding_;
  grpc::ClientContext context_;
  std::shared_ptr<Call> self_;
  v1::GenerateEvents events_;  // gRPC's while is_reading_, else the I/O thread's
  int taken_ = 0;              // of these; I/O thread only

  std::mutex mutex_;
  std::deque<v1::GenerateCommand> unsent_ ABSL_GUARDED_BY(mutex_);  // the front one is on its way
  bool is_open_ ABSL_GUARDED_BY(mutex_) = true;                     // may be written to
  bool is_reading_ ABSL_GUARDED_BY(mutex_) = true;
  bool is_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool has_hold_ ABSL_GUARDED_BY(mutex_) = true;
};

GenerateLink::GenerateLink(v1::Generate::Stub& stub, IoThread& io_thread, Outstanding& outstanding)
    : stub_(stub), io_thread_(io_thread), outstanding_(outstanding) {}

GenerateLink::~GenerateLink() {
  if (call_ != nullptr) call_->Close();
}

uint64_t GenerateLink::Start(v1::GenerateRequest request, Reader& reader) {
  if (call_ == nullptr) {
    call_ = std::make_shared<Call>(*this, io_thread_, outstanding_);
    call_->Open(stub_);
  }
  const uint64_t stream = ++last_stream_;
  readers_.emplace(stream, &reader);
  v1::GenerateCommand command;
  command.set_stream(stream);
  *command.mutable_start() = std::move(request);
  call_->Send(std::move(command));
  return stream;
}

void GenerateLink::Cancel(uint64_t stream) {
  if (readers_.erase(stream) == 0 || call_ == nullptr) return;
  v1::GenerateCommand command;
  command.set_stream(stream);
  command.mutable_cancel();
  call_->Send(std::move(command));
}

void GenerateLink::Forget(uint64_t stream) { readers_.erase(stream); }

// The others first: among them are the first tokens, whose streams wait the most for them.
int GenerateLink::Take(v1::GenerateEvents& events, int begin) {
  const int num_others = events.others_size();
  const int end = std::min(begin + kSlice, NumEventsIn(events));
  for (int i = begin; i < end; ++i) {
    if (i < num_others) {
      TakeOther(*events.mutable_others(i));
      continue;
    }
    plain_response_.Clear();
    plain_response_.add_token_ids(events.token_ids(i - num_others));
    Deliver(events.streams(i - num_others), plain_response_);
  }
  return end;
}

void GenerateLink::TakeOther(v1::StreamEvent& event) {
  if (event.has_response()) return Deliver(event.stream(), *event.mutable_response());
  absl::Status failure(static_cast<absl::StatusCode>(event.failure().code()),
                       event.failure().message());
  const auto seconds = static_cast<int>(event.failure().retry_after_seconds());
  if (seconds > 0) SetRetryAfter(failure, seconds);
  if (event.failure().is_of_grammar()) failure = OfGrammar(std::move(failure));
  Fail(event.stream(), std::move(failure));
}

void GenerateLink::Deliver(uint64_t stream, v1::GenerateResponse& response) {
  const auto found = readers_.find(stream);
  if (found == readers_.end()) return;  // cancelled meanwhile
  Reader& reader = *found->second;
  if (response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) readers_.erase(found);
  reader.OnResponse(response);
}

void GenerateLink::Fail(uint64_t stream, const absl::Status& status) {
  const auto found = readers_.find(stream);
  if (found == readers_.end()) return;
  Reader& reader = *found->second;
  readers_.erase(found);
  reader.OnFailure(status);
}

void GenerateLink::OnCallEnded(const absl::Status& status) {
  call_.reset();
  if (readers_.empty()) return;
  spdlog::warn("the connection to the coordinator broke with {} requests on it: {}",
               readers_.size(), status.ToString());
  const absl::Status failure = absl::UnavailableError(
      "the connection to the coordinator broke before the request was finished; try again");
  for (const auto& [stream, reader] : std::exchange(readers_, {})) reader->OnFailure(failure);
}

}  // namespace fathom
