// POST /v1/responses.
#pragma once

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"
#include "gateway/openai/responses_request.h"

namespace fathom {

class ResponsesHandler : public Handler {
 public:
  explicit ResponsesHandler(const Api& api) : api_(api) {}

  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<ResponsesRequest> Parse(const HttpRequest& request) const;

  Api api_;
};

}  // namespace fathom
