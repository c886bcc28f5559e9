#include "worker/model_config.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <map>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "worker/safetensors.h"

namespace fathom {
namespace {

using simdjson::dom::element;

constexpr char kV2[] = "DeepseekV2ForCausalLM";
constexpr char kV3[] = "DeepseekV3ForCausalLM";
constexpr char kV32[] = "DeepseekV32ForCausalLM";

constexpr int64_t kMaxConfigBytes = 16'000'000;
constexpr size_t kMaxEosTokens = 64;

// Far above any model known, and low enough that products of three of them stay below 2^63.
constexpr int kMaxWidth = 1 << 20;
constexpr int kMaxVocab = 1 << 24;
constexpr int kMaxPositions = 1 << 24;
constexpr int kMaxHeads = 4096;
constexpr int kMaxLayers = 4096;
constexpr int kMaxExperts = 4096;
constexpr int kMaxSharedExperts = 256;
// Each has a name that is looked up: a bound for what a few digits can make us allocate.
constexpr int64_t kMaxExpertsOfAllLayers = 1 << 18;

constexpr double kMaxFactor = 1e6;

std::string Printed(const element& value) {
  constexpr size_t kLongest = 80;
  std::string text = simdjson::minify(value);
  return text.size() <= kLongest ? text : absl::StrCat(text.substr(0, kLongest), "...");
}

// One JSON object whose fields are taken by name. A field that is null counts as absent. Errors say
// "config.json: NAME is VALUE, expected ...".
class Fields {
 public:
  // `where`: "config.json", or "config.json: rope_scaling" for an object within.
  static absl::StatusOr<Fields> Of(const std::string& where, const char* separator,
                                   const element& value) {
    simdjson::dom::object object;
    if (value.get(object) != simdjson::SUCCESS) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, " is ", Printed(value), ", expected an object"));
    }
    const std::string prefix = absl::StrCat(where, separator);
    Fields fields(prefix);
    for (const auto& [key, field] : object) {
      if (!fields.fields_.emplace(key, field).second) {
        return absl::InvalidArgumentError(
            absl::StrCat(prefix, std::string(key.substr(0, 80)), " occurs twice"));
      }
    }
    return fields;
  }

  // Null when absent.
  const element* Find(std::string_view name) const {
    const auto found = fields_.find(name);
    return found == fields_.end() || found->second.is_null() ? nullptr : &found->second;
  }

  absl::Status Refuse(const std::string& name, const std::string& expectation) const {
    const element* value = Find(name);
    return absl::InvalidArgumentError(absl::StrCat(prefix_, name, " is ",
                                                   value == nullptr ? "missing" : Printed(*value),
                                                   ", expected ", expectation));
  }

  // `out` keeps its value when an optional field is absent.
  absl::Status TakeInt(const char* name, int min, int max, bool required, int& out) const {
    const element* value = Find(name);
    if (value == nullptr && !required) return absl::OkStatus();
    int64_t number = 0;
    if (value == nullptr || value->get(number) != simdjson::SUCCESS || number < min ||
        number > max) {
      return Refuse(name, absl::StrCat("an integer from ", min, " to ", max));
    }
    out = static_cast<int>(number);
    return absl::OkStatus();
  }

  absl::Status TakeDouble(const char* name, double min, double max, double& out) const {
    const element* value = Find(name);
    if (value == nullptr) return absl::OkStatus();
    double number = 0;
    if (value->get(number) != simdjson::SUCCESS || !(number >= min && number <= max)) {
      return Refuse(name, absl::StrCat("a number from ", min, " to ", max));
    }
    out = number;
    return absl::OkStatus();
  }

  absl::Status TakeBool(const char* name, bool& out) const {
    const element* value = Find(name);
    if (value != nullptr && value->get(out) != simdjson::SUCCESS) {
      return Refuse(name, "true or false");
    }
    return absl::OkStatus();
  }

  absl::Status TakeString(const char* name, std::string& out) const {
    const element* value = Find(name);
    std::string_view text;
    if (value == nullptr) return absl::OkStatus();
    if (value->get(text) != simdjson::SUCCESS) return Refuse(name, "a string");
    out = std::string(text);
    return absl::OkStatus();
  }

  // For objects in which an unknown field may change the mathematics.
  absl::Status RefuseUnknown(const std::set<std::string_view>& known) const {
    for (const auto& [name, value] : fields_) {
      if (!known.contains(name) && !value.is_null()) {
        return Refuse(std::string(name.substr(0, 80)), "no such field: it is not supported");
      }
    }
    return absl::OkStatus();
  }

 private:
  explicit Fields(std::string prefix) : prefix_(std::move(prefix)) {}

  const std::string prefix_;
  std::map<std::string_view, element> fields_;  // views into the parsed document
};

// Fields that may be absent but, if there, must have the one value that this engine computes.
struct FixedField {
  const char* name;
  const char* value;  // as JSON, minified
};
constexpr FixedField kFixedFields[] = {
    {"hidden_act", "\"silu\""},
    {"attention_bias", "false"},
    {"mlp_bias", "false"},
    {"rope_interleave", "true"},
    {"use_mla", "true"},
    {"use_sliding_window", "false"},
    {"sliding_window", "null"},
    {"index_topk", "null"},
    {"index_n_heads", "null"},
    {"index_head_dim", "null"},
    {"is_encoder_decoder", "false"},
    {"logits_soft_cap", "null"},
};

absl::Status CheckFixedFields(const Fields& fields) {
  for (const FixedField& field : kFixedFields) {
    const element* value = fields.Find(field.name);
    if (value != nullptr && simdjson::minify(*value) != field.value) {
      return fields.Refuse(field.name, absl::StrCat(field.value, ": nothing else is supported"));
    }
  }
  return absl::OkStatus();
}

// May be absent; else it names the same family as `architecture`. Kimi K2 is a DeepSeek-V3.
absl::Status CheckModelType(const Fields& fields, const std::string& architecture) {
  std::string model_type;
  RETURN_IF_ERROR(fields.TakeString("model_type", model_type));
  const std::set<std::string> accepted = architecture == kV3
                                             ? std::set<std::string>{"deepseek_v3", "kimi_k2"}
                                             : std::set<std::string>{"deepseek_v2"};
  if (fields.Find("model_type") == nullptr || accepted.contains(model_type)) {
    return absl::OkStatus();
  }
  return fields.Refuse("model_type", absl::StrCat("\"", absl::StrJoin(accepted, "\" or \""),
                                                  "\" beside architecture ", architecture));
}

absl::Status TakeArchitecture(const Fields& fields, ModelConfig& config) {
  const element* value = fields.Find("architectures");
  simdjson::dom::array names;
  std::string_view name;
  const std::string expectation = absl::StrCat("[\"", kV3, "\"] or [\"", kV2, "\"]");
  if (value == nullptr || value->get(names) != simdjson::SUCCESS || names.size() != 1 ||
      names.at(0).get(name) != simdjson::SUCCESS) {
    return fields.Refuse("architectures", expectation);
  }
  if (name == kV32) {
    return fields.Refuse("architectures",
                         absl::StrCat(expectation, ": sparse attention is not supported yet"));
  }
  if (name != kV2 && name != kV3) return fields.Refuse("architectures", expectation);
  config.architecture = std::string(name);
  return CheckModelType(fields, config.architecture);
}

absl::Status TakeSizes(const Fields& fields, ModelConfig& config) {
  struct Size {
    const char* name;
    int min, max;
    int* out;
  };
  const Size sizes[] = {
      {"vocab_size", 1, kMaxVocab, &config.vocab_size},
      {"hidden_size", 1, kMaxWidth, &config.hidden_size},
      {"num_hidden_layers", 1, kMaxLayers, &config.num_hidden_layers},
      {"max_position_embeddings", 1, kMaxPositions, &config.max_position_embeddings},
      {"num_attention_heads", 1, kMaxHeads, &config.num_attention_heads},
      {"kv_lora_rank", 1, kMaxWidth, &config.kv_lora_rank},
      {"qk_nope_head_dim", 1, kMaxWidth, &config.qk_nope_head_dim},
      {"qk_rope_head_dim", 2, kMaxWidth, &config.qk_rope_head_dim},
      {"v_head_dim", 1, kMaxWidth, &config.v_head_dim},
      {"intermediate_size", 1, kMaxWidth, &config.intermediate_size},
  };
  for (const Size& size : sizes) {
    RETURN_IF_ERROR(fields.TakeInt(size.name, size.min, size.max, /*required=*/true, *size.out));
  }
  RETURN_IF_ERROR(
      fields.TakeInt("q_lora_rank", 1, kMaxWidth, /*required=*/false, config.q_lora_rank));
  RETURN_IF_ERROR(fields.TakeInt("num_nextn_predict_layers", 0, kMaxLayers, /*required=*/false,
                                 config.num_nextn_predict_layers));
  if (config.qk_rope_head_dim % 2 != 0) {
    return fields.Refuse("qk_rope_head_dim", "an even number: rotary embedding turns pairs");
  }
  // All heads read the one latent; there is nothing to group.
  int num_key_value_heads = config.num_attention_heads;
  const int heads = config.num_attention_heads;
  RETURN_IF_ERROR(
      fields.TakeInt("num_key_value_heads", 1, kMaxHeads, /*required=*/false, num_key_value_heads));
  if (num_key_value_heads != heads) {
    return fields.Refuse("num_key_value_heads", absl::StrCat("num_attention_heads, ", heads));
  }
  return absl::OkStatus();
}

absl::Status TakeRouting(const Fields& fields, ModelConfig& config) {
  RoutingConfig& routing = config.routing;
  const bool is_v3 = config.architecture == kV3;

  std::string scoring_func = is_v3 ? "sigmoid" : "softmax";
  RETURN_IF_ERROR(fields.TakeString("scoring_func", scoring_func));
  if (scoring_func != "sigmoid" && scoring_func != "softmax") {
    return fields.Refuse("scoring_func", "\"sigmoid\" or \"softmax\"");
  }
  routing.scoring_func = scoring_func == "sigmoid" ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;

  std::string topk_method = is_v3 ? "noaux_tc" : "greedy";
  RETURN_IF_ERROR(fields.TakeString("topk_method", topk_method));
  const std::map<std::string_view, TopkMethod> methods = {
      {"noaux_tc", TopkMethod::kNoauxTc},
      {"group_limited_greedy", TopkMethod::kGroupLimitedGreedy},
      {"greedy", TopkMethod::kGreedy}};
  const auto method = methods.find(topk_method);
  if (method == methods.end()) {
    return fields.Refuse("topk_method", "\"noaux_tc\", \"group_limited_greedy\" or \"greedy\"");
  }
  routing.topk_method = method->second;

  RETURN_IF_ERROR(fields.TakeInt("num_experts_per_tok", 1, kMaxExperts, /*required=*/true,
                                 routing.num_experts_per_tok));
  RETURN_IF_ERROR(fields.TakeInt("n_group", 1, kMaxExperts, /*required=*/false, routing.n_group));
  RETURN_IF_ERROR(
      fields.TakeInt("topk_group", 1, kMaxExperts, /*required=*/false, routing.topk_group));
  routing.norm_topk_prob = is_v3;
  RETURN_IF_ERROR(fields.TakeBool("norm_topk_prob", routing.norm_topk_prob));
  double routed_scaling_factor = 1.0;
  RETURN_IF_ERROR(
      fields.TakeDouble("routed_scaling_factor", 0.0, kMaxFactor, routed_scaling_factor));
  routing.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  return absl::OkStatus();
}

absl::Status CheckGroups(const Fields& fields, const ModelConfig& config) {
  const RoutingConfig& routing = config.routing;
  if (config.n_routed_experts % routing.n_group != 0) {
    return fields.Refuse("n_group",
                         absl::StrCat("a divisor of n_routed_experts, ", config.n_routed_experts));
  }
  const int group_size = config.n_routed_experts / routing.n_group;
  if (routing.topk_group > routing.n_group) {
    return fields.Refuse("topk_group", absl::StrCat("at most n_group, ", routing.n_group));
  }
  if (routing.topk_method == TopkMethod::kGreedy && routing.n_group > 1) {
    return fields.Refuse("n_group", "1: topk_method \"greedy\" knows no groups");
  }
  if (routing.topk_method == TopkMethod::kNoauxTc && routing.n_group > 1 && group_size < 2) {
    return fields.Refuse("n_group", "groups of two experts or more: noaux_tc adds the best two");
  }
  const int available = routing.topk_group * group_size;
  if (routing.num_experts_per_tok > available) {
    return fields.Refuse("num_experts_per_tok",
                         absl::StrCat("at most ", available, ", the experts in ",
                                      routing.topk_group, " of ", routing.n_group, " groups"));
  }
  return absl::OkStatus();
}

absl::Status TakeExperts(const Fields& fields, ModelConfig& config) {
  RETURN_IF_ERROR(fields.TakeInt("n_routed_experts", 0, kMaxExperts, /*required=*/false,
                                 config.n_routed_experts));
  if (config.n_routed_experts == 0) return absl::OkStatus();  // dense throughout
  if (int64_t{config.n_routed_experts} * config.num_hidden_layers > kMaxExpertsOfAllLayers) {
    return fields.Refuse("n_routed_experts",
                         absl::StrCat("at most ", kMaxExpertsOfAllLayers, " over all of ",
                                      config.num_hidden_layers, " layers"));
  }

  RETURN_IF_ERROR(fields.TakeInt("moe_intermediate_size", 1, kMaxWidth, /*required=*/true,
                                 config.moe_intermediate_size));
  RETURN_IF_ERROR(fields.TakeInt("n_shared_experts", 0, kMaxSharedExperts, /*required=*/false,
                                 config.n_shared_experts));
  RETURN_IF_ERROR(fields.TakeInt("first_k_dense_replace", 0, kMaxLayers, /*required=*/false,
                                 config.first_k_dense_replace));
  RETURN_IF_ERROR(
      fields.TakeInt("moe_layer_freq", 1, kMaxLayers, /*required=*/false, config.moe_layer_freq));
  RETURN_IF_ERROR(TakeRouting(fields, config));
  return CheckGroups(fields, config);
}

absl::Status TakeYarn(const Fields& fields, YarnScaling& yarn) {
  RETURN_IF_ERROR(fields.RefuseUnknown({"type", "rope_type", "rope_theta", "factor",
                                        "original_max_position_embeddings", "beta_fast",
                                        "beta_slow", "mscale", "mscale_all_dim"}));
  yarn.factor = 0;
  RETURN_IF_ERROR(fields.TakeDouble("factor", 1.0, kMaxFactor, yarn.factor));
  if (yarn.factor == 0) return fields.Refuse("factor", "a number of at least 1");
  RETURN_IF_ERROR(fields.TakeInt("original_max_position_embeddings", 1, kMaxPositions,
                                 /*required=*/true, yarn.original_max_position_embeddings));
  RETURN_IF_ERROR(fields.TakeDouble("beta_fast", 1e-3, kMaxFactor, yarn.beta_fast));
  RETURN_IF_ERROR(fields.TakeDouble("beta_slow", 1e-3, kMaxFactor, yarn.beta_slow));
  if (yarn.beta_fast < yarn.beta_slow) {
    return fields.Refuse("beta_fast", absl::StrCat("at least beta_slow, ", yarn.beta_slow));
  }
  RETURN_IF_ERROR(fields.TakeDouble("mscale", 0.0, 100.0, yarn.mscale));
  return fields.TakeDouble("mscale_all_dim", 0.0, 100.0, yarn.mscale_all_dim);
}

// `name` is rope_scaling, or rope_parameters as newer exporters call it (with rope_theta inside).
absl::Status TakeRotary(const Fields& fields, const char* name, ModelConfig& config) {
  const element* value = fields.Find(name);
  if (value == nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Fields rope, Fields::Of(absl::StrCat("config.json: ", name), ".", *value));
  std::string type, rope_type;
  RETURN_IF_ERROR(rope.TakeString("type", type));
  RETURN_IF_ERROR(rope.TakeString("rope_type", rope_type));
  if (!type.empty() && !rope_type.empty() && type != rope_type) {
    return rope.Refuse("rope_type", absl::StrCat("the same as type, \"", type, "\""));
  }
  const char* type_name = type.empty() ? "rope_type" : "type";
  const std::string& kind = type.empty() ? rope_type : type;
  RETURN_IF_ERROR(rope.TakeDouble("rope_theta", 1.001, 1e12, config.rope_theta));
  if (kind == "yarn") return TakeYarn(rope, config.yarn.emplace());
  if (kind == "default") return rope.RefuseUnknown({"type", "rope_type", "rope_theta"});
  return rope.Refuse(type_name, "\"yarn\", or no rope_scaling at all");
}

absl::Status TakePositions(const Fields& fields, ModelConfig& config) {
  RETURN_IF_ERROR(fields.TakeDouble("rope_theta", 1.001, 1e12, config.rope_theta));
  if (fields.Find("rope_scaling") != nullptr && fields.Find("rope_parameters") != nullptr) {
    return fields.Refuse("rope_parameters", "either this or rope_scaling, not both");
  }
  RETURN_IF_ERROR(TakeRotary(fields, "rope_scaling", config));
  return TakeRotary(fields, "rope_parameters", config);
}

absl::Status TakeQuantization(const Fields& fields, ModelConfig& config) {
  const element* value = fields.Find("quantization_config");
  if (value == nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Fields quantization,
                   Fields::Of("config.json: quantization_config", ".", *value));
  struct Expected {
    const char* name;
    std::initializer_list<const char*> values;  // as JSON, minified
    bool required;
  };
  const Expected expected[] = {
      {"quant_method", {"\"fp8\""}, true},
      {"fmt", {"\"e4m3\""}, false},
      {"activation_scheme", {"\"dynamic\""}, false},
      {"weight_block_size", {"[128,128]"}, true},
      {"scale_fmt", {"\"float\"", "\"ue8m0\""}, false},  // of activations; factors are F32
  };
  std::set<std::string_view> known = {"modules_to_not_convert"};  // each tensor tells its own type
  for (const Expected& field : expected) {
    known.insert(field.name);
    const element* found = quantization.Find(field.name);
    if (found == nullptr && !field.required) continue;
    const std::string text = found == nullptr ? "" : std::string(simdjson::minify(*found));
    if (std::find(field.values.begin(), field.values.end(), text) == field.values.end()) {
      return quantization.Refuse(field.name, absl::StrJoin(field.values, " or "));
    }
  }
  config.fp8_weights = true;
  return quantization.RefuseUnknown(known);
}

// An id, or a list of ids.
absl::Status TakeEosTokens(const Fields& fields, ModelConfig& config) {
  const element* value = fields.Find("eos_token_id");
  if (value == nullptr) return absl::OkStatus();
  const std::string expectation =
      absl::StrCat("an id from 0 to ", config.vocab_size - 1, ", or a list of at most ",
                   kMaxEosTokens, " such ids");
  std::vector<element> ids = {*value};
  if (simdjson::dom::array array; value->get(array) == simdjson::SUCCESS) {
    if (array.size() > kMaxEosTokens) return fields.Refuse("eos_token_id", expectation);
    ids.assign(array.begin(), array.end());
  }
  for (const element& item : ids) {
    int64_t id = 0;
    if (item.get(id) != simdjson::SUCCESS || id < 0 || id >= config.vocab_size) {
      return fields.Refuse("eos_token_id", expectation);
    }
    config.eos_token_ids.push_back(static_cast<int>(id));
  }
  return absl::OkStatus();
}

absl::Status TakeConfig(const Fields& fields, ModelConfig& config) {
  RETURN_IF_ERROR(TakeArchitecture(fields, config));
  RETURN_IF_ERROR(CheckFixedFields(fields));
  RETURN_IF_ERROR(TakeSizes(fields, config));
  RETURN_IF_ERROR(TakeExperts(fields, config));
  RETURN_IF_ERROR(TakePositions(fields, config));
  RETURN_IF_ERROR(TakeQuantization(fields, config));
  RETURN_IF_ERROR(fields.TakeBool("tie_word_embeddings", config.tie_word_embeddings));
  double rms_norm_eps = config.rms_norm_eps;
  RETURN_IF_ERROR(fields.TakeDouble("rms_norm_eps", 1e-12, 1.0, rms_norm_eps));
  config.rms_norm_eps = static_cast<float>(rms_norm_eps);
  return TakeEosTokens(fields, config);
}

// The parser owns what the element views.
absl::StatusOr<element> ParseJson(const char* file_name, std::string_view text,
                                  simdjson::dom::parser& parser) {
  element document;
  const simdjson::error_code error = parser.parse(text.data(), text.size()).get(document);
  if (error == simdjson::SUCCESS) return document;
  return absl::InvalidArgumentError(
      absl::StrCat(file_name, ": not valid JSON: ", simdjson::error_message(error)));
}

}  // namespace

bool ModelConfig::HasMoeLayer() const {
  for (int layer = 0; layer < num_hidden_layers; ++layer) {
    if (IsMoeLayer(layer)) return true;
  }
  return false;
}

bool ModelConfig::HasDenseLayer() const {
  for (int layer = 0; layer < num_hidden_layers; ++layer) {
    if (!IsMoeLayer(layer)) return true;
  }
  return false;
}

double YarnMscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

float ModelConfig::SoftmaxScale() const {
  double scale = 1.0 / std::sqrt(static_cast<double>(qk_head_dim()));
  if (yarn.has_value()) scale *= std::pow(YarnMscale(yarn->factor, yarn->mscale_all_dim), 2);
  return static_cast<float>(scale);
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json,
                                             std::string_view generation_config_json) {
  ModelConfig config;
  simdjson::dom::parser parser;
  ASSIGN_OR_RETURN(const element document, ParseJson("config.json", config_json, parser));
  ASSIGN_OR_RETURN(const Fields fields, Fields::Of("config.json", ": ", document));
  RETURN_IF_ERROR(TakeConfig(fields, config));

  if (!generation_config_json.empty()) {
    simdjson::dom::parser generation_parser;
    ASSIGN_OR_RETURN(
        const element generation,
        ParseJson("generation_config.json", generation_config_json, generation_parser));
    ASSIGN_OR_RETURN(const Fields generation_fields,
                     Fields::Of("generation_config.json", ": ", generation));
    RETURN_IF_ERROR(TakeEosTokens(generation_fields, config));
  }
  std::vector<int>& ids = config.eos_token_ids;
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_directory) {
  ASSIGN_OR_RETURN(const std::string config_json,
                   ReadTextFile(absl::StrCat(model_directory, "/config.json"), kMaxConfigBytes));
  absl::StatusOr<std::string> generation_config_json =
      ReadTextFile(absl::StrCat(model_directory, "/generation_config.json"), kMaxConfigBytes);
  if (!generation_config_json.ok() && !absl::IsNotFound(generation_config_json.status())) {
    return generation_config_json.status();
  }
  return ParseModelConfig(config_json, generation_config_json.value_or(""));
}

}  // namespace fathom
