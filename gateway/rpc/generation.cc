#include "gateway/rpc/generation.h"

#include <utility>

#include "gateway/rpc/generate_link.h"

namespace fathom {

class Generation::Call final : public GenerateLink::Reader {
 public:
  Call(Generation& generation, size_t index) : generation_(generation), index_(index) {}

  void Start(v1::GenerateRequest request) {
    stream_ = generation_.link_.Start(std::move(request), *this);
  }
  void Cancel() { generation_.link_.Cancel(stream_); }

  void OnResponse(v1::GenerateResponse& response) override {
    if (generation_.is_listening_) return generation_.TellNow({index_, &response, {}});
    if (responses_.size() == kMaxWaitingResponses) {
      responses_.back().MergeFrom(response);
      return;
    }
    responses_.push_back(std::move(response));
    generation_.KeepEventOf(index_);
  }

  // Never told now: the link fails all its readers at once, which the listener might destroy.
  void OnFailure(const absl::Status& status) override {
    failure_ = status;
    generation_.KeepEventOf(index_);
  }

  // The oldest response that waits; nullopt: it is the failure that waits.
  std::optional<v1::GenerateResponse> TakeResponse() {
    if (responses_.empty()) return std::nullopt;
    v1::GenerateResponse response = std::move(responses_.front());
    responses_.pop_front();
    return response;
  }
  absl::Status TakeFailure() { return std::move(failure_); }

 private:
  Generation& generation_;
  const size_t index_;
  uint64_t stream_ = 0;
  std::list<v1::GenerateResponse> responses_;
  absl::Status failure_;
};

Generation::Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests)
    : link_(client.link()), wakeup_(client.io_thread()), num_running_(requests.size()) {
  for (size_t i = 0; i < requests.size(); ++i) {
    calls_.push_back(std::make_unique<Call>(*this, i));
    calls_.back()->Start(std::move(requests[i]));
  }
}

Generation::~Generation() { CancelAll(); }

Task<> Generation::Listen(Listener listener) {
  listener_ = std::move(listener);
  wants_more_ = true;
  while (true) {
    TellWaiting();
    if (!wants_more_ || is_over()) break;
    is_listening_ = true;
    co_await wakeup_.Wait();
    is_listening_ = false;
  }
}

// The call may be gone afterwards.
void Generation::TellNow(const Event& event) {
  Tell(event);
  if (wants_more_ && !is_over()) return;
  is_listening_ = false;
  wakeup_.Notify();
}

void Generation::KeepEventOf(size_t call) {
  waiting_.push_back(call);
  is_listening_ = false;  // what comes next must wait behind it
  wakeup_.Notify();
}

void Generation::TellWaiting() {
  while (wants_more_ && !waiting_.empty()) {
    const size_t call = waiting_.front();
    waiting_.pop_front();
    if (calls_[call] == nullptr) continue;  // not wanted any more
    std::optional<v1::GenerateResponse> response = calls_[call]->TakeResponse();
    if (response) {
      Tell({call, &*response, {}});
    } else {
      Tell({call, nullptr, calls_[call]->TakeFailure()});
    }
  }
}

void Generation::Tell(const Event& event) {
  const bool is_last =
      event.response == nullptr || event.response->finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  if (is_last) Release(event.call);
  wants_more_ = listener_(event);
}

std::unique_ptr<Generation::Call> Generation::Release(size_t call) {
  if (calls_[call] != nullptr) --num_running_;
  return std::move(calls_[call]);
}

void Generation::Cancel(size_t call) {
  if (const std::unique_ptr<Call> released = Release(call)) released->Cancel();
}

void Generation::CancelAll() {
  for (size_t i = 0; i < calls_.size(); ++i) Cancel(i);
  wakeup_.Notify();
}

}  // namespace fathom
