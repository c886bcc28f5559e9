// Statuses as OpenAI's clients see them: an HTTP status and
//   {"error":{"message":…,"type":…,"param":…|null,"code":<HTTP status>}}
//
// | status             | HTTP | type                                                             |
// | InvalidArgument    | 400  | BadRequestError, or "Bad Request" for what is no valid request   |
// | Unauthenticated    | 401  | AuthenticationError, with WWW-Authenticate                       |
// | NotFound           | 404  | NotFoundError                                                    |
// | ResourceExhausted  | 429  | TooManyRequestsError, with Retry-After                           |
// | Unavailable        | 503  | ServiceUnavailableError, with Retry-After                        |
// | DeadlineExceeded   | 503  | the same                                                         |
// | Cancelled          | 503  | the same                                                         |
// | others             | 500  | InternalServerError                                              |
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "gateway/http/response.h"

namespace fathom {

// A parameter has a value that cannot be served.
absl::Status InvalidParameter(std::string_view param, std::string_view message);

// The body is not a request at all: no JSON, a field of the wrong type, a required one missing.
absl::Status MalformedRequest(std::string_view param, std::string_view message);

// A feature that clients know from elsewhere and that would change the answer.
absl::Status NotSupportedYet(std::string_view param, std::string_view what);

absl::Status ModelNotFound(std::string_view model);

// `status` must not be ok.
Response ErrorResponse(const absl::Status& status);

// The body of it, for a stream whose HTTP status is already out.
std::string ErrorJson(const absl::Status& status);

// What the HTTP server itself refuses; the type is the status's phrase, but a 503 is Unavailable's.
Response HttpErrorResponse(int http_status, std::string_view message);

}  // namespace fathom
