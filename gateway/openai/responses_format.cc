#include "gateway/openai/responses_format.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "gateway/http/response.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/logprobs.h"

namespace fathom {

using Kind = AnswerItem::Kind;

ResponsesFormat::ResponsesFormat(ResponseHeader header, const ResponsesRequest& request,
                                 TokenNames names)
    : header_(std::move(header)), request_(request), names_(names) {}

JsonWriter ResponsesFormat::BeginEvent(std::string_view type) {
  JsonWriter json;
  json.BeginObject().Key("type").String(type);
  json.Key("sequence_number").Int(next_number_++);
  return json;
}

JsonWriter ResponsesFormat::BeginItemEvent(std::string_view type, const AnswerItem& item) {
  JsonWriter json = BeginEvent(type);
  json.Key("item_id").String(IdOf(item)).Key("output_index").Int(static_cast<int64_t>(item.index));
  if (item.kind() != Kind::kToolCall) json.Key("content_index").Int(0);
  return json;
}

void ResponsesFormat::EndEvent(std::string_view type, JsonWriter json) {
  json.EndObject();
  AppendNamedEvent(type, json.text(), events_);
}

std::string ResponsesFormat::IdOf(const AnswerItem& item) const {
  const std::string_view prefix = item.kind() == Kind::kReasoning ? "rs_"
                                  : item.kind() == Kind::kContent ? "msg_"
                                                                  : "fc_";
  const std::string_view id = std::string_view(header_.id).substr(header_.id.find('_') + 1);
  return absl::StrCat(std::string(prefix), std::string(id), "_", item.index);
}

void ResponsesFormat::WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const {
  json.Key("logprobs");
  std::vector<TokenRecord> tokens;
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    tokens.push_back({delta.token_ids[i], &delta.logprobs[i]});
  }
  WriteLogprobList(tokens, names_, json);
}

void ResponsesFormat::WritePart(const AnswerItem& item, std::string_view text,
                                JsonWriter& json) const {
  if (item.kind() == Kind::kReasoning) {
    json.BeginObject().Key("type").String("reasoning_text").Key("text").String(text).EndObject();
    return;
  }
  json.BeginObject().Key("type").String("output_text").Key("text").String(text);
  json.Key("annotations").BeginArray().EndArray();
  const ChoiceDelta nothing;
  WriteLogprobs(text.empty() ? nothing : tokens_, json);
  json.EndObject();
}

void ResponsesFormat::WriteItem(const AnswerItem& item, ItemState state, JsonWriter& json) const {
  const bool has_begun = state == ItemState::kBegun;
  const std::string_view status = has_begun                        ? "in_progress"
                                  : state == ItemState::kCompleted ? "completed"
                                                                   : "incomplete";
  json.BeginObject().Key("id").String(IdOf(item)).Key("type");
  if (item.kind() == Kind::kToolCall) {
    json.String("function_call").Key("status").String(status);
    json.Key("call_id").String(item.call_id).Key("name").String(item.name);
    json.Key("arguments").String(has_begun ? "" : item.text).EndObject();
    return;
  }
  if (item.kind() == Kind::kReasoning) {
    json.String("reasoning").Key("status").String(status);
    json.Key("summary").BeginArray().EndArray().Key("encrypted_content").Null();
  } else {
    json.String("message").Key("status").String(status).Key("role").String("assistant");
  }
  json.Key("content").BeginArray();
  if (!has_begun) WritePart(item, item.text, json);
  json.EndArray().EndObject();
}

ResponsesFormat::ItemState ResponsesFormat::EndOf(const AnswerItem& item) const {
  const bool is_last = item.index + 1 == items_.items().size();
  return is_last && !complete() ? ItemState::kIncomplete : ItemState::kCompleted;
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
  if (usage) {
    for (const AnswerItem& item : items_.items()) WriteItem(item, EndOf(item), json);
  }
  json.EndArray().Key("parallel_tool_calls").Bool(request_.parallel_tool_calls);
  json.Key("previous_response_id").Null();
  json.Key("reasoning").BeginObject().Key("effort").Raw(request_.reasoning_effort);
  json.Key("summary").Null().EndObject().Key("service_tier").Null().Key("store").Bool(false);
  json.Key("temperature").Float(sampling.temperature());
  json.Key("text").BeginObject().Key("format").Raw(request_.text_format);
  json.EndObject().Key("tool_choice").Raw(request_.tool_choice);
  json.Key("tools").Raw(request_.tools).Key("top_logprobs");
  json.Int(request_.chat.num_logprobs.value_or(0));
  json.Key("top_p").Float(sampling.top_p()).Key("truncation").Raw(request_.truncation);
  json.Key("usage");
  if (usage) {
    json.BeginObject().Key("input_tokens").Int(usage->prompt_tokens);
    json.Key("input_tokens_details").BeginObject();
    json.Key("cached_tokens").Int(usage->cached_tokens).EndObject();
    json.Key("output_tokens").Int(usage->completion_tokens);
    json.Key("output_tokens_details").BeginObject();
    json.Key("reasoning_tokens").Int(usage->reasoning_tokens).EndObject();
    json.Key("total_tokens").Int(usage->prompt_tokens + usage->completion_tokens).EndObject();
  } else {
    json.Null();
  }
  json.Key("user").Raw(request_.user).Key("metadata").Raw(request_.metadata).EndObject();
}

std::string ResponsesFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  tokens_ = std::move(choices.front());
  finish_reason_ = tokens_.finish_reason;
  items_.Append(tokens_.message, nullptr);
  JsonWriter json;
  WriteResponse(usage, json);
  return json.Take();
}

std::vector<std::string> ResponsesFormat::FirstEvents(const std::optional<TokenUsage>&) {
  for (const char* type : {"response.created", "response.in_progress"}) {
    JsonWriter json = BeginEvent(type);
    json.Key("response");
    WriteResponse(std::nullopt, json);
    EndEvent(type, std::move(json));
  }
  return {std::exchange(events_, "")};
}

void ResponsesFormat::AppendItemEvent(std::string_view type, const AnswerItem& item,
                                      ItemState state) {
  JsonWriter json = BeginEvent(type);
  json.Key("output_index").Int(static_cast<int64_t>(item.index)).Key("item");
  WriteItem(item, state, json);
  EndEvent(type, std::move(json));
}

void ResponsesFormat::AppendPartEvent(std::string_view type, const AnswerItem& item,
                                      std::string_view text) {
  JsonWriter json = BeginItemEvent(type, item);
  json.Key("part");
  WritePart(item, text, json);
  EndEvent(type, std::move(json));
}

void ResponsesFormat::OnBegin(const AnswerItem& item) {
  AppendItemEvent("response.output_item.added", item, ItemState::kBegun);
  if (item.kind() != Kind::kToolCall) AppendPartEvent("response.content_part.added", item, "");
}

void ResponsesFormat::OnPiece(const AnswerItem& item, std::string_view piece) {
  const std::string_view type = item.kind() == Kind::kReasoning ? "response.reasoning_text.delta"
                                : item.kind() == Kind::kContent
                                    ? "response.output_text.delta"
                                    : "response.function_call_arguments.delta";
  JsonWriter json = BeginItemEvent(type, item);
  json.Key("delta").String(piece);
  if (item.kind() == Kind::kContent) WriteLogprobs(std::exchange(new_tokens_, {}), json);
  EndEvent(type, std::move(json));
}

void ResponsesFormat::OnEnd(const AnswerItem& item) {
  const std::string_view type = item.kind() == Kind::kReasoning ? "response.reasoning_text.done"
                                : item.kind() == Kind::kContent
                                    ? "response.output_text.done"
                                    : "response.function_call_arguments.done";
  JsonWriter json = BeginItemEvent(type, item);
  if (item.kind() == Kind::kToolCall) {
    json.Key("name").String(item.name).Key("arguments").String(item.text);
  } else {
    json.Key("text").String(item.text);
  }
  if (item.kind() == Kind::kContent) WriteLogprobs(tokens_, json);
  EndEvent(type, std::move(json));
  if (item.kind() != Kind::kToolCall) {
    AppendPartEvent("response.content_part.done", item, item.text);
  }
  AppendItemEvent("response.output_item.done", item, EndOf(item));
}

std::string ResponsesFormat::Event(size_t, const ChoiceDelta& delta,
                                   const std::optional<TokenUsage>&) {
  if (!delta.logprobs.empty()) {
    ChoiceDelta tokens = delta;
    tokens.message = {};  // items_ has it
    tokens_.Append(tokens);
    new_tokens_.Append(std::move(tokens));
  }
  items_.Append(delta.message, this);
  finish_reason_ = delta.finish_reason;  // of the last item alone
  if (!finish_reason_.empty()) items_.Finish(this);
  return std::exchange(events_, "");
}

std::string ResponsesFormat::UsageEvent(const TokenUsage& usage) {
  const std::string_view type = complete() ? "response.completed" : "response.incomplete";
  JsonWriter json = BeginEvent(type);
  json.Key("response");
  WriteResponse(usage, json);
  EndEvent(type, std::move(json));
  return std::exchange(events_, "");
}

std::string ResponsesFormat::ErrorEvent(const absl::Status& status) {
  AppendNamedEvent("error", ErrorJson(status), events_);
  return std::exchange(events_, "");
}

}  // namespace fathom
