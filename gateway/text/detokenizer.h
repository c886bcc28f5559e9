// Token ids back to text, at once or as they arrive.
//
// A token may hold only a part of a character, so a stream of tokens is decoded with up to three
// bytes of memory. Bytes that are not UTF-8 become U+FFFD, one for each maximal part of a
// sequence (Unicode 15 §3.9), which is what Hugging Face's decode prints. Ids the tokenizer does
// not know decode to nothing.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

struct DetokenizerOptions {
  bool skip_special_tokens = true;  // leave out BOS, EOS and the like
};

// Bytes that arrive in pieces, as UTF-8 that is always valid. Not thread-safe.
class Utf8Decoder {
 public:
  // Appends to `text` every character that is certain now; the bytes of one that is not yet
  // complete are kept for the next call.
  void Push(std::string_view bytes, std::string& text);

  // The end: an incomplete character becomes one U+FFFD. Ready for another text afterwards.
  void Finish(std::string& text);

 private:
  char pending_[3];  // a proper prefix of a well-formed sequence
  int num_pending_ = 0;
};

// The text of one choice while it is generated. The pieces joined, with Finish's, equal Decode()
// of all the ids, however they are cut. `tokenizer` must outlive this. Not thread-safe.
class StreamingDetokenizer {
 public:
  StreamingDetokenizer(const Tokenizer& tokenizer, DetokenizerOptions options)
      : tokenizer_(tokenizer), options_(options) {}

  // The text that `ids` complete; possibly "", never half a character.
  std::string Push(absl::Span<const uint32_t> ids);

  // What is left at the end: "" or one U+FFFD.
  std::string Finish();

 private:
  const Tokenizer& tokenizer_;
  const DetokenizerOptions options_;
  Utf8Decoder decoder_;
};

// All of `ids` as text. Thread-safe.
std::string Decode(const Tokenizer& tokenizer, absl::Span<const uint32_t> ids,
                   DetokenizerOptions options);

}  // namespace fathom
