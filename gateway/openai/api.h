// What the routes of the API share, and the table of routes.
//
// | GET  /v1/models, /v1/models/{id}        | models.h                |
// | POST /v1/completions                    | completions.h           |
// | POST /v1/chat/completions               | chat_completions.h      |
// | POST /v1/responses                      | responses.h             |
// | POST /v1/messages, …/count_tokens       | messages.h              |
// | POST /tokenize, /detokenize             | tokenize.h              |
// | GET  /tokenizer_info                    |                         |
// | GET  /health, /ready, /ping, /live,     | server_status.h         |
// |      /load, /version, /metrics          |                         |
// | GET  /                                  | status_page.h           |
#pragma once

#include <string>

#include "gateway/http/background_threads.h"
#include "gateway/http/router.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/generation_config.h"
#include "gateway/openai/load_history.h"
#include "gateway/openai/metrics.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/served_model.h"
#include "gateway/rpc/coordinator_client.h"

namespace fathom {

// One of each for the process; all outlive the handlers.
struct Api {
  CoordinatorClient& coordinator;
  ServedModel& model;
  const ModelText& text;
  const SamplingDefaults& defaults;
  const ApiLimits& limits;
  BackgroundThreads& text_threads;
  GatewayMetrics& metrics;
  const LoadHistory& load_history;
  std::string version;
};

void AddRoutes(const Api& api, Router& router);

// MalformedRequest unless the body is declared to be JSON.
absl::Status CheckJsonContent(const HttpRequest& request);

}  // namespace fathom
