#include "gateway/openai/completion_format.h"

#include <utility>

#include "gateway/openai/answer_json.h"
#include "gateway/openai/logprobs.h"

namespace fathom {

CompletionFormat::CompletionFormat(CompletionFormatOptions options, TokenNames names)
    : options_(std::move(options)),
      names_(names),
      beginning_(BeginningOf(options_.header, "text_completion")),
      text_offsets_(options_.prompts.size() * options_.n),
      started_(options_.prompts.size() * options_.n) {}

void CompletionFormat::WriteLogprobs(size_t choice, const ChoiceDelta& delta, Part part,
                                     JsonWriter& json) {
  std::vector<TokenRecord> tokens;
  if (part == Part::kPromptAndOutput) {
    const std::vector<uint32_t>& prompt = options_.prompts[choice / options_.n];
    for (size_t i = 0; i < prompt.size(); ++i) {
      const bool known = i > 0 && i <= delta.prompt_logprobs.size();
      tokens.push_back({.token_id = prompt[i],
                        .logprobs = known ? &delta.prompt_logprobs[i - 1] : nullptr,
                        .is_in_text = i >= options_.num_hidden});
    }
  }
  for (size_t i = 0; i < delta.token_ids.size(); ++i) {
    tokens.push_back(
        {delta.token_ids[i], i < delta.logprobs.size() ? &delta.logprobs[i] : nullptr});
  }
  text_offsets_[choice] = WriteCompletionLogprobs(tokens, text_offsets_[choice], names_, json);
}

void CompletionFormat::WriteChoice(size_t choice, const ChoiceDelta& delta, Part part,
                                   JsonWriter& json) {
  std::string text = delta.text;
  if (part == Part::kPromptAndOutput) text.insert(0, options_.echo_texts[choice / options_.n]);
  json.Key("index").Int(static_cast<int64_t>(choice));
  json.Key("text").String(text);
  json.Key("logprobs");
  if (options_.has_logprobs) {
    WriteLogprobs(choice, delta, part, json);
  } else {
    json.Null();
  }
  WriteFinishReason(delta, json);
  WriteStopReason(delta, json);
}

std::string CompletionFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  JsonWriter json(beginning_);
  json.Key("choices").BeginArray();
  for (size_t i = 0; i < choices.size(); ++i) {
    const ChoiceDelta& choice = choices[i];
    json.BeginObject();
    WriteChoice(i, choice, options_.echo ? Part::kPromptAndOutput : Part::kOutput, json);
    json.Key("token_ids");
    WriteTokenIds(options_.return_token_ids ? &choice.token_ids : nullptr, json);
    json.Key("prompt_logprobs");
    if (options_.has_prompt_logprobs) {
      WritePromptLogprobs(choice.prompt_logprobs, names_, json);
    } else {
      json.Null();
    }
    json.Key("prompt_token_ids");
    WriteTokenIds(options_.return_token_ids ? &options_.prompts[i / options_.n] : nullptr, json);
    json.EndObject();
  }
  json.EndArray().Key("service_tier").Null().Key("system_fingerprint").Null();
  json.Key("usage");
  WriteUsageWithDetails(usage, json);
  json.Key("kv_transfer_params").Null().EndObject();
  return json.Take();
}

std::vector<std::string> CompletionFormat::FirstEvents(const std::optional<TokenUsage>&) {
  return {};
}

std::string CompletionFormat::Event(size_t choice, const ChoiceDelta& delta,
                                    const std::optional<TokenUsage>& usage) {
  const bool first = !started_[choice];
  started_[choice] = true;
  JsonWriter json(beginning_);
  json.Key("choices").BeginArray().BeginObject();
  WriteChoice(choice, delta, options_.echo && first ? Part::kPromptAndOutput : Part::kOutput, json);
  json.Key("prompt_token_ids");
  WriteTokenIds(
      options_.return_token_ids && first ? &options_.prompts[choice / options_.n] : nullptr, json);
  json.Key("token_ids");
  WriteTokenIds(options_.return_token_ids ? &delta.token_ids : nullptr, json);
  json.EndObject().EndArray().Key("usage");
  if (usage) {
    WriteUsageWithDetails(*usage, json);
  } else {
    json.Null();
  }
  json.EndObject();
  return json.Take();
}

std::string CompletionFormat::UsageEvent(const TokenUsage& usage) {
  JsonWriter json(beginning_);
  json.Key("choices").BeginArray().EndArray().Key("usage");
  WriteUsageWithDetails(usage, json);
  json.EndObject();
  return json.Take();
}

}  // namespace fathom
