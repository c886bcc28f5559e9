// What the routes of the API share, and the table of routes.
//
// | GET  /v1/models, /v1/models/{id}        | models.h                |
// | POST /v1/completions                    | completions.h           |
// | POST /v1/chat/completions               | chat_completions.h      |
// | POST /tokenize, /detokenize             | tokenize.h              |
// | GET  /health, /ping, /live, /version,   | server_status.h         |
// |      /metrics                           |                         |
#pragma once

#include <string>

#include "gateway/http/background_threads.h"
#include "gateway/http/router.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/generation_config.h"
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
  std::string version;
};

void AddRoutes(const Api& api, Router& router);

// MalformedRequest unless the body is declared to be JSON.
absl::Status CheckJsonContent(const HttpRequest& request);

}  // namespace fathom
