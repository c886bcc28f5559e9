#include "gateway/openai/errors.h"

#include <optional>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "gateway/openai/json_writer.h"
#include "proto/retry_after.h"

namespace fathom {
namespace {

// Payloads of a status.
constexpr char kParam[] = "fathom/param";
constexpr char kMalformed[] = "fathom/malformed";

struct ErrorKind {
  int http_status;
  std::string_view type;
};

ErrorKind KindOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      if (status.GetPayload(kMalformed)) return {400, "Bad Request"};
      return {400, "BadRequestError"};
    case absl::StatusCode::kUnauthenticated:
      return {401, "AuthenticationError"};
    case absl::StatusCode::kNotFound:
      return {404, "NotFoundError"};
    case absl::StatusCode::kResourceExhausted:
      return {429, "TooManyRequestsError"};
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:  // by the coordinator: what we cancel is not reported
      return {503, "ServiceUnavailableError"};
    default:
      return {500, "InternalServerError"};
  }
}

std::string BodyOf(std::string_view message, std::string_view type,
                   const std::optional<std::string>& param, int http_status) {
  JsonWriter json;
  json.BeginObject().Key("error").BeginObject();
  json.Key("message").String(message);
  json.Key("type").String(type);
  json.Key("param");
  if (param) {
    json.String(*param);
  } else {
    json.Null();
  }
  json.Key("code").Int(http_status);
  json.EndObject().EndObject();
  return json.Take();
}

}  // namespace

absl::Status InvalidParameter(std::string_view param, std::string_view message) {
  absl::Status status = absl::InvalidArgumentError(std::string(message));
  if (!param.empty()) status.SetPayload(kParam, absl::Cord(std::string(param)));
  return status;
}

absl::Status MalformedRequest(std::string_view param, std::string_view message) {
  absl::Status status = InvalidParameter(param, message);
  status.SetPayload(kMalformed, absl::Cord());
  return status;
}

absl::Status NotSupportedYet(std::string_view param, std::string_view what) {
  return InvalidParameter(param, absl::StrCat(std::string(what), " is not supported yet"));
}

absl::Status ModelNotFound(std::string_view model) {
  absl::Status status =
      absl::NotFoundError(absl::StrCat("The model `", std::string(model), "` does not exist."));
  status.SetPayload(kParam, absl::Cord("model"));
  return status;
}

std::string ErrorJson(const absl::Status& status) {
  const ErrorKind kind = KindOf(status);
  std::optional<std::string> param;
  if (const auto payload = status.GetPayload(kParam)) param = std::string(*payload);
  return BodyOf(std::string(status.message()), kind.type, param, kind.http_status);
}

Response ErrorResponse(const absl::Status& status) {
  Response response;
  response.status = KindOf(status).http_status;
  response.body = ErrorJson(status);
  if (response.status == 429 || response.status == 503) {
    response.headers.emplace_back("Retry-After", absl::StrCat(RetryAfterOf(status).value_or(1)));
  }
  return response;
}

Response HttpErrorResponse(int http_status, std::string_view message) {
  if (http_status == 503) return ErrorResponse(absl::UnavailableError(std::string(message)));
  Response response;
  response.status = http_status;
  response.body = BodyOf(message, PhraseOf(http_status), std::nullopt, http_status);
  return response;
}

}  // namespace fathom
