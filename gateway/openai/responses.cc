#include "gateway/openai/responses.h"

#include <utility>

#include "base/status_macros.h"
#include "gateway/openai/answer.h"
#include "gateway/openai/chat_completions.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/responses_format.h"

namespace fathom {

absl::StatusOr<ResponsesRequest> ResponsesHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(ResponsesRequest parsed,
                   ParseResponsesRequest(request.body, api_.defaults, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.chat.model));
  RETURN_IF_ERROR(api_.text.CheckHasChat());
  const ChatPrompt& prompt = parsed.chat.prompt;
  if (parsed.chat.num_logprobs &&
      api_.text.chat_encoder().EndsInThinking(prompt.messages, prompt.options)) {
    return InvalidParameter("include", "logprobs of an answer with thoughts are not supported");
  }
  return parsed;
}

Task<> ResponsesHandler::Handle(const HttpRequest& http_request, ResponseWriter& writer) {
  ResponseHeader header = MakeResponseHeader("resp_", http_request, api_.model.name());
  writer.notes().id = header.id;
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<ResponsesRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) {
    co_await writer.Send(ErrorResponse(request.status()));
    co_return;
  }
  const absl::StatusOr<std::vector<uint32_t>> prompt =
      co_await EncodeChatRequest(request->chat, num_bytes, api_);
  if (!prompt.ok()) {
    co_await writer.Send(ErrorResponse(prompt.status()));
    co_return;
  }
  AnswerPlan plan = PlanChatAnswer(request->chat, *prompt, header.id, api_);
  ResponsesFormat format(std::move(header), *request,
                         TokenNames(api_.text.tokenizer(), request->chat.parameters.token_names));
  api_.metrics.OnRequestAdmitted(1);
  co_await fathom::Answer(std::move(plan), api_.coordinator, api_.text.tokenizer(), format,
                          api_.text_threads, api_.metrics, writer);
}

}  // namespace fathom
