// Reads the fields of a JSON object from a client, each with its type checked.
//
// An absent field and one that is null are the same: the target keeps its value. A field of the
// wrong type is MalformedRequest naming it. Unknown fields are nobody's business. When a key is
// given twice the last one counts, as in Python.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "simdjson.h"

namespace fathom {

// Owns what the elements of a parsed text refer to.
class JsonDocument {
 public:
  // MalformedRequest when `text` is not one JSON value of UTF-8, or nests deeper than `max_depth`.
  static absl::StatusOr<JsonDocument> Parse(std::string_view text, size_t max_depth);

  simdjson::dom::element root() const { return root_; }

 private:
  std::unique_ptr<simdjson::dom::parser> parser_;
  simdjson::dom::element root_;
};

class JsonFields {
 public:
  // `name` says in errors which object it is; "" for the request itself.
  static absl::StatusOr<JsonFields> Of(simdjson::dom::element object, std::string name);

  // nullopt when absent or null.
  std::optional<simdjson::dom::element> Find(std::string_view key) const;

  absl::Status Read(std::string_view key, bool& value) const;
  absl::Status Read(std::string_view key, int64_t& value) const;
  absl::Status Read(std::string_view key, std::optional<int64_t>& value) const;
  absl::Status Read(std::string_view key, std::optional<double>& value) const;
  absl::Status Read(std::string_view key, std::optional<std::string>& value) const;

  // `strings` gains those of a list, `token_ids` those of `list`, an element of the field or
  // itself.
  absl::Status ReadStrings(std::string_view key, std::vector<std::string>& strings,
                           std::string_view expected = "a list of strings") const;
  absl::Status ReadTokenIds(std::string_view key, simdjson::dom::array list,
                            std::vector<uint32_t>& token_ids,
                            std::string_view expected = "a list of token ids") const;

  // "stream_options.include_usage"
  std::string NameOf(std::string_view key) const;

  // MalformedRequest: "KEY must be EXPECTED, got a string."
  absl::Status WrongType(std::string_view key, std::string_view expected) const;

 private:
  std::string name_;
  absl::flat_hash_map<std::string_view, simdjson::dom::element> fields_;
};

// An integer, also when written 1.0; nullopt for anything else or beyond int64.
std::optional<int64_t> AsInteger(simdjson::dom::element element);

// Whether it is null, false, "", [], {} or 0: what clients send for what they do not ask for.
bool SaysNothing(simdjson::dom::element element);

// "a string", "null", …
std::string_view TypeNameOf(simdjson::dom::element element);

}  // namespace fathom
