// Which web pages may let their visitors' browsers ask this server (CORS), and the headers that say
// so. Without any, browsers let no page of another origin read an answer or send JSON.
//
// Source: Fetch Standard, "CORS protocol"; vLLM's flags --allowed-origins and the like, which are
// Starlette's CORSMiddleware.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gateway/http/http_request.h"
#include "gateway/http/response.h"

namespace fathom {

struct CrossOriginOptions {
  // "https://app.example", "http://localhost:3000"; "*" among them: any. Empty: none.
  std::vector<std::string> origins;
  std::vector<std::string> methods = {"*"};  // "*": all that there are
  std::vector<std::string> headers = {"*"};  // "*": whichever a page asks for
  bool credentials = false;                  // pages may send what the browser knows of the user
};

class CrossOriginPolicy {
 public:
  explicit CrossOriginPolicy(CrossOriginOptions options);

  // InvalidArgument: an origin that no browser sends (a path, no scheme), a method or header that
  // is no token, a method in small letters (methods are told apart by case), or credentials for
  // pages of any origin.
  static absl::Status Check(const CrossOriginOptions& options);

  // The headers of every response to `request`.
  ResponseHeaders HeadersFor(const HttpRequest& request) const;

  // Whether a browser asks if a page may ask; that comes without keys.
  bool IsPreflight(const HttpRequest& request) const;
  // Why the page may not; nullopt: it may, and AnswerTo says what.
  std::optional<std::string> RefusalOf(const HttpRequest& preflight) const;
  Response AnswerTo(const HttpRequest& preflight) const;

 private:
  bool Allows(std::string_view origin) const;

  const CrossOriginOptions options_;
  const bool any_origin_;
  const bool any_header_;
};

}  // namespace fathom
