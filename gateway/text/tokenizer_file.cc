#include "gateway/text/tokenizer_file.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/text/byte_level.h"
#include "gateway/text/json_node.h"
#include "gateway/text/pre_tokenizer.h"

namespace fathom {
namespace {

// What the later stages look up while the file is read.
using Ids = absl::flat_hash_map<std::string, uint32_t>;

absl::StatusOr<JsonNode> ParseJson(simdjson::dom::parser& parser, std::string_view json,
                                   std::string file) {
  if (json.size() > kMaxTokenizerFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, " has ", json.size(), " bytes, limit ", kMaxTokenizerFileBytes));
  }
  simdjson::dom::element root;
  if (const auto error = parser.parse(json.data(), json.size()).get(root); error) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, " is not valid JSON: ", simdjson::error_message(error)));
  }
  return JsonNode(root, std::move(file));
}

absl::StatusOr<std::string_view> TypeOf(const JsonNode& node) {
  ASSIGN_OR_RETURN(const JsonNode type, node.Get("type"));
  return type.AsString();
}

absl::Status ExpectType(const JsonNode& node, std::string_view expected) {
  ASSIGN_OR_RETURN(const std::string_view type, TypeOf(node));
  if (type == expected) return absl::OkStatus();
  return node.Error(absl::StrCat("has type \"", std::string(type), "\", only \"",
                                 std::string(expected), "\" is supported"));
}

// Refuses a switch that would change ids in a way this tokenizer does not follow.
absl::Status ExpectBool(const JsonNode& node, std::string_view key, bool expected) {
  ASSIGN_OR_RETURN(const bool value, node.BoolOr(key, expected));
  if (value == expected) return absl::OkStatus();
  return node.Error(absl::StrCat(".", std::string(key), " is ", value ? "true" : "false",
                                 ", which is not supported"));
}

// Refuses a field that has any value but null and "".
absl::Status ExpectEmpty(const JsonNode& node, std::string_view key) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> field, node.Find(key));
  if (!field.has_value() || field->Shown() == "\"\"") return absl::OkStatus();
  return field->Error(absl::StrCat("is ", field->Shown(), ", which is not supported"));
}

absl::StatusOr<uint32_t> ReadId(const JsonNode& node) {
  ASSIGN_OR_RETURN(const uint64_t id, node.AsUint64());
  if (id >= kMaxTokenizerIds) {
    return node.Error(absl::StrCat("is ", id, ", ids must be below ", kMaxTokenizerIds));
  }
  return static_cast<uint32_t>(id);
}

// A normalizer would change the text; all we take is none, or an empty sequence of them.
absl::Status CheckNormalizer(const JsonNode& root) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> normalizer, root.Find("normalizer"));
  if (!normalizer.has_value()) return absl::OkStatus();
  RETURN_IF_ERROR(ExpectType(*normalizer, "Sequence"));
  ASSIGN_OR_RETURN(const JsonNode list, normalizer->Get("normalizers"));
  ASSIGN_OR_RETURN(const simdjson::dom::array normalizers, list.AsArray());
  if (normalizers.size() == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string_view type, TypeOf(list.Item(0, normalizers.at(0).value())));
  return list.Error(
      absl::StrCat("has the normalizer \"", std::string(type), "\", none is supported"));
}

absl::Status CheckSplit(const JsonNode& split, std::string_view regex) {
  RETURN_IF_ERROR(ExpectType(split, "Split"));
  RETURN_IF_ERROR(ExpectBool(split, "invert", false));
  ASSIGN_OR_RETURN(const JsonNode behavior, split.Get("behavior"));
  if (behavior.Shown() != "\"Isolated\"") {
    return behavior.Error(
        absl::StrCat("is ", behavior.Shown(), ", only \"Isolated\" is supported"));
  }
  ASSIGN_OR_RETURN(const JsonNode pattern, split.Get("pattern"));
  ASSIGN_OR_RETURN(const JsonNode expression, pattern.Get("Regex"));
  ASSIGN_OR_RETURN(const std::string_view text, expression.AsString());
  if (text == regex) return absl::OkStatus();
  return expression.Error(
      absl::StrCat("is ", expression.Shown(), ", which is not DeepSeek-V3's pre-tokenizer"));
}

absl::Status CheckPreTokenizer(const JsonNode& root) {
  constexpr std::string_view kRegexes[] = {kDeepSeekV3Numbers, kDeepSeekV3Ideographs,
                                           kDeepSeekV3Words};
  constexpr size_t kNumSplits = std::size(kRegexes);
  ASSIGN_OR_RETURN(const JsonNode pre_tokenizer, root.Get("pre_tokenizer"));
  RETURN_IF_ERROR(ExpectType(pre_tokenizer, "Sequence"));
  ASSIGN_OR_RETURN(const JsonNode list, pre_tokenizer.Get("pretokenizers"));
  ASSIGN_OR_RETURN(const simdjson::dom::array steps, list.AsArray());
  size_t index = 0;
  for (const auto element : steps) {
    const JsonNode step = list.Item(index, element);
    if (index < kNumSplits) {
      RETURN_IF_ERROR(CheckSplit(step, kRegexes[index]));
    } else if (index == kNumSplits) {
      RETURN_IF_ERROR(ExpectType(step, "ByteLevel"));
      RETURN_IF_ERROR(ExpectBool(step, "add_prefix_space", false));
      RETURN_IF_ERROR(ExpectBool(step, "use_regex", false));
    }
    ++index;
  }
  if (index == kNumSplits + 1) return absl::OkStatus();
  return list.Error(
      absl::StrCat("has ", index, " steps, DeepSeek-V3's pre-tokenizer has ", kNumSplits + 1));
}

absl::Status CheckModel(const JsonNode& model) {
  RETURN_IF_ERROR(ExpectType(model, "BPE"));
  RETURN_IF_ERROR(ExpectEmpty(model, "dropout"));
  RETURN_IF_ERROR(ExpectEmpty(model, "continuing_subword_prefix"));
  RETURN_IF_ERROR(ExpectEmpty(model, "end_of_word_suffix"));
  RETURN_IF_ERROR(ExpectBool(model, "byte_fallback", false));
  RETURN_IF_ERROR(ExpectBool(model, "ignore_merges", false));
  return absl::OkStatus();
}

// Records that `id` is a token of its own and what its bytes are. As in HF's decoder, text that
// is not spelled in bytes stands for itself.
absl::Status AddId(const JsonNode& node, uint32_t id, std::string_view spelled,
                   TokenizerFile& file) {
  if (spelled.empty()) return node.Error("is a token without text");
  if (file.bytes_of_id.size() <= id) file.bytes_of_id.resize(id + 1);
  if (!file.bytes_of_id[id].empty()) {
    return node.Error(absl::StrCat("has id ", id, ", which another token has too"));
  }
  file.bytes_of_id[id] = BytesFromSpelling(spelled).value_or(std::string(spelled));
  return absl::OkStatus();
}

absl::Status ReadVocabulary(const JsonNode& model, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const JsonNode vocab, model.Get("vocab"));
  ASSIGN_OR_RETURN(const simdjson::dom::object entries, vocab.AsObject());
  file.ids.reserve(entries.size());
  for (const auto& [spelled, value] : entries) {
    const JsonNode entry = vocab.Member(spelled, value);
    ASSIGN_OR_RETURN(const uint32_t id, ReadId(entry));
    if (spelled.size() > kMaxTokenBytes) {
      return entry.Error(absl::StrCat("has ", spelled.size(), " bytes, limit ", kMaxTokenBytes));
    }
    if (!file.ids.emplace(spelled, id).second) return entry.Error("is there twice");
    RETURN_IF_ERROR(AddId(entry, id, spelled, file));
    if (std::optional<std::string> bytes = BytesFromSpelling(spelled); bytes.has_value()) {
      file.words.push_back({*std::move(bytes), id});
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::string spelled = SpellByte(static_cast<uint8_t>(byte));
    const auto token = file.ids.find(spelled);
    if (token == file.ids.end()) {
      return vocab.Error(absl::StrCat("has no token for byte ", byte, " (\"", spelled, "\")"));
    }
    file.byte_ids[byte] = token->second;
  }
  return absl::OkStatus();
}

// A merge is "left right" in older files and ["left", "right"] in newer ones.
absl::StatusOr<std::pair<std::string_view, std::string_view>> ReadPair(const JsonNode& node) {
  if (node.IsString()) {
    ASSIGN_OR_RETURN(const std::string_view pair, node.AsString());
    const size_t space = pair.find(' ');
    if (space == std::string_view::npos || pair.find(' ', space + 1) != std::string_view::npos) {
      return node.Error(absl::StrCat("is ", node.Shown(), ", expected two tokens"));
    }
    return std::pair(pair.substr(0, space), pair.substr(space + 1));
  }
  ASSIGN_OR_RETURN(const simdjson::dom::array pair, node.AsArray());
  if (pair.size() != 2) return node.Error("is not two tokens");
  ASSIGN_OR_RETURN(const std::string_view left, node.Item(0, pair.at(0).value()).AsString());
  ASSIGN_OR_RETURN(const std::string_view right, node.Item(1, pair.at(1).value()).AsString());
  return std::pair(left, right);
}

absl::StatusOr<uint32_t> FindToken(const JsonNode& merge, std::string_view spelled,
                                   const Ids& ids) {
  const auto token = ids.find(std::string(spelled));
  if (token != ids.end()) return token->second;
  constexpr size_t kMaxShown = 100;
  return merge.Error(absl::StrCat("needs the token \"", std::string(spelled.substr(0, kMaxShown)),
                                  "\", which model.vocab does not have"));
}

absl::Status ReadMerges(const JsonNode& model, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const JsonNode list, model.Get("merges"));
  ASSIGN_OR_RETURN(const simdjson::dom::array merges, list.AsArray());
  absl::flat_hash_set<std::pair<uint32_t, uint32_t>> pairs;
  size_t index = 0;
  for (const auto element : merges) {
    const JsonNode merge = list.Item(index++, element);
    ASSIGN_OR_RETURN(const auto pair, ReadPair(merge));
    ASSIGN_OR_RETURN(const uint32_t left, FindToken(merge, pair.first, file.ids));
    ASSIGN_OR_RETURN(const uint32_t right, FindToken(merge, pair.second, file.ids));
    const std::string spelled = absl::StrCat(std::string(pair.first), std::string(pair.second));
    ASSIGN_OR_RETURN(const uint32_t joined, FindToken(merge, spelled, file.ids));
    if (!pairs.emplace(left, right).second) return merge.Error("is there twice");
    file.merges.push_back({.left = left, .right = right, .joined = joined});
  }
  return absl::OkStatus();
}

absl::StatusOr<AddedToken> ReadAddedToken(const JsonNode& node) {
  ASSIGN_OR_RETURN(const JsonNode id, node.Get("id"));
  ASSIGN_OR_RETURN(const JsonNode content, node.Get("content"));
  AddedToken token;
  ASSIGN_OR_RETURN(token.id, ReadId(id));
  ASSIGN_OR_RETURN(const std::string_view text, content.AsString());
  if (text.empty() || text.size() > AddedToken::kMaxBytes) {
    return content.Error(
        absl::StrCat("has ", text.size(), " bytes, expected 1 to ", AddedToken::kMaxBytes));
  }
  token.content = std::string(text);
  RETURN_IF_ERROR(ExpectBool(node, "single_word", false));
  ASSIGN_OR_RETURN(token.lstrip, node.BoolOr("lstrip", false));
  ASSIGN_OR_RETURN(token.rstrip, node.BoolOr("rstrip", false));
  ASSIGN_OR_RETURN(token.special, node.BoolOr("special", false));
  ASSIGN_OR_RETURN(token.normalized, node.BoolOr("normalized", !token.special));
  return token;
}

absl::Status ReadAddedTokens(const JsonNode& root, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> list, root.Find("added_tokens"));
  if (!list.has_value()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const simdjson::dom::array entries, list->AsArray());
  absl::flat_hash_set<std::string> contents;
  for (const auto element : entries) {
    const JsonNode node = list->Item(file.added_tokens.size(), element);
    ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken(node));
    if (!contents.insert(token.content).second) {
      return node.Error(absl::StrCat("(\"", token.content, "\") is there twice"));
    }
    // A token may be in model.vocab as well, then it is the same one.
    const auto known = file.ids.find(token.content);
    if (known == file.ids.end()) {
      RETURN_IF_ERROR(AddId(node, token.id, token.content, file));
    } else if (known->second != token.id) {
      return node.Error(absl::StrCat("(\"", token.content, "\") has id ", token.id,
                                     ", but model.vocab says ", known->second));
    }
    file.added_tokens.push_back(std::move(token));
  }
  return absl::OkStatus();
}

// The ids of one special token of a template, which names it; they stand beside the template.
absl::Status AppendTemplateToken(const JsonNode& processor, const JsonNode& piece,
                                 std::vector<uint32_t>& ids) {
  ASSIGN_OR_RETURN(const JsonNode name, piece.Get("id"));
  ASSIGN_OR_RETURN(const std::string_view token, name.AsString());
  ASSIGN_OR_RETURN(const JsonNode all, processor.Get("special_tokens"));
  ASSIGN_OR_RETURN(const JsonNode entry, all.Get(token));
  ASSIGN_OR_RETURN(const JsonNode list, entry.Get("ids"));
  ASSIGN_OR_RETURN(const simdjson::dom::array elements, list.AsArray());
  for (const auto element : elements) {
    ASSIGN_OR_RETURN(const uint32_t id, ReadId(list.Item(0, element)));
    ids.push_back(id);
  }
  return absl::OkStatus();
}

absl::Status ReadTemplate(const JsonNode& processor, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const JsonNode list, processor.Get("single"));
  ASSIGN_OR_RETURN(const simdjson::dom::array pieces, list.AsArray());
  int num_sequences = 0;
  size_t index = 0;
  for (const auto element : pieces) {
    const JsonNode node = list.Item(index++, element);
    ASSIGN_OR_RETURN(const std::optional<JsonNode> special, node.Find("SpecialToken"));
    if (special.has_value()) {
      auto& ids = num_sequences == 0 ? file.template_prefix : file.template_suffix;
      RETURN_IF_ERROR(AppendTemplateToken(processor, *special, ids));
    } else {
      RETURN_IF_ERROR(node.Get("Sequence").status());
      ++num_sequences;
    }
  }
  if (num_sequences == 1) return absl::OkStatus();
  return list.Error(absl::StrCat("has the text ", num_sequences, " times, expected once"));
}

// ByteLevel changes offsets only; a template adds tokens around the text.
absl::Status ReadPostProcessor(const JsonNode& processor, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const std::string_view type, TypeOf(processor));
  if (type == "ByteLevel") return absl::OkStatus();
  if (type == "TemplateProcessing") return ReadTemplate(processor, file);
  return processor.Error(absl::StrCat("has type \"", std::string(type),
                                      "\", only ByteLevel and TemplateProcessing are supported"));
}

absl::Status ReadPostProcessors(const JsonNode& root, TokenizerFile& file) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> processor, root.Find("post_processor"));
  if (!processor.has_value()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string_view type, TypeOf(*processor));
  if (type != "Sequence") return ReadPostProcessor(*processor, file);
  ASSIGN_OR_RETURN(const JsonNode list, processor->Get("processors"));
  ASSIGN_OR_RETURN(const simdjson::dom::array steps, list.AsArray());
  size_t index = 0;
  for (const auto element : steps) {
    RETURN_IF_ERROR(ReadPostProcessor(list.Item(index++, element), file));
  }
  return absl::OkStatus();
}

absl::Status CheckIds(const JsonNode& root, const TokenizerFile& file) {
  for (size_t id = 0; id < file.bytes_of_id.size(); ++id) {
    if (file.bytes_of_id[id].empty()) {
      return root.Error(absl::StrCat("has no token with id ", id, ", but one with id ",
                                     file.bytes_of_id.size() - 1));
    }
  }
  for (const auto& ids : {file.template_prefix, file.template_suffix}) {
    for (const uint32_t id : ids) {
      if (id < file.bytes_of_id.size()) continue;
      return root.Error(absl::StrCat("post_processor names id ", id, ", which no token has"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<std::string>> ReadSpecialToken(const JsonNode& root,
                                                            std::string_view key) {
  ASSIGN_OR_RETURN(std::optional<JsonNode> token, root.Find(key));
  if (!token.has_value()) return std::optional<std::string>();
  if (!token->IsString()) {
    ASSIGN_OR_RETURN(token, token->Get("content"));
  }
  ASSIGN_OR_RETURN(const std::string_view text, token->AsString());
  return std::optional(std::string(text));
}

absl::StatusOr<std::optional<bool>> ReadSwitch(const JsonNode& root, std::string_view key) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> field, root.Find(key));
  if (!field.has_value()) return std::optional<bool>();
  ASSIGN_OR_RETURN(const bool value, field->AsBool());
  return std::optional(value);
}

// One template, or a list of {"name", "template"}.
absl::StatusOr<std::string> ReadChatTemplate(const JsonNode& root) {
  ASSIGN_OR_RETURN(const std::optional<JsonNode> field, root.Find("chat_template"));
  if (!field.has_value()) return std::string();
  if (!field->IsArray()) {
    ASSIGN_OR_RETURN(const std::string_view text, field->AsString());
    return std::string(text);
  }
  ASSIGN_OR_RETURN(const simdjson::dom::array named, field->AsArray());
  for (const auto element : named) {
    const JsonNode node = field->Item(0, element);
    ASSIGN_OR_RETURN(const JsonNode name, node.Get("name"));
    if (name.Shown() != "\"default\"") continue;
    ASSIGN_OR_RETURN(const JsonNode body, node.Get("template"));
    ASSIGN_OR_RETURN(const std::string_view text, body.AsString());
    return std::string(text);
  }
  return std::string();
}

}  // namespace

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json) {
  simdjson::dom::parser parser;
  ASSIGN_OR_RETURN(const JsonNode root, ParseJson(parser, json, "tokenizer.json"));
  RETURN_IF_ERROR(CheckNormalizer(root));
  RETURN_IF_ERROR(CheckPreTokenizer(root));
  ASSIGN_OR_RETURN(const JsonNode decoder, root.Get("decoder"));
  RETURN_IF_ERROR(ExpectType(decoder, "ByteLevel"));
  ASSIGN_OR_RETURN(const JsonNode model, root.Get("model"));
  RETURN_IF_ERROR(CheckModel(model));

  TokenizerFile file;
  RETURN_IF_ERROR(ReadVocabulary(model, file));
  RETURN_IF_ERROR(ReadMerges(model, file));
  RETURN_IF_ERROR(ReadAddedTokens(root, file));
  RETURN_IF_ERROR(ReadPostProcessors(root, file));
  RETURN_IF_ERROR(CheckIds(root, file));
  return file;
}

absl::StatusOr<TokenizerConfig> ParseTokenizerConfig(std::string_view json) {
  simdjson::dom::parser parser;
  ASSIGN_OR_RETURN(const JsonNode root, ParseJson(parser, json, "tokenizer_config.json"));
  TokenizerConfig config;
  ASSIGN_OR_RETURN(config.add_bos_token, ReadSwitch(root, "add_bos_token"));
  ASSIGN_OR_RETURN(config.add_eos_token, ReadSwitch(root, "add_eos_token"));
  ASSIGN_OR_RETURN(config.bos_token, ReadSpecialToken(root, "bos_token"));
  ASSIGN_OR_RETURN(config.eos_token, ReadSpecialToken(root, "eos_token"));
  ASSIGN_OR_RETURN(config.chat_template, ReadChatTemplate(root));
  return config;
}

}  // namespace fathom
