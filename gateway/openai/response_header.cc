#include "gateway/openai/response_header.h"

#include <ctime>

#include "absl/strings/str_cat.h"

namespace fathom {

ResponseHeader MakeResponseHeader(std::string_view id_prefix, const HttpRequest& request,
                                  const std::string& model) {
  return {.id = absl::StrCat(std::string(id_prefix), request.id),
          .created = std::time(nullptr),
          .model = model};
}

}  // namespace fathom
