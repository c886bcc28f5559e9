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
  message.Append(std::move(next.message));
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
  if (options_.parser) parser_ = std::make_unique<OutputParser>(*options_.parser);
}

ChoiceDelta Choice::Take(v1::GenerateResponse&& response) {
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
    if (parser_ != nullptr && parser_->thinks()) ++num_reasoning_tokens_;
    // The token that ended it counts, but is no part of the text.
    const bool hidden = stopped_by_token && i + 1 == response.token_ids_size() &&
                        options_.stop_string == StopString::kLeaveOut;
    if (hidden) break;
    PushToken(token_id, delta);
    if (const std::optional<size_t> stop = stop_matcher_.stopped()) {
      EndWith("stop", options_.stop[*stop], delta);
      return delta;
    }
  }
  if (response.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return delta;
  Flush(delta);
  if (const std::optional<size_t> stop = stop_matcher_.stopped()) {
    EndWith("stop", options_.stop[*stop], delta);
    return delta;
  }
  StopReason reason;
  if (response.has_stop_token_id()) reason = response.stop_token_id();
  EndWith(stopped_by_token ? "stop" : "length", std::move(reason), delta);
  return delta;
}

void Choice::EndWith(std::string_view finish_reason, StopReason stop_reason, ChoiceDelta& delta) {
  finished_ = true;
  delta.finish_reason = finish_reason;
  delta.stop_reason = std::move(stop_reason);
  if (parser_ == nullptr) return;
  // A call that was cut short must not look complete: "length" stays, and so does a stop of the
  // client's own within it. A model that ends there has written what it wanted to.
  const bool was_cut =
      parser_->is_in_call() && !std::holds_alternative<std::monostate>(delta.stop_reason);
  parser_->Finish(delta.message);
  const bool is_call = options_.ends_as_call && parser_->has_called() && !was_cut;
  if (finish_reason == "stop" && is_call) delta.finish_reason = "tool_calls";
}

void Choice::PushToken(uint32_t token_id, ChoiceDelta& delta) {
  if (!detokenizer_) return;
  const std::optional<Marker> marker =
      parser_ != nullptr ? options_.markers->Find(token_id) : std::nullopt;
  if (!marker) {
    const std::string text = detokenizer_->Push({&token_id, 1});
    if (parser_ != nullptr) held_.AddText(text);
    return Show(PastStops(text), delta);
  }
  const std::string before = detokenizer_->Finish();
  const std::string text = detokenizer_->Push({&token_id, 1});
  held_.AddText(before);
  held_.AddMarker(*marker, text);
  Show(PastStops(before + text), delta);
}

void Choice::Flush(ChoiceDelta& delta) {
  if (!detokenizer_) return;
  const std::string text = detokenizer_->Finish();
  if (parser_ != nullptr) held_.AddText(text);
  std::string shown = stop_matcher_.Push(text);
  Show(shown += stop_matcher_.Finish(), delta);
}

std::string Choice::PastStops(std::string_view text) {
  return num_tokens_ <= options_.min_tokens ? std::string(text) : stop_matcher_.Push(text);
}

void Choice::Show(const std::string& text, ChoiceDelta& delta) {
  if (parser_ != nullptr) {
    held_.Release(text.size(), *parser_, delta.message);
  } else {
    delta.text += text;
  }
}

}  // namespace fathom
