// POST /v1/completions.
#pragma once

#include <cstdint>
#include <vector>

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"
#include "gateway/openai/completion_request.h"
#include "gateway/openai/response_header.h"

namespace fathom {

class CompletionsHandler : public Handler {
 public:
  explicit CompletionsHandler(const Api& api) : api_(api) {}

  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  // What can be known without the coordinator.
  absl::StatusOr<CompletionRequest> Parse(const HttpRequest& request) const;

  // The token ids of every prompt, checked against the model's vocabulary and length.
  // Adds the tokens of bad words to the request.
  Task<absl::StatusOr<std::vector<std::vector<uint32_t>>>> EncodePrompts(CompletionRequest& request,
                                                                         size_t num_bytes);

  Task<> Answer(const CompletionRequest& request, std::vector<std::vector<uint32_t>> prompts,
                ResponseHeader header, ResponseWriter& writer);

  Api api_;
};

}  // namespace fathom
