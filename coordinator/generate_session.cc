#include "coordinator/generate_session.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/grammar_fault.h"
#include "proto/retry_after.h"

namespace fathom {
namespace {

// Whether it is one token and nothing else.
bool IsPlainToken(const v1::GenerateResponse& response) {
  return response.token_ids_size() == 1 && response.logprobs().empty() &&
         response.prompt_logprobs().empty() && !response.has_usage() &&
         response.finish_reason() == v1::FINISH_REASON_UNSPECIFIED;
}

grpc::Status Invalid(const std::string& what) {
  return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, what);
}

}  // namespace

// One request of the session, as GroupRouter sees it.
class GenerateSession::Member final : public TokenStream {
 public:
  Member(std::shared_ptr<GenerateSession> session, uint64_t number)
      : session_(std::move(session)), number_(number) {}

  void OnTokens(v1::GenerateResponse response) override {
    session_->OnTokens(number_, std::move(response));
  }
  void OnEnd(const absl::Status& status) override { session_->OnEnd(number_, status); }
  void Flush() override { session_->Flush(); }

 private:
  const std::shared_ptr<GenerateSession> session_;
  const uint64_t number_;
};

std::shared_ptr<GenerateSession> GenerateSession::Open(Admission& admission) {
  // Not make_shared: the constructor is private.
  std::shared_ptr<GenerateSession> session(new GenerateSession(admission));
  {
    const std::lock_guard lock(session->mutex_);
    session->self_ = session;
  }
  session->StartRead(&session->command_);
  return session;
}

void GenerateSession::Close() {
  const std::lock_guard lock(mutex_);
  is_closing_ = true;
  Pump();
}

void GenerateSession::OnTokens(uint64_t number, v1::GenerateResponse response) {
  const std::lock_guard lock(mutex_);
  const auto stream = streams_.find(number);
  if (stream == streams_.end()) return;
  stream->second.unsent.Add(std::move(response));
  List(number, stream->second);
}

void GenerateSession::OnEnd(uint64_t number, const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  EndStream(number, status);
}

void GenerateSession::Flush() {
  const std::lock_guard lock(mutex_);
  Pump();
}

void GenerateSession::OnReadDone(bool ok) {
  if (ok) Apply(command_);
  const std::lock_guard lock(mutex_);
  if (!ok && !final_status_.has_value()) final_status_ = grpc::Status::OK;
  Pump();
  if (final_status_.has_value()) return;
  if (MayRead()) {
    StartRead(&command_);
  } else {
    is_read_paused_ = true;
  }
}

void GenerateSession::OnWriteDone(bool ok) {
  if (!ok) GiveUp(grpc::Status(grpc::StatusCode::CANCELLED, "cancelled"));
  const std::lock_guard lock(mutex_);
  is_writing_ = false;
  Pump();
  if (is_read_paused_ && MayRead() && !final_status_.has_value()) {
    is_read_paused_ = false;
    StartRead(&command_);
  }
}

void GenerateSession::OnCancel() { GiveUp(grpc::Status(grpc::StatusCode::CANCELLED, "cancelled")); }

void GenerateSession::OnDone() {
  std::shared_ptr<GenerateSession> self;  // released last: it may be the only owner
  const std::lock_guard lock(mutex_);
  self = std::move(self_);
}

void GenerateSession::Apply(const v1::GenerateCommand& command) {
  switch (command.command_case()) {
    case v1::GenerateCommand::kStart:
      return Start(command.stream(), command.start());
    case v1::GenerateCommand::kCancel:
      return CancelStream(command.stream());
    case v1::GenerateCommand::COMMAND_NOT_SET:
      return GiveUp(Invalid("a command must have start or cancel"));
  }
}

void GenerateSession::Start(uint64_t number, const v1::GenerateRequest& request) {
  std::shared_ptr<GenerateSession> self;
  bool is_new;
  {
    const std::lock_guard lock(mutex_);
    if (final_status_.has_value()) return;
    self = self_;
    is_new = streams_.try_emplace(number).second;
    if (is_new && is_closing_) {
      return EndStream(number, absl::UnavailableError("the server is stopping; try again"));
    }
  }
  if (!is_new) {
    return GiveUp(Invalid(absl::StrCat("stream ", number, " was started a second time")));
  }
  const absl::StatusOr<RequestId> id =
      admission_.Submit(request, std::make_shared<Member>(self, number));
  bool is_unwanted = false;
  {
    const std::lock_guard lock(mutex_);
    const auto stream = streams_.find(number);
    if (!id.ok()) {
      EndStream(number, id.status());
    } else if (stream != streams_.end()) {
      stream->second.id = *id;
    } else {
      is_unwanted = final_status_.has_value();  // else it has ended already
    }
  }
  if (is_unwanted) admission_.Cancel(*id);
}

void GenerateSession::CancelStream(uint64_t number) {
  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto stream = streams_.find(number);
    if (stream == streams_.end()) return;  // its end was on its way
    if (stream->second.end.has_value()) {
      --num_unsent_ends_;
    } else {
      id = stream->second.id;
    }
    streams_.erase(stream);
  }
  if (id != 0) admission_.Cancel(id);
}

void GenerateSession::GiveUp(grpc::Status status) {
  std::vector<RequestId> ids;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [number, stream] : streams_) {
      if (!stream.end.has_value() && stream.id != 0) ids.push_back(stream.id);
    }
    streams_.clear();
    changed_.clear();
    if (!final_status_.has_value()) final_status_ = std::move(status);
    Pump();
  }
  for (const RequestId id : ids) admission_.Cancel(id);
}

void GenerateSession::List(uint64_t number, Stream& stream) {
  if (std::exchange(stream.is_listed, true)) return;
  changed_.push_back(number);
}

void GenerateSession::EndStream(uint64_t number, const absl::Status& status) {
  const auto stream = streams_.find(number);
  if (stream == streams_.end() || stream->second.end.has_value()) return;
  stream->second.end = status;
  ++num_unsent_ends_;
  List(number, stream->second);
}

bool GenerateSession::MayRead() const { return num_unsent_ends_ < kMaxUnsentEnds; }

// Starts what can be started. gRPC never calls back from within.
void GenerateSession::Pump() {
  if (is_writing_ || is_finished_) return;
  if (!changed_.empty()) FillMessage();
  if (is_writing_ || !streams_.empty()) return;
  if (!final_status_.has_value() && is_closing_) {
    final_status_ =
        grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is stopping; try again");
  }
  if (!final_status_.has_value()) return;
  is_finished_ = true;
  Finish(*final_status_);
}

// Writes what is unsent, of each stream at most one response.
void GenerateSession::FillMessage() {
  message_.Clear();
  std::vector<uint64_t> left;
  int num_entries = 0;
  for (const uint64_t number : changed_) {
    const auto found = streams_.find(number);
    if (found == streams_.end()) continue;
    Stream& stream = found->second;
    if (num_entries >= kMaxEntriesPerMessage) {
      left.push_back(number);
      continue;
    }
    if (!stream.unsent.empty()) {
      v1::GenerateResponse response = stream.unsent.Take();
      num_entries += CountEntries(response);
      if (IsPlainToken(response) && stream.unsent.empty() && !stream.end.has_value()) {
        message_.add_streams(number);
        message_.add_token_ids(response.token_ids(0));
        stream.is_listed = false;
        continue;
      }
      stream.is_end_told = response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
      v1::StreamEvent& event = *message_.add_others();
      event.set_stream(number);
      *event.mutable_response() = std::move(response);
    }
    if (!stream.unsent.empty()) {
      left.push_back(number);
    } else if (stream.end.has_value()) {
      if (!stream.is_end_told) {
        v1::StreamEvent& event = *message_.add_others();
        event.set_stream(number);
        v1::StreamFailure& failure = *event.mutable_failure();
        failure.set_code(static_cast<int>(stream.end->code()));
        failure.set_message(std::string(stream.end->message()));
        failure.set_retry_after_seconds(RetryAfterOf(*stream.end).value_or(0));
        failure.set_is_of_grammar(IsOfGrammar(*stream.end));
      }
      --num_unsent_ends_;
      streams_.erase(found);
    } else {
      stream.is_listed = false;
    }
  }
  changed_ = std::move(left);
  if (message_.streams().empty() && message_.others().empty()) return;
  is_writing_ = true;
  StartWrite(&message_);
}

}  // namespace fathom
