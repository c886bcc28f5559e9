#include "gateway/text/pre_tokenizer.h"

#include "absl/strings/ascii.h"
#include "gateway/text/unicode.h"
#include "gateway/text/utf8.h"

namespace fathom {
namespace {

using enum CharacterClass;

bool IsLetterOrMark(CharacterClass c) { return c == kLetter || c == kMark; }
bool IsSign(CharacterClass c) { return c == kPunctuation || c == kSymbol; }
bool IsNewline(char32_t c) { return c == '\r' || c == '\n'; }
bool IsIdeograph(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF);
}

// A character of the text and where the next one begins.
struct Character {
  char32_t code_point;
  CharacterClass character_class;
  size_t end;
};

// Text that is known to be valid UTF-8, read by position.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text), classes_(CharacterClasses()) {}

  size_t size() const { return text_.size(); }
  std::string_view Slice(size_t begin, size_t end) const {
    return text_.substr(begin, end - begin);
  }

  Character At(size_t position) const {
    const auto byte = static_cast<unsigned char>(text_[position]);
    if (byte < 0x80) return {byte, classes_[byte], position + 1};
    const Utf8Character character = ReadUtf8(text_.substr(position));
    return {character.code_point, classes_[character.code_point], position + character.bytes};
  }

  // Where the run of characters that satisfy `wanted` ends.
  template <typename Predicate>
  size_t SkipWhile(size_t position, Predicate wanted) const {
    while (position < size()) {
      const Character character = At(position);
      if (!wanted(character)) break;
      position = character.end;
    }
    return position;
  }

 private:
  const std::string_view text_;
  const CharacterClass* const classes_;
};

// The alternatives of kDeepSeekV3Words. Each returns where its match that begins at `begin` ends,
// or `begin` where it has none; `first` is the character there.

// [!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+
size_t MatchSignAndLetters(const Reader& text, size_t begin, const Character& first) {
  if (first.code_point >= 0x80 || !absl::ascii_ispunct(first.code_point)) return begin;
  const size_t end = text.SkipWhile(first.end, [](const Character& c) {
    return c.code_point < 0x80 && absl::ascii_isalpha(c.code_point);
  });
  return end > first.end ? end : begin;
}

// [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
size_t MatchWord(const Reader& text, size_t begin, const Character& first) {
  const auto is_wanted = [](const Character& c) { return IsLetterOrMark(c.character_class); };
  if (is_wanted(first)) return text.SkipWhile(first.end, is_wanted);
  if (IsSign(first.character_class) || IsNewline(first.code_point)) return begin;
  const size_t end = text.SkipWhile(first.end, is_wanted);
  return end > first.end ? end : begin;
}

// ?[\p{P}\p{S}]+[\r\n]*, with a space before the question mark
size_t MatchSigns(const Reader& text, size_t begin, const Character& first) {
  const size_t signs_begin = first.code_point == ' ' ? first.end : begin;
  const size_t signs_end =
      text.SkipWhile(signs_begin, [](const Character& c) { return IsSign(c.character_class); });
  if (signs_end == signs_begin) return begin;
  return text.SkipWhile(signs_end, [](const Character& c) { return IsNewline(c.code_point); });
}

// \s*[\r\n]+ | \s+(?!\S) | \s+
size_t MatchSpaces(const Reader& text, size_t begin, const Character& first) {
  if (first.character_class != kSpace) return begin;
  size_t after_last_newline = begin;
  size_t last_begin = begin;  // of the last white space of the run
  size_t end = begin;
  while (end < text.size()) {
    const Character character = text.At(end);
    if (character.character_class != kSpace) break;
    if (IsNewline(character.code_point)) after_last_newline = character.end;
    last_begin = end;
    end = character.end;
  }
  if (after_last_newline > begin) return after_last_newline;
  // Before a word the last white space stays with it, unless it is all there is.
  return end == text.size() || last_begin == begin ? end : last_begin;
}

size_t MatchAny(const Reader& text, size_t begin) {
  const Character first = text.At(begin);
  for (const auto match : {MatchSignAndLetters, MatchWord, MatchSigns, MatchSpaces}) {
    if (const size_t end = match(text, begin, first); end > begin) return end;
  }
  return begin;
}

// The third expression on one piece of the first two.
void SplitWords(std::string_view piece, absl::FunctionRef<void(std::string_view)> word) {
  const Reader text(piece);
  size_t unmatched_begin = 0;
  size_t position = 0;
  while (position < text.size()) {
    const size_t end = MatchAny(text, position);
    if (end == position) {
      position = text.At(position).end;
      continue;
    }
    if (unmatched_begin < position) word(text.Slice(unmatched_begin, position));
    word(text.Slice(position, end));
    unmatched_begin = position = end;
  }
  if (unmatched_begin < position) word(text.Slice(unmatched_begin, position));
}

// The end of up to three digits that begin at `begin`.
size_t SkipNumber(const Reader& text, size_t begin) {
  size_t end = begin;
  for (int digits = 0; digits < 3 && end < text.size(); ++digits) {
    const Character character = text.At(end);
    if (character.character_class != kNumber) break;
    end = character.end;
  }
  return end;
}

}  // namespace

void PreTokenizeDeepSeekV3(std::string_view text, absl::FunctionRef<void(std::string_view)> word) {
  const Reader reader(text);
  size_t begin = 0;
  while (begin < reader.size()) {
    const Character first = reader.At(begin);
    if (first.character_class == kNumber) {
      // No expression after the first matches a number: this is a word as it is.
      const size_t end = SkipNumber(reader, begin);
      word(reader.Slice(begin, end));
      begin = end;
      continue;
    }
    const bool is_ideograph = IsIdeograph(first.code_point);
    const size_t end = reader.SkipWhile(first.end, [is_ideograph](const Character& c) {
      return c.character_class != kNumber && IsIdeograph(c.code_point) == is_ideograph;
    });
    SplitWords(reader.Slice(begin, end), word);
    begin = end;
  }
}

}  // namespace fathom
