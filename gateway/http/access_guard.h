// Who may ask for what. Asked as soon as the head of a request is here, so that nobody who may not
// ask makes the server read a body. I/O thread only.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "gateway/http/http_request.h"
#include "gateway/http/response.h"

namespace fathom {

class AccessGuard {
 public:
  virtual ~AccessGuard() = default;

  struct Verdict {
    std::optional<Response> refusal;  // the connection closes after it
    std::string caller;               // who asks, for the log; may be empty
  };

  // `head` has no body yet; `pattern` is the path of its route, "" when there is none.
  virtual Verdict Check(const HttpRequest& head, std::string_view pattern) = 0;
};

}  // namespace fathom
