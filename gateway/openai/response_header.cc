#include "gateway/openai/response_header.h"

#include <ctime>

#include "absl/strings/str_cat.h"
#include "gateway/openai/json_writer.h"

namespace fathom {

ResponseHeader MakeResponseHeader(std::string_view id_prefix, const HttpRequest& request,
                                  const std::string& model) {
  return {.id = absl::StrCat(std::string(id_prefix), request.id),
          .created = std::time(nullptr),
          .model = model};
}

std::string BeginningOf(const ResponseHeader& header, std::string_view object) {
  JsonWriter json;
  json.BeginObject().Key("id").String(header.id).Key("object").String(object);
  json.Key("created").Int(header.created).Key("model").String(header.model);
  return json.Take();
}

}  // namespace fathom
