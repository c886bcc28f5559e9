#include "gateway/http/response.h"

#include <ctime>

#include "absl/strings/str_cat.h"
#include "boost/beast/http/status.hpp"

namespace fathom {
namespace {

// "Sun, 06 Nov 1994 08:49:37 GMT" (RFC 7231 §7.1.1.1); made once a second.
const std::string& DateNow() {
  thread_local std::time_t made_at = 0;
  thread_local std::string date;
  const std::time_t now = std::time(nullptr);
  if (now != made_at) {
    std::tm utc;
    gmtime_r(&now, &utc);
    char text[32];
    const size_t size = std::strftime(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &utc);
    date.assign(text, size);
    made_at = now;
  }
  return date;
}

}  // namespace

std::string_view PhraseOf(int status) {
  const boost::beast::string_view phrase =
      boost::beast::http::obsolete_reason(boost::beast::http::int_to_status(status));
  return {phrase.data(), phrase.size()};
}

void AppendNamedEvent(std::string_view name, std::string_view payload, std::string& events) {
  for (const std::string_view part :
       {std::string_view("event: "), name, std::string_view("\ndata: "), payload,
        std::string_view("\n\n")}) {
    events += part;
  }
}

std::string HeadOf(const Response& response, const Framing& framing, Persistence persistence,
                   std::string_view request_id, const ResponseHeaders& more) {
  std::string head =
      absl::StrCat("HTTP/1.1 ", response.status, " ", std::string(PhraseOf(response.status)),
                   "\r\nDate: ", DateNow(), "\r\nServer: fathom\r\n");
  if (!request_id.empty()) {
    absl::StrAppend(&head, "X-Request-Id: ", std::string(request_id), "\r\n");
  }
  if (!response.content_type.empty()) {
    absl::StrAppend(&head, "Content-Type: ", response.content_type, "\r\n");
  }
  switch (framing.kind) {
    case Framing::Kind::kContentLength:
      absl::StrAppend(&head, "Content-Length: ", framing.content_length, "\r\n");
      break;
    case Framing::Kind::kChunked:
      absl::StrAppend(&head, "Transfer-Encoding: chunked\r\n");
      break;
    case Framing::Kind::kUntilClose:
      break;
  }
  absl::StrAppend(&head,
                  "Connection: ", persistence == Persistence::kKeepAlive ? "keep-alive" : "close",
                  "\r\n");
  for (const ResponseHeaders* headers : {&response.headers, &more}) {
    for (const auto& [name, value] : *headers) absl::StrAppend(&head, name, ": ", value, "\r\n");
  }
  absl::StrAppend(&head, "\r\n");
  return head;
}

}  // namespace fathom
