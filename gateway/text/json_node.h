// A value in a JSON file together with its place, so that every complaint says where.
//
// Not a general JSON library: what the two tokenizer files need. Views live as long as the
// simdjson parser does. Thread-safe for reading.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "simdjson.h"

namespace fathom {

class JsonNode {
 public:
  // `place` is for messages: the file, then the path, such as `tokenizer.json: model.vocab`.
  JsonNode(simdjson::dom::element element, std::string place)
      : element_(element), place_(std::move(place)) {}

  const std::string& place() const { return place_; }
  bool IsNull() const { return element_.is_null(); }
  bool IsString() const { return element_.is_string(); }
  bool IsArray() const { return element_.is_array(); }

  // The member `key`; nullopt when it is absent or null. InvalidArgument when this is not an
  // object or has the key twice.
  absl::StatusOr<std::optional<JsonNode>> Find(std::string_view key) const;

  // The same, where absent is InvalidArgument too.
  absl::StatusOr<JsonNode> Get(std::string_view key) const;

  // The value as a type. InvalidArgument when it is another.
  absl::StatusOr<std::string_view> AsString() const;
  absl::StatusOr<bool> AsBool() const;
  absl::StatusOr<uint64_t> AsUint64() const;
  absl::StatusOr<simdjson::dom::object> AsObject() const;
  absl::StatusOr<simdjson::dom::array> AsArray() const;

  // The boolean member `key`, or `fallback` when it is absent or null.
  absl::StatusOr<bool> BoolOr(std::string_view key, bool fallback) const;

  JsonNode Member(std::string_view key, simdjson::dom::element value) const;
  JsonNode Item(size_t index, simdjson::dom::element value) const;

  // InvalidArgument: the place, then `problem`.
  absl::Status Error(std::string_view problem) const;

  // "is \"x\"" for what the value is, shortened, for messages.
  std::string Shown() const;

 private:
  template <typename T>
  absl::StatusOr<T> As(std::string_view type) const;

  simdjson::dom::element element_;
  std::string place_;
};

}  // namespace fathom
