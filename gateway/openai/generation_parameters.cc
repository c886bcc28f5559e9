#include "gateway/openai/generation_parameters.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

constexpr double kMaxTemperature = 1e6;
constexpr double kGreedyBelow = 1e-5;  // proto/sampling.proto

// A number of the request as its message says it.
std::string Shown(double value) { return absl::StrCat(value); }

// The interval a number must lie in.
struct Range {
  double low;
  enum class Low { kIncluded, kExcluded } low_end;
  double high;
  std::string_view sentence;  // "must be in [0, 1]"

  bool Contains(float value) const {
    const bool above = low_end == Low::kIncluded ? value >= low : value > low;
    return above && value <= high;
  }
};

// The field's value, or `absent`.
absl::StatusOr<float> ReadNumber(const JsonFields& fields, std::string_view name, float absent,
                                 const Range& range) {
  std::optional<double> value;
  RETURN_IF_ERROR(fields.Read(name, value));
  if (!value) return absent;
  const float number = static_cast<float>(*value);
  if (range.Contains(number)) return number;
  return InvalidParameter(name, absl::StrCat(std::string(name), " ", std::string(range.sentence),
                                             ", got ", Shown(*value), "."));
}

absl::StatusOr<float> ReadTemperature(const JsonFields& fields, const SamplingDefaults& defaults) {
  std::optional<double> value;
  RETURN_IF_ERROR(fields.Read("temperature", value));
  if (!value) return defaults.temperature;
  if (*value < 0) {
    return InvalidParameter(
        "temperature", absl::StrCat("temperature must be non-negative, got ", Shown(*value), "."));
  }
  if (*value > kMaxTemperature) {
    return InvalidParameter("temperature",
                            absl::StrCat("temperature must be at most ", kMaxTemperature, ", got ",
                                         Shown(*value), "."));
  }
  return static_cast<float>(*value);
}

absl::StatusOr<uint32_t> ReadTopK(const JsonFields& fields, const SamplingDefaults& defaults) {
  std::optional<int64_t> value;
  RETURN_IF_ERROR(fields.Read("top_k", value));
  if (!value) return defaults.top_k;
  if (*value < -1) {
    return InvalidParameter(
        "top_k", absl::StrCat("top_k must be 0 (disable), or at least 1, got ", *value, "."));
  }
  constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
  return static_cast<uint32_t>(std::clamp<int64_t>(*value, 0, kMax));
}

absl::Status ReadSampling(const JsonFields& fields, const SamplingDefaults& defaults,
                          v1::SamplingParams& sampling) {
  constexpr auto kIncluded = Range::Low::kIncluded;
  constexpr auto kExcluded = Range::Low::kExcluded;
  constexpr Range kPenalty = {-2, kIncluded, 2, "must be in [-2, 2]"};
  constexpr Range kTopP = {0, kExcluded, 1, "must be in (0, 1]"};
  constexpr Range kMinP = {0, kIncluded, 1, "must be in [0, 1]"};
  constexpr Range kRepetition = {0, kExcluded, std::numeric_limits<float>::max(),
                                 "must be greater than zero"};
  float value;
  ASSIGN_OR_RETURN(value, ReadNumber(fields, "presence_penalty", 0, kPenalty));
  sampling.set_presence_penalty(value);
  ASSIGN_OR_RETURN(value, ReadNumber(fields, "frequency_penalty", 0, kPenalty));
  sampling.set_frequency_penalty(value);
  ASSIGN_OR_RETURN(
      value, ReadNumber(fields, "repetition_penalty", defaults.repetition_penalty, kRepetition));
  sampling.set_repetition_penalty(value);
  ASSIGN_OR_RETURN(value, ReadTemperature(fields, defaults));
  sampling.set_temperature(value);
  ASSIGN_OR_RETURN(value, ReadNumber(fields, "top_p", defaults.top_p, kTopP));
  sampling.set_top_p(value);
  ASSIGN_OR_RETURN(value, ReadNumber(fields, "min_p", defaults.min_p, kMinP));
  sampling.set_min_p(value);
  uint32_t top_k;
  ASSIGN_OR_RETURN(top_k, ReadTopK(fields, defaults));
  sampling.set_top_k(top_k);
  std::optional<int64_t> seed;
  RETURN_IF_ERROR(fields.Read("seed", seed));
  if (seed) sampling.set_seed(static_cast<uint64_t>(*seed));
  return absl::OkStatus();
}

absl::Status ReadLogitBias(const JsonFields& fields, const ApiLimits& limits,
                           v1::SamplingParams& sampling) {
  const std::optional<dom::element> value = fields.Find("logit_bias");
  if (!value) return absl::OkStatus();
  dom::object entries;
  if (value->get(entries)) return fields.WrongType("logit_bias", "an object");
  for (const dom::key_value_pair entry : entries) {
    if (static_cast<size_t>(sampling.logit_bias_size()) == limits.logit_bias_entries) {
      return InvalidParameter("logit_bias", absl::StrCat("logit_bias has more than ",
                                                         limits.logit_bias_entries, " entries."));
    }
    uint32_t token_id = 0;
    double bias = 0;
    const std::string key(entry.key);
    if (!absl::SimpleAtoi(key, &token_id)) {
      return InvalidParameter(
          "logit_bias", absl::StrCat("logit_bias: '", key, "' is not a token id, an integer."));
    }
    if (entry.value.get(bias)) {
      return MalformedRequest("logit_bias",
                              absl::StrCat("logit_bias of token ", key, " must be a number, got ",
                                           std::string(TypeNameOf(entry.value)), "."));
    }
    v1::LogitBias& added = *sampling.add_logit_bias();
    added.set_token_id(token_id);
    added.set_bias(static_cast<float>(std::clamp(bias, -100.0, 100.0)));
  }
  return absl::OkStatus();
}

// Of `stop` and `bad_words`; `what` is one of them in words.
struct StringLimits {
  size_t strings;
  size_t bytes;  // of each
  std::string_view what;
};

absl::Status CheckStrings(std::string_view name, const std::vector<std::string>& strings,
                          const StringLimits& limits) {
  if (strings.size() > limits.strings) {
    return InvalidParameter(name, absl::StrCat(std::string(name), " has ", strings.size(),
                                               " strings, limit ", limits.strings, "."));
  }
  for (const std::string& string : strings) {
    if (string.empty()) {
      return InvalidParameter(name,
                              absl::StrCat(std::string(name), " cannot contain an empty string."));
    }
    if (string.size() > limits.bytes) {
      return InvalidParameter(name,
                              absl::StrCat("a ", std::string(limits.what), " has ", string.size(),
                                           " bytes, limit ", limits.bytes, "."));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadStop(const JsonFields& fields, const ApiLimits& limits,
                      std::vector<std::string>& stop) {
  const std::optional<dom::element> value = fields.Find("stop");
  if (!value) return absl::OkStatus();
  std::string_view text;
  if (!value->get(text)) {
    stop.emplace_back(text);
  } else {
    RETURN_IF_ERROR(fields.ReadStrings("stop", stop, "a string or a list of strings"));
  }
  return CheckStopStrings("stop", stop, limits);
}

absl::Status ReadBadWords(const JsonFields& fields, const ApiLimits& limits,
                          std::vector<std::string>& bad_words) {
  RETURN_IF_ERROR(fields.ReadStrings("bad_words", bad_words));
  return CheckStrings("bad_words", bad_words,
                      {limits.bad_words, limits.bad_word_bytes, "bad word"});
}

using TokenIdField = google::protobuf::RepeatedField<uint32_t>;

absl::Status ReadTokenIds(const JsonFields& fields, std::string_view name, size_t limit,
                          TokenIdField& token_ids) {
  const std::optional<dom::element> value = fields.Find(name);
  if (!value) return absl::OkStatus();
  dom::array ids;
  if (value->get(ids)) return fields.WrongType(name, "a list of token ids");
  std::vector<uint32_t> read;
  RETURN_IF_ERROR(fields.ReadTokenIds(name, ids, read));
  if (read.size() > limit) {
    return InvalidParameter(
        name, absl::StrCat(std::string(name), " has ", read.size(), " ids, limit ", limit, "."));
  }
  token_ids.Assign(read.begin(), read.end());
  return absl::OkStatus();
}

absl::Status ReadAllowedTokenIds(const JsonFields& fields, const ApiLimits& limits,
                                 v1::SamplingParams& sampling) {
  RETURN_IF_ERROR(ReadTokenIds(fields, "allowed_token_ids", limits.allowed_token_ids,
                               *sampling.mutable_allowed_token_ids()));
  if (fields.Find("allowed_token_ids") && sampling.allowed_token_ids().empty()) {
    return InvalidParameter("allowed_token_ids",
                            "allowed_token_ids cannot be empty: no token would be left.");
  }
  return absl::OkStatus();
}

absl::Status ReadTruncation(const JsonFields& fields, GenerationParameters& parameters) {
  std::optional<int64_t>& value = parameters.truncate_prompt_tokens;
  RETURN_IF_ERROR(fields.Read("truncate_prompt_tokens", value));
  if (!value || *value == -1 || *value >= 1) return absl::OkStatus();
  return InvalidParameter(
      "truncate_prompt_tokens",
      absl::StrCat("truncate_prompt_tokens must be -1, or at least 1, got ", *value, "."));
}

absl::Status ReadStreaming(const JsonFields& fields, GenerationParameters& parameters) {
  RETURN_IF_ERROR(fields.Read("stream", parameters.stream));
  const std::optional<dom::element> value = fields.Find("stream_options");
  if (!value) return absl::OkStatus();
  if (!parameters.stream && !SaysNothing(*value)) {
    return InvalidParameter("stream_options",
                            "Stream options can only be defined when `stream=True`.");
  }
  ASSIGN_OR_RETURN(const JsonFields options, JsonFields::Of(*value, "stream_options"));
  parameters.include_usage = true;
  RETURN_IF_ERROR(options.Read("include_usage", parameters.include_usage));
  RETURN_IF_ERROR(options.Read("continuous_usage_stats", parameters.continuous_usage_stats));
  bool ignored = false;
  RETURN_IF_ERROR(options.Read("include_obfuscation", ignored));
  // As in vLLM: without the final usage there is none on the way either.
  parameters.continuous_usage_stats &= parameters.include_usage;
  return absl::OkStatus();
}

absl::Status ReadPromptLogprobs(const JsonFields& fields, const ApiLimits& limits,
                                GenerationParameters& parameters) {
  std::optional<int64_t> value;
  RETURN_IF_ERROR(fields.Read("prompt_logprobs", value));
  if (!value) return absl::OkStatus();
  if (parameters.stream && *value > 0) {
    return InvalidParameter("prompt_logprobs",
                            "`prompt_logprobs` are not available when `stream=True`.");
  }
  if (*value < 0 || *value > limits.logprobs) {
    return InvalidParameter(
        "prompt_logprobs",
        absl::StrCat("prompt_logprobs must be in [0, ", limits.logprobs, "], got ", *value, "."));
  }
  if (!parameters.stream) parameters.num_prompt_logprobs = static_cast<uint32_t>(*value);
  return absl::OkStatus();
}

absl::Status ReadCount(const JsonFields& fields, const ApiLimits& limits,
                       GenerationParameters& parameters) {
  int64_t n = 1;
  RETURN_IF_ERROR(fields.Read("n", n));
  if (n < 1) return InvalidParameter("n", absl::StrCat("n must be at least 1, got ", n, "."));
  if (n > limits.n) {
    return InvalidParameter("n", absl::StrCat("n must be at most ", limits.n, ", got ", n, "."));
  }
  if (n > 1 && parameters.sampling.temperature() < kGreedyBelow) {
    return InvalidParameter("n",
                            absl::StrCat("n must be 1 when using greedy sampling, got ", n, "."));
  }
  parameters.n = static_cast<int>(n);
  int64_t best_of = 1;
  RETURN_IF_ERROR(fields.Read("best_of", best_of));
  if (best_of > 1) return NotSupportedYet("best_of", "best_of above 1");
  int64_t min_tokens = 0;
  RETURN_IF_ERROR(fields.Read("min_tokens", min_tokens));
  if (min_tokens < 0 || min_tokens > std::numeric_limits<int32_t>::max()) {
    return InvalidParameter("min_tokens", absl::StrCat("min_tokens must be greater than or equal "
                                                       "to 0, got ",
                                                       min_tokens, "."));
  }
  parameters.sampling.set_min_tokens(static_cast<uint32_t>(min_tokens));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GenerationParameters> ReadGenerationParameters(const JsonFields& fields,
                                                              const SamplingDefaults& defaults,
                                                              const ApiLimits& limits) {
  GenerationParameters parameters;
  RETURN_IF_ERROR(ReadStreaming(fields, parameters));
  RETURN_IF_ERROR(ReadSampling(fields, defaults, parameters.sampling));
  RETURN_IF_ERROR(ReadCount(fields, limits, parameters));
  ASSIGN_OR_RETURN(parameters.structured_output, ReadStructuredOutput(fields));
  RETURN_IF_ERROR(ReadLogitBias(fields, limits, parameters.sampling));
  RETURN_IF_ERROR(ReadStop(fields, limits, parameters.stop));
  RETURN_IF_ERROR(ReadTokenIds(fields, "stop_token_ids", limits.stop_token_ids,
                               *parameters.sampling.mutable_stop_token_ids()));
  RETURN_IF_ERROR(ReadAllowedTokenIds(fields, limits, parameters.sampling));
  RETURN_IF_ERROR(ReadBadWords(fields, limits, parameters.bad_words));
  RETURN_IF_ERROR(ReadTruncation(fields, parameters));
  RETURN_IF_ERROR(ReadPromptLogprobs(fields, limits, parameters));
  RETURN_IF_ERROR(fields.Read("ignore_eos", parameters.ignore_eos));
  RETURN_IF_ERROR(fields.Read("skip_special_tokens", parameters.skip_special_tokens));
  RETURN_IF_ERROR(fields.Read("return_token_ids", parameters.return_token_ids));
  bool as_token_ids = false;
  RETURN_IF_ERROR(fields.Read("return_tokens_as_token_ids", as_token_ids));
  if (as_token_ids) parameters.token_names = TokenNames::Style::kIds;
  bool include_stop = false;
  RETURN_IF_ERROR(fields.Read("include_stop_str_in_output", include_stop));
  if (include_stop) parameters.stop_string = StopString::kInclude;
  int64_t priority = 0;
  RETURN_IF_ERROR(fields.Read("priority", priority));
  if (priority < INT32_MIN || priority > INT32_MAX) {
    return InvalidParameter("priority", absl::StrCat("priority must be in [", INT32_MIN, ", ",
                                                     INT32_MAX, "], got ", priority, "."));
  }
  parameters.priority = static_cast<int32_t>(priority);
  std::optional<std::string> cache_salt;
  RETURN_IF_ERROR(fields.Read("cache_salt", cache_salt));
  if (cache_salt && cache_salt->empty()) {
    return InvalidParameter("cache_salt",
                            "Parameter 'cache_salt' must be a non-empty string if provided.");
  }
  if (cache_salt) parameters.cache_salt = *std::move(cache_salt);
  return parameters;
}

absl::Status CheckStopStrings(std::string_view name, const std::vector<std::string>& stop,
                              const ApiLimits& limits) {
  return CheckStrings(name, stop, {limits.stop_strings, limits.stop_string_bytes, "stop string"});
}

absl::Status CheckMaxTokens(const std::string& name, int64_t max_tokens, int64_t at_least,
                            const GenerationParameters& parameters) {
  if (max_tokens < at_least) {
    return InvalidParameter(
        name, absl::StrCat(name, " must be at least ", at_least, ", got ", max_tokens, "."));
  }
  if (max_tokens > std::numeric_limits<int32_t>::max()) {
    return InvalidParameter(name, absl::StrCat(name, " must be below 2^31, got ", max_tokens, "."));
  }
  if (parameters.sampling.min_tokens() > max_tokens) {
    return InvalidParameter(
        "min_tokens", absl::StrCat("min_tokens must be less than or equal to ", name, "=",
                                   max_tokens, ", got ", parameters.sampling.min_tokens(), "."));
  }
  return absl::OkStatus();
}

void AddBadWords(const Tokenizer& tokenizer, GenerationParameters& parameters) {
  const auto add = [&parameters](const std::vector<uint32_t>& token_ids) {
    parameters.sampling.add_bad_words()->mutable_token_ids()->Assign(token_ids.begin(),
                                                                     token_ids.end());
  };
  for (const std::string& bad_word : parameters.bad_words) {
    const std::string word(absl::StripLeadingAsciiWhitespace(bad_word));
    const std::vector<uint32_t> bare = tokenizer.Encode(word, BosPolicy::kNone);
    if (!bare.empty()) add(bare);
    // After a space it is a token of its own or it is not; more tokens would only begin with the
    // space's.
    const std::vector<uint32_t> spaced = tokenizer.Encode(" " + word, BosPolicy::kNone);
    if (bare.empty() || (spaced.size() == bare.size() && spaced.front() != bare.front())) {
      add(spaced);
    }
  }
}

}  // namespace fathom
