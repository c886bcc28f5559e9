// A request as a handler sees it: read whole, checked, its target decoded.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fathom {

struct HttpRequest {
  std::string id;      // request_id.h
  std::string method;  // as sent: GET, POST, …
  std::string path;    // percent-decoded, without the query; begins with '/'
  std::string query;   // after the first '?', as sent
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  std::string body;

  // The first header of that lower-case name, or "".
  std::string_view Header(std::string_view name) const {
    for (const auto& [header, value] : headers) {
      if (header == name) return value;
    }
    return {};
  }
};

}  // namespace fathom
