// Any bytes: their tokens are those of the repaired text, which the tokens' text is again, however
// the tokens are cut.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "gateway/text/detokenizer.h"
#include "gateway/text/tokenizer.h"
#include "gateway/text/utf8.h"

namespace fathom {
namespace {

const Tokenizer& TheTokenizer() {
  static const Tokenizer& tokenizer =
      *Tokenizer::Load("tests/golden/tokenizer_tiny").value().release();
  return tokenizer;
}

void Check(std::string_view bytes) {
  const Tokenizer& tokenizer = TheTokenizer();
  const std::vector<uint32_t> ids = tokenizer.Encode(bytes, BosPolicy::kNone);
  const std::string text = ReplaceInvalidUtf8(bytes);
  CHECK(tokenizer.Encode(text, BosPolicy::kNone) == ids);
  const DetokenizerOptions whole{.skip_special_tokens = false};
  CHECK(Decode(tokenizer, ids, whole) == text);
  StreamingDetokenizer streaming(tokenizer, whole);
  std::string streamed;
  for (const uint32_t id : ids) streamed += streaming.Push({&id, 1});
  CHECK(streamed + streaming.Finish() == text);
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fathom::Check({reinterpret_cast<const char*>(data), size});
  return 0;
}
