#include "gateway/openai/json_fields.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gateway/openai/errors.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

}  // namespace

absl::StatusOr<JsonDocument> JsonDocument::Parse(std::string_view text, size_t max_depth) {
  JsonDocument document;
  document.parser_ = std::make_unique<dom::parser>();
  simdjson::error_code error = document.parser_->allocate(text.size(), max_depth);
  if (!error) {
    error = document.parser_->parse(text.data(), text.size(), /*realloc_if_needed=*/true)
                .get(document.root_);
  }
  if (error == simdjson::DEPTH_ERROR) {
    return MalformedRequest(
        "", absl::StrCat("The request's JSON is nested deeper than ", max_depth, " levels."));
  }
  if (error == simdjson::NUMBER_ERROR) {
    return MalformedRequest(
        "", "The request's body is not valid JSON, or has a number beyond 64 bits.");
  }
  if (error == simdjson::STRING_ERROR) {
    return MalformedRequest(
        "",
        "The request's body is not valid JSON: a string has an unknown escape, or half "
        "of a surrogate pair.");
  }
  if (error) {
    return MalformedRequest(
        "", absl::StrCat("The request's body is not valid JSON: ", simdjson::error_message(error)));
  }
  return document;
}

absl::StatusOr<JsonFields> JsonFields::Of(dom::element object, std::string name) {
  dom::object fields;
  if (object.get(fields)) {
    return MalformedRequest(
        name, absl::StrCat(name.empty() ? "The request's body" : name,
                           " must be a JSON object, got ", std::string(TypeNameOf(object)), "."));
  }
  JsonFields result;
  result.name_ = std::move(name);
  for (const dom::key_value_pair field : fields) result.fields_[field.key] = field.value;
  return result;
}

std::optional<dom::element> JsonFields::Find(std::string_view key) const {
  const auto field = fields_.find(key);
  if (field == fields_.end() || field->second.is_null()) return std::nullopt;
  return field->second;
}

std::string JsonFields::NameOf(std::string_view key) const {
  return name_.empty() ? std::string(key) : absl::StrCat(name_, ".", std::string(key));
}

absl::Status JsonFields::WrongType(std::string_view key, std::string_view expected) const {
  const auto field = fields_.find(key);
  const std::string_view got = field == fields_.end() ? "nothing" : TypeNameOf(field->second);
  const std::string name = NameOf(key);
  return MalformedRequest(name, absl::StrCat(name, " must be ", std::string(expected), ", got ",
                                             std::string(got), "."));
}

absl::Status JsonFields::Read(std::string_view key, bool& value) const {
  const std::optional<dom::element> field = Find(key);
  if (field && field->get(value)) return WrongType(key, "true or false");
  return absl::OkStatus();
}

absl::Status JsonFields::Read(std::string_view key, int64_t& value) const {
  std::optional<int64_t> number;
  const absl::Status status = Read(key, number);
  if (number) value = *number;
  return status;
}

absl::Status JsonFields::Read(std::string_view key, std::optional<int64_t>& value) const {
  const std::optional<dom::element> field = Find(key);
  if (!field) return absl::OkStatus();
  value = AsInteger(*field);
  return value ? absl::OkStatus() : WrongType(key, "an integer of 64 bits");
}

absl::Status JsonFields::Read(std::string_view key, std::optional<double>& value) const {
  const std::optional<dom::element> field = Find(key);
  if (!field) return absl::OkStatus();
  double number = 0;
  if (field->get(number)) return WrongType(key, "a number");
  value = number;
  return absl::OkStatus();
}

absl::Status JsonFields::Read(std::string_view key, std::optional<std::string>& value) const {
  const std::optional<dom::element> field = Find(key);
  if (!field) return absl::OkStatus();
  std::string_view text;
  if (field->get(text)) return WrongType(key, "a string");
  value = std::string(text);
  return absl::OkStatus();
}

absl::Status JsonFields::ReadStrings(std::string_view key, std::vector<std::string>& strings,
                                     std::string_view expected) const {
  const std::optional<dom::element> field = Find(key);
  if (!field) return absl::OkStatus();
  dom::array list;
  if (field->get(list)) return WrongType(key, expected);
  for (const dom::element element : list) {
    std::string_view text;
    if (element.get(text)) return WrongType(key, expected);
    strings.emplace_back(text);
  }
  return absl::OkStatus();
}

absl::Status JsonFields::ReadTokenIds(std::string_view key, dom::array list,
                                      std::vector<uint32_t>& token_ids,
                                      std::string_view expected) const {
  constexpr int64_t kLargest = std::numeric_limits<uint32_t>::max();
  token_ids.reserve(token_ids.size() + list.size());
  for (const dom::element element : list) {
    const std::optional<int64_t> id = AsInteger(element);
    if (!id) return WrongType(key, expected);
    if (*id < 0 || *id > kLargest) {
      const std::string name = NameOf(key);
      return InvalidParameter(name, absl::StrCat("Token id ", *id, " in ", name,
                                                 " is no token id, expected 0 to ", kLargest, "."));
    }
    token_ids.push_back(static_cast<uint32_t>(*id));
  }
  return absl::OkStatus();
}

std::optional<int64_t> AsInteger(dom::element element) {
  int64_t number = 0;
  if (!element.get(number)) return number;
  double fraction = 0;
  // Above 2^53 a double no longer says which integer was meant.
  if (element.is<double>() && !element.get(fraction) && std::trunc(fraction) == fraction &&
      std::abs(fraction) <= 9007199254740992.0) {
    return static_cast<int64_t>(fraction);
  }
  return std::nullopt;
}

bool SaysNothing(dom::element value) {
  switch (value.type()) {
    case dom::element_type::NULL_VALUE:
      return true;
    case dom::element_type::BOOL:
      return !bool(value);
    case dom::element_type::STRING:
      return std::string_view(value).empty();
    case dom::element_type::ARRAY:
      return dom::array(value).size() == 0;
    case dom::element_type::OBJECT:
      return dom::object(value).size() == 0;
    default:
      return AsInteger(value) == 0;
  }
}

std::string_view TypeNameOf(dom::element element) {
  switch (element.type()) {
    case dom::element_type::ARRAY:
      return "a list";
    case dom::element_type::OBJECT:
      return "an object";
    case dom::element_type::INT64:
    case dom::element_type::UINT64:
    case dom::element_type::DOUBLE:
      return "a number";
    case dom::element_type::STRING:
      return "a string";
    case dom::element_type::BOOL:
      return "a boolean";
    case dom::element_type::NULL_VALUE:
      return "null";
  }
  return "something else";
}

}  // namespace fathom
