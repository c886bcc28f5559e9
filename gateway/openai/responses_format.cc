#include "gateway/openai/responses_format.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "gateway/http/response.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/logprobs.h"

namespace fathom {

ResponsesFormat::ResponsesFormat(ResponseHeader header, const ResponsesRequest& request,
                                 TokenNames names)
    : header_(std::move(header)),
      request_(request),
      names_(names),
      item_id_(absl::StrCat("msg_", header_.id.substr(header_.id.find('_') + 1))) {}

JsonWriter ResponsesFormat::BeginEvent(std::string_view type) {
  JsonWriter json;
  json.BeginObject().Key("type").String(type);
  json.Key("sequence_number").Int(next_number_++);
  return json;
}

void ResponsesFormat::EndEvent(std::string_view type, JsonWriter json, std::string& events) const {
  json.EndObject();
  AppendNamedEvent(type, json.text(), events);
}

void ResponsesFormat::WritePlace(JsonWriter& json) const {
  json.Key("item_id").String(item_id_).Key("output_index").Int(0).Key("content_index").Int(0);
}

void ResponsesFormat::WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const {
  json.Key("logprobs");
  std::vector<TokenRecord> tokens;
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    tokens.push_back({delta.token_ids[i], &delta.logprobs[i]});
  }
  WriteLogprobList(tokens, names_, json);
}

void ResponsesFormat::WritePart(ItemState state, JsonWriter& json) const {
  const ChoiceDelta nothing;
  const ChoiceDelta& answer = state == ItemState::kDone ? answer_ : nothing;
  json.BeginObject().Key("type").String("output_text").Key("text").String(answer.message.content);
  json.Key("annotations").BeginArray().EndArray();
  WriteLogprobs(answer, json);
  json.EndObject();
}

void ResponsesFormat::WriteItem(ItemState state, JsonWriter& json) const {
  const std::string_view done = complete() ? "completed" : "incomplete";
  json.BeginObject().Key("id").String(item_id_).Key("type").String("message");
  json.Key("status").String(state == ItemState::kDone ? done : "in_progress");
  json.Key("role").String("assistant").Key("content").BeginArray();
  if (state == ItemState::kDone) WritePart(state, json);
  json.EndArray().EndObject();
}

void ResponsesFormat::WriteResponse(const std::optional<TokenUsage>& usage,
                                    JsonWriter& json) const {
  const std::string_view status =
      !usage ? "in_progress" : (complete() ? "completed" : "incomplete");
  const v1::SamplingParams& sampling = request_.chat.parameters.sampling;
  json.BeginObject().Key("id").String(header_.id).Key("object").String("response");
  json.Key("created_at").Int(header_.created).Key("status").String(status);
  json.Key("background").Bool(false).Key("error").Null().Key("incomplete_details");
  if (status == "incomplete") {
    json.BeginObject().Key("reason").String("max_output_tokens").EndObject();
  } else {
    json.Null();
  }
  json.Key("instructions").Raw(request_.instructions).Key("max_output_tokens");
  if (request_.chat.max_tokens) {
    json.Int(*request_.chat.max_tokens);
  } else {
    json.Null();
  }
  json.Key("model").String(header_.model).Key("output").BeginArray();
  if (usage) WriteItem(ItemState::kDone, json);
  json.EndArray().Key("parallel_tool_calls").Bool(true).Key("previous_response_id").Null();
  json.Key("reasoning").BeginObject().Key("effort").Raw(request_.reasoning_effort);
  json.Key("summary").Null().EndObject().Key("service_tier").Null().Key("store").Bool(false);
  json.Key("temperature").Float(sampling.temperature());
  json.Key("text").BeginObject().Key("format").BeginObject().Key("type").String("text");
  json.EndObject().EndObject().Key("tool_choice").String("auto");
  json.Key("tools").BeginArray().EndArray().Key("top_logprobs");
  json.Int(request_.chat.num_logprobs.value_or(0));
  json.Key("top_p").Float(sampling.top_p()).Key("truncation").String("disabled").Key("usage");
  if (usage) {
    json.BeginObject().Key("input_tokens").Int(usage->prompt_tokens);
    json.Key("input_tokens_details").BeginObject();
    json.Key("cached_tokens").Int(usage->cached_tokens).EndObject();
    json.Key("output_tokens").Int(usage->completion_tokens);
    json.Key("output_tokens_details").BeginObject().Key("reasoning_tokens").Int(0).EndObject();
    json.Key("total_tokens").Int(usage->prompt_tokens + usage->completion_tokens).EndObject();
  } else {
    json.Null();
  }
  json.Key("user").Raw(request_.user).Key("metadata").Raw(request_.metadata).EndObject();
}

std::string ResponsesFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  answer_ = std::move(choices.front());
  JsonWriter json;
  WriteResponse(usage, json);
  return json.Take();
}

std::vector<std::string> ResponsesFormat::FirstEvents(const std::optional<TokenUsage>&) {
  std::string events;
  for (const char* type : {"response.created", "response.in_progress"}) {
    JsonWriter json = BeginEvent(type);
    json.Key("response");
    WriteResponse(std::nullopt, json);
    EndEvent(type, std::move(json), events);
  }
  JsonWriter item = BeginEvent("response.output_item.added");
  item.Key("output_index").Int(0).Key("item");
  WriteItem(ItemState::kBegun, item);
  EndEvent("response.output_item.added", std::move(item), events);
  JsonWriter part = BeginEvent("response.content_part.added");
  WritePlace(part);
  part.Key("part");
  WritePart(ItemState::kBegun, part);
  EndEvent("response.content_part.added", std::move(part), events);
  return {std::move(events)};
}

std::string ResponsesFormat::Event(size_t, ChoiceDelta delta, const std::optional<TokenUsage>&) {
  std::string events;
  if (!delta.message.content.empty()) {
    JsonWriter json = BeginEvent("response.output_text.delta");
    WritePlace(json);
    json.Key("delta").String(delta.message.content);
    WriteLogprobs(delta, json);
    EndEvent("response.output_text.delta", std::move(json), events);
  }
  const bool finished = !delta.finish_reason.empty();
  answer_.Append(std::move(delta));
  if (finished) AppendEndOfItem(events);
  return events;
}

void ResponsesFormat::AppendEndOfItem(std::string& events) {
  JsonWriter text = BeginEvent("response.output_text.done");
  WritePlace(text);
  text.Key("text").String(answer_.message.content);
  WriteLogprobs(answer_, text);
  EndEvent("response.output_text.done", std::move(text), events);
  JsonWriter part = BeginEvent("response.content_part.done");
  WritePlace(part);
  part.Key("part");
  WritePart(ItemState::kDone, part);
  EndEvent("response.content_part.done", std::move(part), events);
  JsonWriter item = BeginEvent("response.output_item.done");
  item.Key("output_index").Int(0).Key("item");
  WriteItem(ItemState::kDone, item);
  EndEvent("response.output_item.done", std::move(item), events);
}

std::string ResponsesFormat::UsageEvent(const TokenUsage& usage) {
  const std::string_view type = complete() ? "response.completed" : "response.incomplete";
  JsonWriter json = BeginEvent(type);
  json.Key("response");
  WriteResponse(usage, json);
  std::string events;
  EndEvent(type, std::move(json), events);
  return events;
}

std::string ResponsesFormat::ErrorEvent(const absl::Status& status) {
  std::string events;
  AppendNamedEvent("error", ErrorJson(status), events);
  return events;
}

}  // namespace fathom
