#include "gateway/openai/models.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/response_header.h"

namespace fathom {
namespace {

constexpr std::string_view kModelsPath = "/v1/models/";

void WriteModelCard(const std::string& name, const ServedModel& model, const v1::ModelInfo& info,
                    JsonWriter& json) {
  json.BeginObject().Key("id").String(name);
  json.Key("object").String("model").Key("created").Int(model.created());
  json.Key("owned_by").String("fathom").Key("root").String(model.root());
  json.Key("parent").Null().Key("max_model_len").Int(info.max_model_len());
  json.Key("permission").BeginArray().BeginObject();
  json.Key("id").String(absl::StrCat("modelperm-", RandomHex()));
  json.Key("object").String("model_permission").Key("created").Int(model.created());
  json.Key("allow_create_engine").Bool(false).Key("allow_sampling").Bool(true);
  json.Key("allow_logprobs").Bool(true).Key("allow_search_indices").Bool(false);
  json.Key("allow_view").Bool(true).Key("allow_fine_tuning").Bool(false);
  json.Key("organization").String("*").Key("group").Null().Key("is_blocking").Bool(false);
  json.EndObject().EndArray().EndObject();
}

}  // namespace

Task<> ListModelsHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  const absl::StatusOr<v1::ModelInfo> info = co_await api_.model.Info();
  if (!info.ok()) {
    co_await writer.Send(ErrorResponse(info.status()));
    co_return;
  }
  JsonWriter json;
  json.BeginObject().Key("object").String("list").Key("data").BeginArray();
  for (const std::string& name : api_.model.names()) {
    WriteModelCard(name, api_.model, *info, json);
  }
  json.EndArray().EndObject();
  Response response;
  response.body = json.Take();
  co_await writer.Send(std::move(response));
}

Task<> GetModelHandler::Handle(const HttpRequest& request, ResponseWriter& writer) {
  const std::string name = request.path.substr(kModelsPath.size());
  if (const absl::Status known = api_.model.CheckName(name); !known.ok()) {
    co_await writer.Send(ErrorResponse(known));
    co_return;
  }
  const absl::StatusOr<v1::ModelInfo> info = co_await api_.model.Info();
  if (!info.ok()) {
    co_await writer.Send(ErrorResponse(info.status()));
    co_return;
  }
  JsonWriter json;
  WriteModelCard(name, api_.model, *info, json);
  Response response;
  response.body = json.Take();
  co_await writer.Send(std::move(response));
}

}  // namespace fathom
