// The words of /v1/responses. Not thread-safe; one per request.
//
// A stream is response.created, response.in_progress, what becomes of each output item, and
// response.completed or response.incomplete with all of it; events are numbered. Items are
// `reasoning` (with the thoughts as its content, no summary), `message` and `function_call`.
// Source: OpenAI's API reference, "The response object" and "Streaming events".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/answer_items.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/response_header.h"
#include "gateway/openai/responses_request.h"

namespace fathom {

class ResponsesFormat : public AnswerFormat, private AnswerItems::Listener {
 public:
  // `request` must outlive this.
  ResponsesFormat(ResponseHeader header, const ResponsesRequest& request, TokenNames names);

  bool events_have_names() const override { return true; }
  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, const ChoiceDelta& delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;
  std::string ErrorEvent(const absl::Status& status) override;

 private:
  enum class ItemState { kBegun, kCompleted, kIncomplete };

  void OnBegin(const AnswerItem& item) override;
  void OnPiece(const AnswerItem& item, std::string_view piece) override;
  void OnEnd(const AnswerItem& item) override;

  // {"type":TYPE,"sequence_number":N, and what the caller adds up to EndEvent.
  JsonWriter BeginEvent(std::string_view type);
  // The same of an event about that item.
  JsonWriter BeginItemEvent(std::string_view type, const AnswerItem& item);
  void EndEvent(std::string_view type, JsonWriter json);
  void AppendItemEvent(std::string_view type, const AnswerItem& item, ItemState state);
  void AppendPartEvent(std::string_view type, const AnswerItem& item, std::string_view text);

  // `usage` absent: it is still in progress.
  void WriteResponse(const std::optional<TokenUsage>& usage, JsonWriter& json) const;
  void WriteItem(const AnswerItem& item, ItemState state, JsonWriter& json) const;
  // Of thoughts and text.
  void WritePart(const AnswerItem& item, std::string_view text, JsonWriter& json) const;
  void WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const;
  // Of an item that has ended; the length limit cuts the last one short.
  ItemState EndOf(const AnswerItem& item) const;
  std::string IdOf(const AnswerItem& item) const;
  bool complete() const { return finish_reason_ != "length"; }

  const ResponseHeader header_;
  const ResponsesRequest& request_;
  const TokenNames names_;
  AnswerItems items_;
  std::string_view finish_reason_;  // "" while it goes on
  ChoiceDelta tokens_;              // with logprobs, if asked for: then the answer is text alone
  ChoiceDelta new_tokens_;          // not yet in an event
  std::string events_;              // not yet returned
  int64_t next_number_ = 0;
};

}  // namespace fathom
