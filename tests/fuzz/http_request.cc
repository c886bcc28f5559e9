// Any bytes on a connection: a request or a refusal, the same however the bytes arrive, and never
// more kept than the limits allow.
//
// The first byte says how many bytes arrive at a time.
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "gateway/http/request_parser.h"

namespace fathom {
namespace {

constexpr RequestLimits kLimits = {
    .head_bytes = 1024, .fields = 16, .target_bytes = 128, .body_bytes = 512};

struct Outcome {
  int status = 0;  // 0: incomplete, 200: whole, else the refusal's
  size_t taken_bytes = 0;
  std::string method, path, query, body;

  bool operator==(const Outcome&) const = default;
};

Outcome Parse(std::string_view bytes, size_t piece_bytes) {
  RequestParser parser(kLimits);
  Outcome outcome;
  std::string waiting;
  size_t arrived = 0;
  while (!parser.done() && !parser.problem() && arrived < bytes.size()) {
    waiting += bytes.substr(arrived, piece_bytes);
    arrived = std::min(arrived + piece_bytes, bytes.size());
    const size_t taken = parser.Parse(waiting);
    CHECK_LE(taken, waiting.size());
    outcome.taken_bytes += taken;
    waiting.erase(0, taken);
    CHECK_LE(parser.request().body.size(), kLimits.body_bytes);
    if (!parser.problem() && !parser.done()) CHECK_LE(waiting.size(), kLimits.head_bytes);
  }
  outcome.status = parser.problem() ? parser.problem()->status : parser.done() ? 200 : 0;
  if (outcome.status != 200) {
    outcome.taken_bytes = 0;  // of what is refused nobody asks
    return outcome;
  }
  const HttpRequest& request = parser.request();
  CHECK(request.path.starts_with('/') || (request.path == "*" && request.method == "OPTIONS"));
  CHECK_LE(request.headers.size(), kLimits.fields);
  outcome.method = request.method;
  outcome.path = request.path;
  outcome.query = request.query;
  outcome.body = request.body;
  return outcome;
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const size_t piece_bytes = 1 + data[0] % 64;
  CHECK(fathom::Parse(bytes, bytes.size()) == fathom::Parse(bytes, piece_bytes));
  return 0;
}
