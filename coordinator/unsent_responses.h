// What a request's client has not read yet: newer tokens join the ones that wait, so a slow client
// costs memory in proportion to its own tokens. Not thread-safe.
#pragma once

#include <utility>
#include <vector>

#include "base/check.h"
#include "proto/generate.pb.h"

namespace fathom {

// Numbers in a message, about.
inline int CountEntries(const v1::GenerateResponse& response) {
  int count = response.token_ids_size();
  for (const auto* list : {&response.logprobs(), &response.prompt_logprobs()}) {
    for (const v1::TokenLogprobs& logprobs : *list) count += 3 + 2 * logprobs.top_token_ids_size();
  }
  return count;
}

// A message this full is sent before more is added: clients commonly refuse more than 4 MB.
inline constexpr int kMaxEntriesPerMessage = 32768;

class UnsentResponses {
 public:
  bool empty() const { return responses_.empty(); }

  void Add(v1::GenerateResponse response) {
    const int num_entries = CountEntries(response);
    if (responses_.empty() || entries_of_last_ + num_entries > kMaxEntriesPerMessage) {
      responses_.push_back(std::move(response));
      entries_of_last_ = num_entries;
    } else {
      responses_.back().MergeFrom(response);
      entries_of_last_ += num_entries;
    }
  }

  // The oldest. There must be one.
  v1::GenerateResponse Take() {
    CHECK(!responses_.empty());
    v1::GenerateResponse response = std::move(responses_.front());
    responses_.erase(responses_.begin());
    return response;
  }

  void Clear() { responses_.clear(); }

 private:
  std::vector<v1::GenerateResponse> responses_;  // seldom more than one
  int entries_of_last_ = 0;
};

}  // namespace fathom
