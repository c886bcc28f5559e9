// What all responses and chunks of one request begin with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "gateway/http/http_request.h"
#include "gateway/http/request_id.h"

namespace fathom {

struct ResponseHeader {
  std::string id;       // "cmpl-…", "chatcmpl-…"
  int64_t created = 0;  // seconds since 1970
  std::string model;
};

// The id is the prefix and the request's own (http/request_id.h).
ResponseHeader MakeResponseHeader(std::string_view id_prefix, const HttpRequest& request,
                                  const std::string& model);

// {"id":…,"object":…,"created":…,"model":… for a JsonWriter to go on with.
std::string BeginningOf(const ResponseHeader& header, std::string_view object);

}  // namespace fathom
