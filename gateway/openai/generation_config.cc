#include "gateway/openai/generation_config.h"

#include <fstream>
#include <optional>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/json_fields.h"

namespace fathom {
namespace {

constexpr size_t kMaxDepth = 64;

absl::Status OutOfRange(std::string_view name, double value, std::string_view expected) {
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(name), " is ", value, ", expected ", std::string(expected)));
}

absl::StatusOr<SamplingDefaults> DefaultsOf(const JsonFields& fields) {
  SamplingDefaults defaults;
  std::optional<double> value;
  RETURN_IF_ERROR(fields.Read("temperature", value));
  if (value && !(*value >= 0 && *value <= 1e6)) {
    return OutOfRange("temperature", *value, "at least 0");
  }
  defaults.temperature = static_cast<float>(value.value_or(defaults.temperature));

  value.reset();
  RETURN_IF_ERROR(fields.Read("top_p", value));
  if (value && !(*value > 0 && *value <= 1)) return OutOfRange("top_p", *value, "(0, 1]");
  defaults.top_p = static_cast<float>(value.value_or(defaults.top_p));

  value.reset();
  RETURN_IF_ERROR(fields.Read("min_p", value));
  if (value && !(*value >= 0 && *value <= 1)) return OutOfRange("min_p", *value, "[0, 1]");
  defaults.min_p = static_cast<float>(value.value_or(defaults.min_p));

  value.reset();
  RETURN_IF_ERROR(fields.Read("repetition_penalty", value));
  if (value && !(*value > 0 && *value <= 1e6)) {
    return OutOfRange("repetition_penalty", *value, "above 0");
  }
  defaults.repetition_penalty = static_cast<float>(value.value_or(defaults.repetition_penalty));

  std::optional<int64_t> top_k;
  RETURN_IF_ERROR(fields.Read("top_k", top_k));
  if (top_k && (*top_k < -1 || *top_k > INT32_MAX)) {
    return OutOfRange("top_k", static_cast<double>(*top_k), "0 (all tokens) or at least 1");
  }
  if (top_k.value_or(0) > 0) defaults.top_k = static_cast<uint32_t>(*top_k);
  return defaults;
}

}  // namespace

absl::StatusOr<SamplingDefaults> ParseSamplingDefaults(const std::string& json) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(json, kMaxDepth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  return DefaultsOf(fields);
}

absl::StatusOr<SamplingDefaults> LoadSamplingDefaults(const std::string& model_dir) {
  const std::string path = model_dir + "/generation_config.json";
  std::ifstream file(path, std::ios::binary);
  if (!file) return SamplingDefaults();
  std::ostringstream text;
  text << file.rdbuf();
  absl::StatusOr<SamplingDefaults> defaults = ParseSamplingDefaults(text.str());
  if (defaults.ok()) return defaults;
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": ", std::string(defaults.status().message())));
}

}  // namespace fathom
