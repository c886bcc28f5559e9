#include "gateway/text/json_node.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {

absl::StatusOr<std::optional<JsonNode>> JsonNode::Find(std::string_view key) const {
  ASSIGN_OR_RETURN(const simdjson::dom::object object, AsObject());
  std::optional<JsonNode> found;
  for (const auto& [name, value] : object) {
    if (name != key) continue;
    if (found.has_value()) return Member(key, value).Error("is there twice");
    found = Member(key, value);
  }
  if (found.has_value() && found->IsNull()) return std::optional<JsonNode>();
  return found;
}

absl::StatusOr<JsonNode> JsonNode::Get(std::string_view key) const {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> found, Find(key));
  if (!found.has_value()) return Member(key, element_).Error("is missing");
  return *found;
}

template <typename T>
absl::StatusOr<T> JsonNode::As(std::string_view type) const {
  T value;
  if (element_.get(value) == simdjson::SUCCESS) return value;
  return Error(absl::StrCat("is ", Shown(), ", expected ", std::string(type)));
}

absl::StatusOr<std::string_view> JsonNode::AsString() const {
  return As<std::string_view>("a string");
}
absl::StatusOr<bool> JsonNode::AsBool() const { return As<bool>("true or false"); }
absl::StatusOr<uint64_t> JsonNode::AsUint64() const {
  return As<uint64_t>("a number that is not negative");
}
absl::StatusOr<simdjson::dom::object> JsonNode::AsObject() const {
  return As<simdjson::dom::object>("an object");
}
absl::StatusOr<simdjson::dom::array> JsonNode::AsArray() const {
  return As<simdjson::dom::array>("an array");
}

absl::StatusOr<bool> JsonNode::BoolOr(std::string_view key, bool fallback) const {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> found, Find(key));
  if (!found.has_value()) return fallback;
  return found->AsBool();
}

JsonNode JsonNode::Member(std::string_view key, simdjson::dom::element value) const {
  constexpr size_t kMaxShown = 100;
  const std::string separator = place_.ends_with(".json") ? ": " : ".";
  return JsonNode(value, absl::StrCat(place_, separator, std::string(key.substr(0, kMaxShown))));
}

JsonNode JsonNode::Item(size_t index, simdjson::dom::element value) const {
  return JsonNode(value, absl::StrCat(place_, "[", index, "]"));
}

absl::Status JsonNode::Error(std::string_view problem) const {
  return absl::InvalidArgumentError(absl::StrCat(place_, " ", std::string(problem)));
}

std::string JsonNode::Shown() const {
  constexpr size_t kMaxShown = 100;
  if (element_.is_object()) return "an object";
  if (element_.is_array()) return "an array";
  std::string shown = simdjson::minify(element_);
  if (shown.size() > kMaxShown) shown = absl::StrCat(shown.substr(0, kMaxShown), "…");
  return shown;
}

}  // namespace fathom
