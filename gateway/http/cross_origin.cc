#include "gateway/http/cross_origin.h"

#include <algorithm>
#include <cctype>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace fathom {
namespace {

constexpr char kAny[] = "*";
constexpr char kMethods[] = "GET, HEAD, POST";  // of all routes together
constexpr char kSecondsToRemember[] = "600";
// What a page may read of an answer besides its body, length and type.
constexpr char kReadableHeaders[] = "X-Request-Id, Retry-After";

bool Contains(const std::vector<std::string>& words, std::string_view word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// RFC 9110 §5.6.2.
bool IsToken(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string::npos;
  });
}

bool IsOrigin(std::string_view text) {
  if (text == kAny || text == "null") return true;
  const size_t end = text.find("://");
  if (end == std::string_view::npos || !IsToken(text.substr(0, end))) return false;
  const std::string_view host = text.substr(end + 3);
  return !host.empty() && std::all_of(host.begin(), host.end(), [](unsigned char c) {
    return (std::isalnum(c) != 0 && std::isupper(c) == 0) ||
           std::string_view("-.:[]_").find(c) != std::string::npos;
  });
}

std::vector<std::string> Listed(std::string_view header) {
  return absl::StrSplit(std::string(header), absl::ByAnyChar(", \t"), absl::SkipEmpty());
}

}  // namespace

CrossOriginPolicy::CrossOriginPolicy(CrossOriginOptions options)
    : options_(std::move(options)),
      any_origin_(Contains(options_.origins, kAny)),
      any_header_(Contains(options_.headers, kAny)) {}

absl::Status CrossOriginPolicy::Check(const CrossOriginOptions& options) {
  for (const std::string& origin : options.origins) {
    if (IsOrigin(origin)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--allowed-origins: '", origin,
                     "' is no origin, expected the like of https://app.example or "
                     "http://localhost:3000, in lower case and without a path, or *"));
  }
  for (const auto& [flag, words] : {std::pair("--allowed-methods", &options.methods),
                                    std::pair("--allowed-headers", &options.headers)}) {
    for (const std::string& word : *words) {
      if (IsToken(word)) continue;
      return absl::InvalidArgumentError(absl::StrCat(flag, ": '", word, "' is no name"));
    }
  }
  for (const std::string& method : options.methods) {
    if (absl::AsciiStrToUpper(method) == method) continue;
    return absl::InvalidArgumentError(absl::StrCat("--allowed-methods: '", method,
                                                   "' is no method, expected the like of ",
                                                   absl::AsciiStrToUpper(method), ": in capitals"));
  }
  if (options.credentials && Contains(options.origins, kAny)) {
    return absl::InvalidArgumentError(
        "--allow-credentials would let every web page use what its visitors' browsers know: name "
        "the pages in --allowed-origins instead of *");
  }
  return absl::OkStatus();
}

bool CrossOriginPolicy::Allows(std::string_view origin) const {
  return any_origin_ || Contains(options_.origins, origin);
}

ResponseHeaders CrossOriginPolicy::HeadersFor(const HttpRequest& request) const {
  if (options_.origins.empty()) return {};
  ResponseHeaders headers;
  if (!any_origin_) headers.emplace_back("Vary", "Origin");
  const std::string_view origin = request.Header("origin");
  if (origin.empty() || !Allows(origin)) return headers;
  headers.emplace_back("Access-Control-Allow-Origin", any_origin_ ? kAny : std::string(origin));
  headers.emplace_back("Access-Control-Expose-Headers", kReadableHeaders);
  if (options_.credentials) headers.emplace_back("Access-Control-Allow-Credentials", "true");
  return headers;
}

bool CrossOriginPolicy::IsPreflight(const HttpRequest& request) const {
  return !options_.origins.empty() && request.method == "OPTIONS" &&
         !request.Header("origin").empty() &&
         !request.Header("access-control-request-method").empty();
}

std::optional<std::string> CrossOriginPolicy::RefusalOf(const HttpRequest& preflight) const {
  if (!Allows(preflight.Header("origin"))) return "this origin is not among --allowed-origins";
  const std::string_view method = preflight.Header("access-control-request-method");
  if (!Contains(options_.methods, kAny) && !Contains(options_.methods, method)) {
    return "this method is not among --allowed-methods";
  }
  for (const std::string& name : Listed(preflight.Header("access-control-request-headers"))) {
    const bool is_allowed =
        any_header_ || std::any_of(options_.headers.begin(), options_.headers.end(),
                                   [&](const std::string& allowed) {
                                     return absl::EqualsIgnoreCase(allowed, name);
                                   });
    if (!is_allowed || !IsToken(name)) return "a header is not among --allowed-headers";
  }
  return std::nullopt;
}

Response CrossOriginPolicy::AnswerTo(const HttpRequest& preflight) const {
  Response response;
  response.status = 204;
  response.content_type = "";
  const bool any_method = Contains(options_.methods, kAny);
  response.headers.emplace_back("Access-Control-Allow-Methods",
                                any_method ? kMethods : absl::StrJoin(options_.methods, ", "));
  // "*" in an answer would leave Authorization out.
  const std::vector<std::string> headers =
      any_header_ ? Listed(preflight.Header("access-control-request-headers")) : options_.headers;
  if (!headers.empty()) {
    response.headers.emplace_back("Access-Control-Allow-Headers", absl::StrJoin(headers, ", "));
  }
  response.headers.emplace_back("Access-Control-Max-Age", kSecondsToRemember);
  return response;
}

}  // namespace fathom
