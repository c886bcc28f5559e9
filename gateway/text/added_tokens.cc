#include "gateway/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "gateway/text/unicode.h"
#include "gateway/text/utf8.h"

namespace fathom {
namespace {

bool IsContinuationByte(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

size_t SkipSpacesForward(std::string_view text, size_t begin) {
  while (begin < text.size()) {
    const Utf8Character character = ReadUtf8(text.substr(begin));
    if (ClassOf(character.code_point) != CharacterClass::kSpace) break;
    begin += character.bytes;
  }
  return begin;
}

// Not further than `limit`.
size_t SkipSpacesBackward(std::string_view text, size_t end, size_t limit) {
  while (end > limit) {
    size_t begin = end - 1;
    while (begin > limit && IsContinuationByte(text[begin])) --begin;
    if (ClassOf(ReadUtf8(text.substr(begin)).code_point) != CharacterClass::kSpace) break;
    end = begin;
  }
  return end;
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    CHECK(!token.content.empty() && token.content.size() <= AddedToken::kMaxBytes) << token.id;
    Pass& pass = token.normalized ? normalized_ : verbatim_;
    pass.contents.Insert(token.content, static_cast<int>(i));
    pass.is_first_byte[static_cast<unsigned char>(token.content.front())] = true;
  }
}

const AddedToken* AddedTokens::Find(std::string_view content) const {
  for (const Pass* pass : {&verbatim_, &normalized_}) {
    const ByteTrie::Match match = pass->contents.LongestPrefixOf(content);
    if (match.value != ByteTrie::kNoValue && match.bytes == content.size()) {
      return &tokens_[match.value];
    }
  }
  return nullptr;
}

void AddedTokens::Split(std::string_view text, absl::FunctionRef<void(std::string_view)> text_piece,
                        absl::FunctionRef<void(uint32_t)> token) const {
  SplitPass(
      verbatim_, text,
      [&](std::string_view piece) { SplitPass(normalized_, piece, text_piece, token); }, token);
}

void AddedTokens::SplitPass(const Pass& pass, std::string_view text,
                            absl::FunctionRef<void(std::string_view)> text_piece,
                            absl::FunctionRef<void(uint32_t)> token) const {
  size_t piece_begin = 0;  // everything before belongs to a token or was passed on
  size_t position = 0;
  while (position < text.size()) {
    if (!pass.is_first_byte[static_cast<unsigned char>(text[position])]) {
      ++position;
      continue;
    }
    const ByteTrie::Match match = pass.contents.LongestPrefixOf(text.substr(position));
    if (match.value == ByteTrie::kNoValue) {
      ++position;
      continue;
    }
    const AddedToken& found = tokens_[match.value];
    size_t begin = position;
    size_t end = position + match.bytes;
    if (found.lstrip) begin = SkipSpacesBackward(text, begin, piece_begin);
    if (found.rstrip) end = SkipSpacesForward(text, end);
    if (begin > piece_begin) text_piece(text.substr(piece_begin, begin - piece_begin));
    token(found.id);
    piece_begin = position = end;
  }
  if (piece_begin < text.size()) text_piece(text.substr(piece_begin));
}

}  // namespace fathom
