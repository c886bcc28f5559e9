// A whole response, and the bytes of its head.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fathom {

using ResponseHeaders = std::vector<std::pair<std::string, std::string>>;

struct Response {
  int status = 200;
  std::string content_type = "application/json";
  ResponseHeaders headers;  // besides those that HeadOf writes
  std::string body;
};

// How the server words its own refusals (a malformed head, an unknown path). The API that is
// served knows what its clients expect.
using ErrorFormatter = std::function<Response(int status, std::string_view message)>;

enum class Persistence { kKeepAlive, kClose };

// How the end of the body is told.
struct Framing {
  enum class Kind { kContentLength, kChunked, kUntilClose };
  Kind kind = Kind::kContentLength;
  uint64_t content_length = 0;
};

// The status line and headers up to and with the empty line: Date, Server, X-Request-Id unless it
// is empty, Content-Type, framing, Connection, the response's own and `more`.
std::string HeadOf(const Response& response, const Framing& framing, Persistence persistence,
                   std::string_view request_id, const ResponseHeaders& more);

// Appends an event of a text/event-stream that has a name: `event: NAME`, `data: PAYLOAD`.
void AppendNamedEvent(std::string_view name, std::string_view payload, std::string& events);

// The phrase that goes with a status: "Not Found".
std::string_view PhraseOf(int status);

}  // namespace fathom
