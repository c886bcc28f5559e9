#include "worker/sim_profile.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

using simdjson::dom::element;

// Far above any hardware, and small enough that products stay finite.
constexpr double kMost = 1e18;
// Places within a cache are 32 bits.
constexpr double kMostTokens = 1 << 30;

std::string Shortened(const element& value) {
  constexpr size_t kLongest = 80;
  return std::string(simdjson::minify(value)).substr(0, kLongest);
}

// The numbers of one JSON object, taken by name.
class Numbers {
 public:
  // `prefix` stands before the names of its keys in errors.
  static absl::StatusOr<Numbers> Of(const element& value, const std::string& prefix) {
    Numbers numbers(prefix);
    if (value.get(numbers.object_) == simdjson::SUCCESS) return numbers;
    return absl::InvalidArgumentError(absl::StrCat(prefix.empty() ? "it" : prefix, " is ",
                                                   Shortened(value), ", expected an object"));
  }

  absl::Status Take(const char* key, double min, double max, double& out) {
    known_.insert(key);
    element value;
    const bool is_there = object_[key].get(value) == simdjson::SUCCESS;
    double number = 0;
    if (is_there && value.get(number) == simdjson::SUCCESS && number >= min && number <= max) {
      out = number;
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(Name(key), " is ",
                                                   is_there ? Shortened(value) : "missing",
                                                   ", expected a number from ", min, " to ", max));
  }
  // Absent if there is no such key.
  std::optional<element> Find(const char* key) {
    known_.insert(key);
    element value;
    if (object_[key].get(value) != simdjson::SUCCESS) return std::nullopt;
    return value;
  }
  absl::Status CheckNoOthers() const {
    std::set<std::string_view> seen;
    for (const auto& [key, value] : object_) {
      const std::string name = Name(std::string(key.substr(0, 80)));
      if (known_.count(std::string(key)) == 0) {
        return absl::InvalidArgumentError(absl::StrCat(name, " is no key of a profile"));
      }
      if (!seen.insert(key).second) {
        return absl::InvalidArgumentError(absl::StrCat(name, " occurs twice"));
      }
    }
    return absl::OkStatus();
  }

 private:
  explicit Numbers(const std::string& prefix) : prefix_(prefix) {}
  std::string Name(const std::string& key) const {
    return prefix_.empty() ? key : absl::StrCat(prefix_, ".", key);
  }

  std::string prefix_;
  simdjson::dom::object object_;
  std::set<std::string> known_;
};

absl::StatusOr<SimRoofline> TakeRoofline(const element& value) {
  constexpr double kTiny = 1.0;
  ASSIGN_OR_RETURN(Numbers numbers, Numbers::Of(value, "roofline"));
  SimRoofline roofline;
  RETURN_IF_ERROR(
      numbers.Take("memory_bytes_per_second", kTiny, kMost, roofline.memory_bytes_per_second));
  RETURN_IF_ERROR(numbers.Take("weight_bytes", 0, kMost, roofline.weight_bytes));
  RETURN_IF_ERROR(numbers.Take("expert_bytes", 0, kMost, roofline.expert_bytes));
  RETURN_IF_ERROR(numbers.Take("num_experts", 1, kMost, roofline.num_experts));
  RETURN_IF_ERROR(numbers.Take("num_experts_per_token", 0, roofline.num_experts,
                               roofline.num_experts_per_token));
  RETURN_IF_ERROR(numbers.Take("kv_bytes_per_token", 0, kMost, roofline.kv_bytes_per_token));
  RETURN_IF_ERROR(
      numbers.Take("linear_flops_per_token", 0, kMost, roofline.linear_flops_per_token));
  RETURN_IF_ERROR(
      numbers.Take("linear_flops_per_second", kTiny, kMost, roofline.linear_flops_per_second));
  RETURN_IF_ERROR(
      numbers.Take("attention_flops_per_pair", 0, kMost, roofline.attention_flops_per_pair));
  RETURN_IF_ERROR(numbers.Take("attention_flops_per_second", kTiny, kMost,
                               roofline.attention_flops_per_second));
  RETURN_IF_ERROR(numbers.CheckNoOthers());
  return roofline;
}

double RooflineSeconds(const SimRoofline& roofline, const SimStep& step) {
  const double missed =
      std::pow(1.0 - roofline.num_experts_per_token / roofline.num_experts, step.tokens);
  const double weight_bytes =
      roofline.weight_bytes + roofline.expert_bytes * roofline.num_experts * (1.0 - missed);
  const double linear =
      step.tokens * roofline.linear_flops_per_token / roofline.linear_flops_per_second;
  const double kv_bytes = step.context_tokens * roofline.kv_bytes_per_token;
  const double attention = step.attention_pairs * roofline.attention_flops_per_pair /
                           roofline.attention_flops_per_second;
  return std::max(weight_bytes / roofline.memory_bytes_per_second, linear) +
         std::max(kv_bytes / roofline.memory_bytes_per_second, attention);
}

}  // namespace

double StepMicroseconds(const SimProfile& profile, const SimStep& step) {
  double microseconds = profile.fixed_us + profile.us_per_token * step.tokens +
                        profile.us_per_sequence * step.sequences +
                        profile.us_per_context_token * step.context_tokens;
  if (profile.roofline.has_value()) microseconds += 1e6 * RooflineSeconds(*profile.roofline, step);
  return microseconds;
}

absl::StatusOr<SimProfile> ParseSimProfile(std::string_view json) {
  simdjson::dom::parser parser;
  element value;
  if (parser.parse(json.data(), json.size()).get(value) != simdjson::SUCCESS) {
    return absl::InvalidArgumentError("it is not valid JSON");
  }
  ASSIGN_OR_RETURN(Numbers numbers, Numbers::Of(value, ""));
  SimProfile profile;
  double kv_cache_tokens = 0;
  RETURN_IF_ERROR(numbers.Take("kv_cache_tokens", 1, kMostTokens, kv_cache_tokens));
  profile.kv_cache_tokens = static_cast<int64_t>(kv_cache_tokens);
  RETURN_IF_ERROR(numbers.Take("fixed_us", 0, kMost, profile.fixed_us));
  RETURN_IF_ERROR(numbers.Take("us_per_token", 0, kMost, profile.us_per_token));
  RETURN_IF_ERROR(numbers.Take("us_per_sequence", 0, kMost, profile.us_per_sequence));
  RETURN_IF_ERROR(numbers.Take("us_per_context_token", 0, kMost, profile.us_per_context_token));
  numbers.Find("description");
  if (const std::optional<element> roofline = numbers.Find("roofline"); roofline.has_value()) {
    ASSIGN_OR_RETURN(profile.roofline, TakeRoofline(*roofline));
  }
  RETURN_IF_ERROR(numbers.CheckNoOthers());
  return profile;
}

}  // namespace fathom
