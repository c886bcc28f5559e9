#include "gateway/text/tokenizer.h"

#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/text/added_tokens.h"
#include "gateway/text/byte_pair_encoder.h"
#include "gateway/text/pre_tokenizer.h"
#include "gateway/text/tokenizer_file.h"
#include "gateway/text/utf8.h"
#include "simdjson.h"

namespace fathom {
namespace {

// The text of `path`; NotFound when it cannot be opened.
absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, " cannot be opened"));
  std::ostringstream text;
  text << file.rdbuf();
  if (file.bad() || text.fail()) {
    return absl::InvalidArgumentError(absl::StrCat(path, " cannot be read"));
  }
  return std::move(text).str();
}

// The text of a file that need not be there.
absl::StatusOr<std::string> ReadOptionalFile(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

}  // namespace

struct Tokenizer::State {
  explicit State(TokenizerFile file)
      : added_tokens(std::move(file.added_tokens)),
        encoder(file.byte_ids, file.merges, std::move(file.words)),
        bytes_of_id(std::move(file.bytes_of_id)),
        is_special(bytes_of_id.size()) {
    for (const AddedToken& token : added_tokens.all()) is_special[token.id] = token.special;
  }

  const AddedTokens added_tokens;
  const BytePairEncoder encoder;
  const std::vector<std::string> bytes_of_id;
  std::vector<bool> is_special;
  std::vector<uint32_t> prefix;  // what BosPolicy::kAsConfigured adds
  std::vector<uint32_t> suffix;
  std::optional<uint32_t> bos;
  std::optional<uint32_t> eos;
  std::string chat_template;
};

namespace {

absl::StatusOr<std::optional<uint32_t>> FindSpecialToken(
    const TokenizerFile& file, std::string_view key, const std::optional<std::string>& content) {
  if (!content.has_value()) return std::optional<uint32_t>();
  for (const AddedToken& token : file.added_tokens) {
    if (token.content == *content) return std::optional(token.id);
  }
  const auto token = file.ids.find(*content);
  if (token != file.ids.end()) return std::optional(token->second);
  return absl::InvalidArgumentError(absl::StrCat("tokenizer_config.json: ", std::string(key),
                                                 " is \"", *content,
                                                 "\", which tokenizer.json does not have"));
}

// What surrounds a text: tokenizer_config.json decides where it speaks, else the post-processor.
absl::StatusOr<std::vector<uint32_t>> Surroundings(std::string_view key, std::optional<bool> wanted,
                                                   std::optional<uint32_t> token,
                                                   std::vector<uint32_t> from_template) {
  if (!wanted.has_value()) return from_template;
  if (!*wanted) return std::vector<uint32_t>();
  if (token.has_value()) return std::vector<uint32_t>{*token};
  return absl::InvalidArgumentError(absl::StrCat("tokenizer_config.json: add_", std::string(key),
                                                 " is true, but there is no ", std::string(key)));
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const State> state) : state_(std::move(state)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const std::string json, ReadFile(absl::StrCat(model_dir, "/tokenizer.json")));
  ASSIGN_OR_RETURN(const std::string config,
                   ReadOptionalFile(absl::StrCat(model_dir, "/tokenizer_config.json")));
  ASSIGN_OR_RETURN(std::string chat_template,
                   ReadOptionalFile(absl::StrCat(model_dir, "/chat_template.jinja")));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      Parse(json, config, std::move(chat_template));
  if (tokenizer.ok()) return tokenizer;
  return absl::Status(tokenizer.status().code(),
                      absl::StrCat(model_dir, "/", tokenizer.status().message()));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view tokenizer_json,
                                                            std::string_view tokenizer_config_json,
                                                            std::string chat_template) {
  ASSIGN_OR_RETURN(TokenizerFile file, ParseTokenizerFile(tokenizer_json));
  TokenizerConfig config;
  if (!tokenizer_config_json.empty()) {
    ASSIGN_OR_RETURN(config, ParseTokenizerConfig(tokenizer_config_json));
  }
  ASSIGN_OR_RETURN(const auto bos, FindSpecialToken(file, "bos_token", config.bos_token));
  ASSIGN_OR_RETURN(const auto eos, FindSpecialToken(file, "eos_token", config.eos_token));
  ASSIGN_OR_RETURN(auto prefix,
                   Surroundings("bos_token", config.add_bos_token, bos, file.template_prefix));
  ASSIGN_OR_RETURN(auto suffix,
                   Surroundings("eos_token", config.add_eos_token, eos, file.template_suffix));

  auto state = std::make_unique<State>(std::move(file));
  state->bos = bos;
  state->eos = eos;
  state->prefix = std::move(prefix);
  state->suffix = std::move(suffix);
  state->chat_template =
      chat_template.empty() ? std::move(config.chat_template) : std::move(chat_template);
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(state)));
}

std::vector<uint32_t> Tokenizer::Encode(std::string_view text, BosPolicy bos_policy) const {
  std::string repaired;
  if (!simdjson::validate_utf8(text.data(), text.size())) {
    repaired = ReplaceInvalidUtf8(text);
    text = repaired;
  }

  std::vector<uint32_t> ids;
  if (bos_policy == BosPolicy::kAsConfigured) ids = state_->prefix;
  BytePairEncoder::Workspace workspace;
  state_->added_tokens.Split(
      text,
      [&](std::string_view piece) {
        PreTokenizeDeepSeekV3(
            piece, [&](std::string_view word) { state_->encoder.Encode(word, workspace, ids); });
      },
      [&](uint32_t token) { ids.push_back(token); });
  if (bos_policy == BosPolicy::kAsConfigured) {
    ids.insert(ids.end(), state_->suffix.begin(), state_->suffix.end());
  }
  return ids;
}

std::string_view Tokenizer::BytesOf(uint32_t id) const {
  return id < vocab_size() ? std::string_view(state_->bytes_of_id[id]) : std::string_view();
}

bool Tokenizer::IsSpecial(uint32_t id) const { return id < vocab_size() && state_->is_special[id]; }

std::optional<uint32_t> Tokenizer::FindAddedToken(std::string_view content) const {
  const AddedToken* token = state_->added_tokens.Find(content);
  return token == nullptr ? std::nullopt : std::optional(token->id);
}

std::optional<uint32_t> Tokenizer::bos() const { return state_->bos; }
std::optional<uint32_t> Tokenizer::eos() const { return state_->eos; }
uint32_t Tokenizer::vocab_size() const { return static_cast<uint32_t>(state_->bytes_of_id.size()); }
const std::string& Tokenizer::chat_template() const { return state_->chat_template; }

}  // namespace fathom
