// The words of /v1/responses. Not thread-safe; one per request.
//
// A stream is response.created, response.in_progress, what becomes of the one output item, and
// response.completed or response.incomplete with all of it; events are numbered.
// Source: OpenAI's API reference, "The response object" and "Streaming events".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/response_header.h"
#include "gateway/openai/responses_request.h"

namespace fathom {

class ResponsesFormat : public AnswerFormat {
 public:
  // `request` must outlive this.
  ResponsesFormat(ResponseHeader header, const ResponsesRequest& request, TokenNames names);

  bool events_have_names() const override { return true; }
  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, ChoiceDelta delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;
  std::string ErrorEvent(const absl::Status& status) override;

 private:
  // {"type":TYPE,"sequence_number":N, and what the caller adds up to EndEvent.
  JsonWriter BeginEvent(std::string_view type);
  void EndEvent(std::string_view type, JsonWriter json, std::string& events) const;
  // "item_id" to "content_index".
  void WritePlace(JsonWriter& json) const;

  // `usage` absent: it is still in progress.
  void WriteResponse(const std::optional<TokenUsage>& usage, JsonWriter& json) const;
  enum class ItemState { kBegun, kDone };
  void WriteItem(ItemState state, JsonWriter& json) const;
  void WritePart(ItemState state, JsonWriter& json) const;
  void WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const;
  void AppendEndOfItem(std::string& events);
  bool complete() const { return answer_.finish_reason != "length"; }

  const ResponseHeader header_;
  const ResponsesRequest& request_;
  const TokenNames names_;
  const std::string item_id_;
  ChoiceDelta answer_;  // so far
  int64_t next_number_ = 0;
};

}  // namespace fathom
