#include "gateway/openai/server_status.h"

#include <utility>

#include "gateway/openai/errors.h"
#include "gateway/openai/json_writer.h"

namespace fathom {

Task<> HealthHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  absl::Status health = co_await api_.coordinator.CheckHealth();
  Response response;
  if (health.ok()) {
    response.content_type = "";
  } else {
    // Whatever the reason (no connection, no answer in time, no such service), it is the same for
    // who asks.
    response = ErrorResponse(absl::UnavailableError(std::string(health.message())));
  }
  co_await writer.Send(std::move(response));
}

Task<> LiveHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  Response response;
  response.content_type = "";
  co_await writer.Send(std::move(response));
}

Task<> LoadHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  JsonWriter json;
  json.BeginObject().Key("server_load").Int(api_.metrics.num_in_flight()).EndObject();
  Response response;
  response.body = json.Take();
  co_await writer.Send(std::move(response));
}

Task<> VersionHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  JsonWriter json;
  json.BeginObject().Key("version").String(api_.version).EndObject();
  Response response;
  response.body = json.Take();
  co_await writer.Send(std::move(response));
}

Task<> MetricsHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  const absl::StatusOr<std::string> engine = co_await api_.coordinator.GetMetrics();
  Response response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = api_.metrics.Text();
  if (engine.ok()) response.body += *engine;
  co_await writer.Send(std::move(response));
}

}  // namespace fathom
