// Text to token ids and back, from the tokenizer.json of a Hugging Face checkpoint.
//
// What is understood: byte-level BPE with DeepSeek's pre-tokenizer (three Split expressions, then
// ByteLevel), added tokens with lstrip and rstrip, no normalizer. Anything else in the file is
// refused at load, by name, rather than tokenized differently from how the model was trained. The
// ids equal those of Hugging Face's `tokenizers`; encoding takes O(n log n) time on any text.
//
// Immutable after Load: every function may be called from any thread.
// Source: huggingface/tokenizers (models/bpe, added_vocabulary, pre_tokenizers/byte_level).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace fathom {

// Whether Encode adds what tokenizer_config.json asks for (add_bos_token, add_eos_token).
// Completions want kAsConfigured; a rendered chat already begins with the text of BOS.
enum class BosPolicy { kAsConfigured, kNone };

class Tokenizer {
 public:
  // Reads `model_dir`/tokenizer.json and, where present, tokenizer_config.json and
  // chat_template.jinja. NotFound when there is no tokenizer.json (such a model is served with
  // token ids only); InvalidArgument when a file is malformed, contradicts itself or asks for
  // something we do not do, naming the file and the field.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir);

  // The same from the text of the files; an empty one is as good as none.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view tokenizer_json,
                                                          std::string_view tokenizer_config_json,
                                                          std::string chat_template);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of `text`, which is UTF-8; bytes that are not read as U+FFFD. The text of an added
  // token (`<｜User｜>`) becomes that token wherever it stands, as in HF.
  std::vector<uint32_t> Encode(std::string_view text, BosPolicy bos_policy) const;

  // The bytes that `id` stands for; often only a part of a character. Empty for an id that the
  // tokenizer does not know (the model's vocabulary is padded). Lives as long as the tokenizer.
  std::string_view BytesOf(uint32_t id) const;

  // Whether decoding with skip_special_tokens leaves `id` out. False for unknown ids.
  bool IsSpecial(uint32_t id) const;

  // The id of the added token whose text is exactly `content`.
  std::optional<uint32_t> FindAddedToken(std::string_view content) const;

  // From tokenizer_config.json; nullopt where it names none.
  std::optional<uint32_t> bos() const;
  std::optional<uint32_t> eos() const;

  // One more than the largest id. The model's vocab_size may be larger.
  uint32_t vocab_size() const;

  // The checkpoint's own chat template, or "". Nothing executes it: chat_encoding.h recognises
  // the layouts it knows by their text.
  const std::string& chat_template() const;

 private:
  struct State;
  explicit Tokenizer(std::unique_ptr<const State> state);

  const std::unique_ptr<const State> state_;
};

}  // namespace fathom
