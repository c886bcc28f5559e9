// GET /v1/models and GET /v1/models/{id}.
#pragma once

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"

namespace fathom {

class ListModelsHandler : public Handler {
 public:
  explicit ListModelsHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

class GetModelHandler : public Handler {
 public:
  explicit GetModelHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

}  // namespace fathom
