#include "coordinator/grammar_gate.h"

#include <chrono>
#include <utility>

#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "grpcpp/client_context.h"
#include "proto/grammar_fault.h"
#include "proto/status.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

// What gRPC says of the worker is for the log.
absl::Status Translated(const grpc::Status& status) {
  switch (status.error_code()) {
    case grpc::StatusCode::OK:
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return FromGrpc(status);
    case grpc::StatusCode::INVALID_ARGUMENT:
      return OfGrammar(FromGrpc(status));
    case grpc::StatusCode::UNAVAILABLE:          // it is gone
    case grpc::StatusCode::CANCELLED:            // it, or this, stops
    case grpc::StatusCode::FAILED_PRECONDITION:  // it is there again, and in no group yet
      spdlog::warn("a worker was lost that should compile a grammar: {}", status.error_message());
      return absl::UnavailableError(
          "the workers that should compile its grammar were lost; try again");
    default:
      spdlog::error("a worker could not compile a grammar: {}", status.error_message());
      return absl::AbortedError("structured output is not available now; try again");
  }
}

}  // namespace

struct GrammarGate::Call {
  Done done;
  absl::Time until;  // for its turn
  v1::PrepareGrammarRequest request;
  v1::PrepareGrammarResponse response;
  grpc::ClientContext context;
};

GrammarGate::GrammarGate(Options options) : options_(std::move(options)) {}

GrammarGate::~GrammarGate() {
  Close();
  Join();
}

absl::Status GrammarGate::Connect() {
  if (stub_ != nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel,
                   ConnectTo(options_.address, options_.tls));
  stub_ = v1::Worker::NewStub(channel);
  return absl::OkStatus();
}

absl::Status GrammarGate::Prepare(const v1::Grammar& grammar, Done done) {
  auto call = std::make_unique<Call>();
  call->done = std::move(done);
  call->until = absl::Now() + options_.max_wait;
  *call->request.mutable_grammar() = grammar;
  const std::lock_guard lock(mutex_);
  if (is_closed_) return absl::UnavailableError("the server is stopping; try again");
  RETURN_IF_ERROR(Connect());
  waiting_.push_back(std::move(call));
  // Room for a call means that nobody waited.
  std::vector<std::unique_ptr<Call>> none_is_late;
  StartNext(none_is_late);
  return absl::OkStatus();
}

void GrammarGate::StartNext(std::vector<std::unique_ptr<Call>>& too_late) {
  while (!waiting_.empty() && calls_.size() < options_.max_calls) {
    std::unique_ptr<Call> next = std::move(waiting_.front());
    waiting_.pop_front();
    if (absl::Now() > next->until) {
      too_late.push_back(std::move(next));
      continue;
    }
    Call* const call = next.release();
    calls_.insert(call);
    call->context.set_wait_for_ready(true);
    call->context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
    stub_->async()->PrepareGrammar(
        &call->context, &call->request, &call->response,
        [this, call](const grpc::Status& status) { OnAnswer(call, status); });
  }
}

void GrammarGate::OnAnswer(Call* call, const grpc::Status& status) {
  const std::unique_ptr<Call> ended(call);
  ended->done(Translated(status));
  std::vector<std::unique_ptr<Call>> too_late;
  {
    const std::lock_guard lock(mutex_);
    calls_.erase(call);
    ++num_answering_;
    StartNext(too_late);
  }
  for (const std::unique_ptr<Call>& late : too_late) {
    late->done(
        absl::ResourceExhaustedError("too many grammars wait to be compiled; try again later"));
  }
  // With the lock held: the destructor may end as soon as it can take it.
  const std::lock_guard lock(mutex_);
  --num_answering_;
  changed_.notify_all();
}

void GrammarGate::Close() {
  std::deque<std::unique_ptr<Call>> waiting;
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    waiting.swap(waiting_);
    for (Call* const call : calls_) call->context.TryCancel();
  }
  for (const std::unique_ptr<Call>& call : waiting) {
    call->done(absl::UnavailableError("the server is stopping; try again"));
  }
}

void GrammarGate::Join() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return calls_.empty() && num_answering_ == 0; });
}

}  // namespace fathom
