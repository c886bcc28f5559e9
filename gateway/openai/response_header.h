// What all responses and chunks of one request begin with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "gateway/http/http_request.h"

namespace fathom {

struct ResponseHeader {
  std::string id;       // "cmpl-" or "chatcmpl-" and 32 hexadecimal digits
  int64_t created = 0;  // seconds since 1970
  std::string model;
};

// The client's X-Request-Id follows the prefix when it is a sensible label (at most 64 letters,
// digits, '-', '_', '.'), else 128 random bits do. It names the request in logs, nothing else.
ResponseHeader MakeResponseHeader(std::string_view id_prefix, const HttpRequest& request,
                                  const std::string& model);

// 32 hexadecimal digits.
std::string RandomHex();

}  // namespace fathom
