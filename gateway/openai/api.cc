#include "gateway/openai/api.h"

#include <memory>

#include "absl/strings/ascii.h"
#include "gateway/openai/chat_completions.h"
#include "gateway/openai/completions.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/messages.h"
#include "gateway/openai/models.h"
#include "gateway/openai/responses.h"
#include "gateway/openai/server_status.h"
#include "gateway/openai/status_page.h"
#include "gateway/openai/tokenize.h"

namespace fathom {

void AddRoutes(const Api& api, Router& router) {
  router.Add("GET", "/v1/models", std::make_shared<ListModelsHandler>(api));
  router.Add("GET", "/v1/models/", std::make_shared<GetModelHandler>(api));
  router.Add("POST", "/v1/completions", std::make_shared<CompletionsHandler>(api));
  router.Add("POST", "/v1/chat/completions", std::make_shared<ChatCompletionsHandler>(api));
  router.Add("POST", "/v1/responses", std::make_shared<ResponsesHandler>(api));
  router.Add("POST", "/v1/messages", std::make_shared<MessagesHandler>(api));
  router.Add("POST", "/v1/messages/count_tokens", std::make_shared<CountTokensHandler>(api));
  router.Add("POST", "/tokenize", std::make_shared<TokenizeHandler>(api));
  router.Add("POST", "/detokenize", std::make_shared<DetokenizeHandler>(api));
  router.Add("GET", "/tokenizer_info", std::make_shared<TokenizerInfoHandler>(api));
  const auto health = std::make_shared<HealthHandler>(api);
  router.Add("GET", "/health", health);
  router.Add("GET", "/ready", health);
  router.Add("GET", "/ping", health);
  router.Add("POST", "/ping", health);
  router.Add("GET", "/live", std::make_shared<LiveHandler>());
  router.Add("GET", "/load", std::make_shared<LoadHandler>(api));
  router.Add("GET", "/", std::make_shared<StatusPageHandler>(api));
  router.Add("GET", "/version", std::make_shared<VersionHandler>(api));
  router.Add("GET", "/metrics", std::make_shared<MetricsHandler>(api));
}

absl::Status CheckJsonContent(const HttpRequest& request) {
  std::string type(request.Header("content-type"));
  type = type.substr(0, type.find(';'));
  absl::StripAsciiWhitespace(&type);
  absl::AsciiStrToLower(&type);
  if (type == "application/json") return absl::OkStatus();
  return MalformedRequest("", "Unsupported Media Type: Only 'application/json' is allowed");
}

}  // namespace fathom
