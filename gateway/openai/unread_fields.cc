#include "gateway/openai/unread_fields.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

enum class Type { kBool, kInteger, kNumber, kString, kList, kObject };

struct IgnoredField {
  const char* name;
  Type type;
};

constexpr IgnoredField kIgnoredEverywhere[] = {
    {"length_penalty", Type::kNumber},  // of beams, which there are none of
    {"metadata", Type::kObject},
    {"request_id", Type::kString},
    {"service_tier", Type::kString},
    {"spaces_between_special_tokens", Type::kBool},  // byte-level tokens have their own
};

constexpr IgnoredField kIgnoredOfOpenAi[] = {
    {"prompt_cache_key", Type::kString},
    {"prompt_cache_retention", Type::kString},
    {"safety_identifier", Type::kString},
    {"store", Type::kBool},
    {"user", Type::kString},
};

constexpr IgnoredField kIgnoredInChats[] = {
    {"modalities", Type::kList},    // "audio" among them comes with `audio`
    {"prediction", Type::kObject},  // makes OpenAI faster, not different
    {"verbosity", Type::kString},
};

constexpr IgnoredField kIgnoredInResponses[] = {
    {"max_tool_calls", Type::kInteger},  // of the provider's tools
};

constexpr IgnoredField kIgnoredInMessages[] = {
    {"context_management", Type::kObject},  // what to forget; what does not fit is refused
    {"inference_geo", Type::kString},
};

struct RefusedField {
  const char* name;
  const char* instead;  // "": nothing does
};

constexpr RefusedField kRefusedEverywhere[] = {
    {"documents", "put them into the messages"},
    {"ec_transfer_params", ""},
    {"kv_transfer_params", ""},
    {"logits_processors", "logit_bias, allowed_token_ids and bad_words change what is sampled"},
    {"mm_processor_kwargs", "this model reads text only"},
    {"prompt_embeds", "send text or token ids"},
    {"suffix", "the model continues its prompt only"},
    {"use_beam_search", "n gives several answers"},
    {"vllm_xargs", ""},
};

// Even {} and "" say something here: an empty web_search_options asks for a search.
constexpr RefusedField kRefusedInChats[] = {
    {"audio", "answers are text; leave 'audio' out of modalities too"},
    {"function_call", "use tool_choice"},
    {"functions", "use tools"},
    {"web_search_options", "this server searches nothing; offer the model a tool that does"},
};

constexpr RefusedField kRefusedInResponses[] = {
    {"background", "this server keeps no responses; ask without it"},
    {"conversation", "this server keeps no responses; send the whole input"},
    {"previous_response_id", "this server keeps no responses; send the whole input"},
    {"prompt", "this server keeps no prompts; send the whole input"},
};

constexpr RefusedField kRefusedInMessages[] = {
    {"container", "this server runs no code"},
    {"mcp_servers", "offer the model tools of your own"},
    {"output_format", "/v1/chat/completions has response_format"},
};

absl::Status CheckType(const JsonFields& fields, const IgnoredField& field) {
  bool truth = false;
  int64_t integer = 0;
  std::optional<double> number;
  std::optional<std::string> text;
  const std::optional<dom::element> value = fields.Find(field.name);
  switch (field.type) {
    case Type::kBool:
      return fields.Read(field.name, truth);
    case Type::kInteger:
      return fields.Read(field.name, integer);
    case Type::kNumber:
      return fields.Read(field.name, number);
    case Type::kString:
      return fields.Read(field.name, text);
    case Type::kList:
      return !value || value->is_array() ? absl::OkStatus()
                                         : fields.WrongType(field.name, "a list");
    case Type::kObject:
      return !value || value->is_object() ? absl::OkStatus()
                                          : fields.WrongType(field.name, "an object");
  }
  return absl::OkStatus();
}

absl::Status CheckIgnored(const JsonFields& fields, absl::Span<const IgnoredField> ignored) {
  for (const IgnoredField& field : ignored) RETURN_IF_ERROR(CheckType(fields, field));
  return absl::OkStatus();
}

enum class Unless { kItIsNull, kItSaysNothing };

absl::Status CheckRefused(const JsonFields& fields, absl::Span<const RefusedField> refused,
                          Unless unless) {
  for (const RefusedField& field : refused) {
    const std::optional<dom::element> value = fields.Find(field.name);
    if (!value || (unless == Unless::kItSaysNothing && SaysNothing(*value))) continue;
    const std::string_view instead = field.instead;
    return InvalidParameter(field.name, absl::StrCat(field.name, " is not supported",
                                                     instead.empty() ? "" : ": ", field.instead));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckUnreadFields(const JsonFields& fields, ApiRoute route) {
  RETURN_IF_ERROR(CheckIgnored(fields, kIgnoredEverywhere));
  RETURN_IF_ERROR(CheckRefused(fields, kRefusedEverywhere, Unless::kItSaysNothing));
  if (route == ApiRoute::kMessages) {
    RETURN_IF_ERROR(CheckIgnored(fields, kIgnoredInMessages));
    return CheckRefused(fields, kRefusedInMessages, Unless::kItSaysNothing);
  }
  RETURN_IF_ERROR(CheckIgnored(fields, kIgnoredOfOpenAi));
  if (route == ApiRoute::kResponses) {
    RETURN_IF_ERROR(CheckIgnored(fields, kIgnoredInResponses));
    return CheckRefused(fields, kRefusedInResponses, Unless::kItSaysNothing);
  }
  if (route == ApiRoute::kCompletions) return absl::OkStatus();
  RETURN_IF_ERROR(CheckIgnored(fields, kIgnoredInChats));
  return CheckRefused(fields, kRefusedInChats, Unless::kItIsNull);
}

}  // namespace fathom
