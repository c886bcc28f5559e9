// JSON the way Python prints it: json.dumps(value, ensure_ascii=False).
//
// Chat templates print tools with it, and models know them so: ", " and ": " between, keys in the
// order of the text, a key that is given twice at its first place with its last value, numbers as
// Python's repr. Thread-safe (pure functions).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "simdjson.h"

namespace fathom {

std::string PythonJson(simdjson::dom::element value);

// A member of an object: a string's own characters, or the JSON of anything else.
struct JsonMember {
  std::string key;
  bool is_string = false;
  std::string value;
};

// The members of the object that `text` is. InvalidArgument when it is none.
absl::StatusOr<std::vector<JsonMember>> ReadJsonMembers(std::string_view text);

bool IsJson(std::string_view text);

// Appends `text` as the inside of a JSON string, without the quotes. Cut anywhere between
// characters, the pieces joined are what the whole gives.
void AppendJsonEscaped(std::string_view text, std::string& json);

}  // namespace fathom
