#include "gateway/text/detokenizer.h"

#include <algorithm>

#include "gateway/text/utf8.h"

namespace fathom {

void Utf8Decoder::Push(std::string_view bytes, std::string& text) {
  // Completes the kept character first, byte by byte, so that the loop below sees whole ones.
  while (num_pending_ > 0 && !bytes.empty()) {
    char joined[4];
    std::copy_n(pending_, num_pending_, joined);
    joined[num_pending_] = bytes.front();
    const Utf8Character character = ReadUtf8({joined, static_cast<size_t>(num_pending_) + 1});
    if (character.status == Utf8Status::kIncomplete) {
      pending_[num_pending_++] = bytes.front();
      bytes.remove_prefix(1);
      continue;
    }
    // Whether the new byte completes the character or cannot: what was kept is dealt with.
    if (character.status == Utf8Status::kValid) {
      text.append(joined, character.bytes);
      bytes.remove_prefix(1);
    } else {
      text.append(kReplacementCharacter);
    }
    num_pending_ = 0;
  }

  while (!bytes.empty()) {
    const Utf8Character character = ReadUtf8(bytes);
    if (character.status == Utf8Status::kIncomplete) {
      num_pending_ = static_cast<int>(bytes.copy(pending_, sizeof(pending_)));
      return;
    }
    if (character.status == Utf8Status::kValid) {
      text.append(bytes.substr(0, character.bytes));
    } else {
      text.append(kReplacementCharacter);
    }
    bytes.remove_prefix(character.bytes);
  }
}

void Utf8Decoder::Finish(std::string& text) {
  if (num_pending_ > 0) text.append(kReplacementCharacter);
  num_pending_ = 0;
}

std::string StreamingDetokenizer::Push(absl::Span<const uint32_t> ids) {
  std::string text;
  for (const uint32_t id : ids) {
    if (options_.skip_special_tokens && tokenizer_.IsSpecial(id)) continue;
    decoder_.Push(tokenizer_.BytesOf(id), text);
  }
  return text;
}

std::string StreamingDetokenizer::Finish() {
  std::string text;
  decoder_.Finish(text);
  return text;
}

std::string Decode(const Tokenizer& tokenizer, absl::Span<const uint32_t> ids,
                   DetokenizerOptions options) {
  StreamingDetokenizer detokenizer(tokenizer, options);
  std::string text = detokenizer.Push(ids);
  text.append(detokenizer.Finish());
  return text;
}

}  // namespace fathom
