// POST /v1/chat/completions.
#pragma once

#include "gateway/http/background_threads.h"
#include "gateway/http/handler.h"
#include "gateway/openai/answer.h"
#include "gateway/openai/api.h"
#include "gateway/openai/chat_request.h"
#include "gateway/openai/response_header.h"

namespace fathom {

class ChatCompletionsHandler : public Handler {
 public:
  explicit ChatCompletionsHandler(const Api& api) : api_(api) {}

  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  // What can be known without the coordinator.
  absl::StatusOr<ChatRequest> Parse(const HttpRequest& request) const;

  Task<> Answer(const ChatRequest& request, std::vector<uint32_t> prompt, ResponseHeader header,
                ResponseWriter& writer);

  Api api_;
};

// Of a chat, in whatever dialect it came: the prompt's token ids, checked against the model's
// vocabulary and length. Adds the tokens of bad words to the request. `num_bytes`: what it came as.
Task<absl::StatusOr<std::vector<uint32_t>>> EncodeChatRequest(ChatRequest& request,
                                                              size_t num_bytes, const Api& api);

// How to answer it. `id` is that of the response.
AnswerPlan PlanChatAnswer(const ChatRequest& request, const std::vector<uint32_t>& prompt,
                          const std::string& id, const Api& api);

// The token ids of a chat, on the text threads. CheckHasChat must be ok.
Task<absl::StatusOr<std::vector<uint32_t>>> EncodeChat(const ChatPrompt& prompt, size_t num_bytes,
                                                       const ModelText& text,
                                                       BackgroundThreads& text_threads);

}  // namespace fathom
