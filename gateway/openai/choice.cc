#include "gateway/openai/choice.h"

#include <iterator>
#include <utility>

#include "base/check.h"

namespace fathom {
namespace {

template <typename T>
void MoveToEnd(std::vector<T>& from, std::vector<T>& to) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

void ChoiceDelta::Append(ChoiceDelta next) {
  text += next.text;
  MoveToEnd(next.token_ids, token_ids);
  MoveToEnd(next.logprobs, logprobs);
  MoveToEnd(next.prompt_logprobs, prompt_logprobs);
  finish_reason = next.finish_reason;
  stop_reason = std::move(next.stop_reason);
}

Choice::Choice(const Tokenizer* tokenizer, ChoiceOptions options)
    : options_(std::move(options)), stop_matcher_(options_.stop, options_.stop_string) {
  CHECK(tokenizer != nullptr || options_.stop.empty());
  if (tokenizer != nullptr) detokenizer_.emplace(*tokenizer, options_.detokenizer);
}

ChoiceDelta Choice::Take(v1::GenerateResponse response) {
  ChoiceDelta delta;
  if (finished_) return delta;
  const bool stopped_by_token = response.finish_reason() == v1::FINISH_REASON_STOP;
  for (v1::TokenLogprobs& logprobs : *response.mutable_prompt_logprobs()) {
    delta.prompt_logprobs.push_back(std::move(logprobs));
  }
  for (int i = 0; i < response.token_ids_size(); ++i) {
    const uint32_t token_id = response.token_ids(i);
    delta.token_ids.push_back(token_id);
    if (i < response.logprobs_size()) {
      delta.logprobs.push_back(std::move(*response.mutable_logprobs(i)));
    }
    ++num_tokens_;
    // The token that ended it counts, but is no part of the text.
    const bool hidden = stopped_by_token && i + 1 == response.token_ids_size() &&
                        options_.stop_string == StopString::kLeaveOut;
    if (hidden) break;
    delta.text += TextOf(token_id);
    if (const std::optional<size_t> stop = stop_matcher_.stopped()) {
      finished_ = true;
      delta.finish_reason = "stop";
      delta.stop_reason = options_.stop[*stop];
      return delta;
    }
  }
  if (response.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return delta;
  finished_ = true;
  delta.text += Flush();
  if (const std::optional<size_t> stop = stop_matcher_.stopped()) {
    delta.finish_reason = "stop";
    delta.stop_reason = options_.stop[*stop];
    return delta;
  }
  delta.finish_reason = stopped_by_token ? "stop" : "length";
  if (response.has_stop_token_id()) delta.stop_reason = response.stop_token_id();
  return delta;
}

std::string Choice::TextOf(uint32_t token_id) {
  if (!detokenizer_) return {};
  std::string text = detokenizer_->Push({&token_id, 1});
  return num_tokens_ <= options_.min_tokens ? text : stop_matcher_.Push(text);
}

std::string Choice::Flush() {
  if (!detokenizer_) return {};
  std::string text = stop_matcher_.Push(detokenizer_->Finish());
  return text + stop_matcher_.Finish();
}

}  // namespace fathom
