#include "gateway/openai/messages.h"

#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "gateway/openai/answer.h"
#include "gateway/openai/chat_completions.h"
#include "gateway/openai/messages_format.h"
#include "gateway/openai/messages_request.h"

namespace fathom {

absl::StatusOr<ChatRequest> MessagesHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(ChatRequest parsed,
                   ParseMessagesRequest(request.body, api_.defaults, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  RETURN_IF_ERROR(api_.text.CheckHasChat());
  return parsed;
}

Task<> MessagesHandler::Handle(const HttpRequest& http_request, ResponseWriter& writer) {
  ResponseHeader header = MakeResponseHeader("msg_", http_request, api_.model.name());
  writer.notes().id = header.id;
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<ChatRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) {
    co_await writer.Send(MessagesError(request.status(), header.id));
    co_return;
  }
  const absl::StatusOr<std::vector<uint32_t>> prompt =
      co_await EncodeChatRequest(*request, num_bytes, api_);
  if (!prompt.ok()) {
    co_await writer.Send(MessagesError(prompt.status(), header.id));
    co_return;
  }
  AnswerPlan plan = PlanChatAnswer(*request, *prompt, header.id, api_);
  MessagesFormat format(std::move(header), static_cast<int64_t>(prompt->size()));
  api_.metrics.OnRequestAdmitted(1);
  co_await fathom::Answer(std::move(plan), api_.coordinator, api_.text.tokenizer(), format,
                          api_.text_threads, api_.metrics, writer);
}

absl::StatusOr<ChatRequest> CountTokensHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(ChatRequest parsed, ParseCountTokensRequest(request.body, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  RETURN_IF_ERROR(api_.text.CheckHasChat());
  return parsed;
}

Task<> CountTokensHandler::Handle(const HttpRequest& http_request, ResponseWriter& writer) {
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<ChatRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) {
    co_await writer.Send(MessagesError(request.status(), http_request.id));
    co_return;
  }
  const absl::StatusOr<std::vector<uint32_t>> prompt =
      co_await EncodeChat(request->prompt, num_bytes, api_.text, api_.text_threads);
  if (!prompt.ok()) {
    co_await writer.Send(MessagesError(prompt.status(), http_request.id));
    co_return;
  }
  JsonWriter json;
  json.BeginObject().Key("input_tokens").Int(static_cast<int64_t>(prompt->size())).EndObject();
  Response response;
  response.body = json.Take();
  co_await writer.Send(std::move(response));
}

}  // namespace fathom
