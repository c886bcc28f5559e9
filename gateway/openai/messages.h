// POST /v1/messages and POST /v1/messages/count_tokens.
#pragma once

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"
#include "gateway/openai/chat_request.h"

namespace fathom {

class MessagesHandler : public Handler {
 public:
  explicit MessagesHandler(const Api& api) : api_(api) {}

  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<ChatRequest> Parse(const HttpRequest& request) const;

  Api api_;
};

// To {"input_tokens": N}.
class CountTokensHandler : public Handler {
 public:
  explicit CountTokensHandler(const Api& api) : api_(api) {}

  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<ChatRequest> Parse(const HttpRequest& request) const;

  Api api_;
};

}  // namespace fathom
