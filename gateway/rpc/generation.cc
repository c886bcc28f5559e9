#include "gateway/rpc/generation.h"

#include <algorithm>
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

  void OnResponse(v1::GenerateResponse response) override {
    if (responses_.size() == kMaxWaitingResponses) {
      responses_.back().MergeFrom(response);
      return;
    }
    responses_.push_back(std::move(response));
    Announce();
  }

  void OnFailure(const absl::Status& status) override {
    failure_ = status;
    Announce();
  }

  // The oldest event. There is one.
  Event TakeEvent() {
    if (responses_.empty()) return {index_, std::nullopt, failure_};
    Event event{index_, std::move(responses_.front()), absl::OkStatus()};
    responses_.pop_front();
    return event;
  }

 private:
  void Announce() {
    generation_.ready_.push_back(index_);
    generation_.wakeup_.Notify();
  }

  Generation& generation_;
  const size_t index_;
  uint64_t stream_ = 0;
  std::deque<v1::GenerateResponse> responses_;
  absl::Status failure_;
};

Generation::Generation(CoordinatorClient& client, std::vector<v1::GenerateRequest> requests)
    : link_(client.link()), wakeup_(client.io_thread()) {
  for (size_t i = 0; i < requests.size(); ++i) {
    calls_.push_back(std::make_unique<Call>(*this, i));
    calls_.back()->Start(std::move(requests[i]));
  }
}

Generation::~Generation() { CancelAll(); }

Task<std::optional<Generation::Event>> Generation::Next() {
  while (true) {
    while (!ready_.empty()) {
      const size_t index = ready_.front();
      ready_.pop_front();
      if (calls_[index] == nullptr) continue;  // not wanted any more
      Event event = calls_[index]->TakeEvent();
      const bool is_last = !event.response.has_value() ||
                           event.response->finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
      if (is_last) calls_[index] = nullptr;
      co_return event;
    }
    const bool is_over =
        std::all_of(calls_.begin(), calls_.end(), [](const auto& call) { return call == nullptr; });
    if (is_over) co_return std::nullopt;
    co_await wakeup_.Wait();
  }
}

void Generation::Cancel(size_t call) {
  if (const auto taken = std::exchange(calls_[call], nullptr)) taken->Cancel();
}

void Generation::CancelAll() {
  for (size_t i = 0; i < calls_.size(); ++i) Cancel(i);
  wakeup_.Notify();
}

}  // namespace fathom
