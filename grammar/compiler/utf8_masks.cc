#include "grammar/compiler/utf8_masks.h"

#include <algorithm>
#include <optional>

namespace fathom {
namespace {

enum : Utf8Masks::State {
  kStart,
  kOneMore,
  kTwoMore,
  kThreeMore,
  kAfterE0,  // no overlong forms
  kAfterEd,  // no surrogates
  kAfterF0,  // no overlong forms
  kAfterF4,  // nothing above U+10FFFF
};

std::optional<Utf8Masks::State> Begin(uint8_t byte) {
  if (byte < 0x80) return kStart;
  if (byte < 0xc2 || byte > 0xf4) return std::nullopt;
  if (byte < 0xe0) return kOneMore;
  if (byte == 0xe0) return kAfterE0;
  if (byte == 0xed) return kAfterEd;
  if (byte < 0xf0) return kTwoMore;
  if (byte == 0xf0) return kAfterF0;
  return byte == 0xf4 ? kAfterF4 : kThreeMore;
}

std::optional<Utf8Masks::State> Next(Utf8Masks::State state, uint8_t byte) {
  if (state == kStart) return Begin(byte);
  const uint8_t low = state == kAfterE0 ? 0xa0 : state == kAfterF0 ? 0x90 : 0x80;
  const uint8_t high = state == kAfterEd ? 0x9f : state == kAfterF4 ? 0x8f : 0xbf;
  if (byte < low || byte > high) return std::nullopt;
  if (state == kOneMore) return kStart;
  return state == kTwoMore || state == kAfterE0 || state == kAfterEd ? kOneMore : kTwoMore;
}

std::optional<Utf8Masks::State> Walk(Utf8Masks::State state, std::string_view bytes) {
  for (const char byte : bytes) {
    const std::optional<Utf8Masks::State> next = Next(state, static_cast<uint8_t>(byte));
    if (!next) return std::nullopt;
    state = *next;
  }
  return state;
}

}  // namespace

Utf8Masks::Utf8Masks(const std::vector<std::string>& bytes_of_id) : bytes_of_id_(bytes_of_id) {
  const size_t words = (bytes_of_id.size() + 31) / 32;
  for (int state = 0; state < kNumStates; ++state) {
    std::vector<uint32_t>& mask = may_follow_[state];
    mask.resize(words);
    for (size_t id = 0; id < bytes_of_id.size(); ++id) {
      if (Walk(static_cast<State>(state), bytes_of_id[id])) mask[id / 32] |= uint32_t{1} << id % 32;
    }
  }
}

Utf8Masks::State Utf8Masks::After(State state, int32_t token_id) const {
  if (token_id < 0 || token_id >= static_cast<int32_t>(bytes_of_id_.size())) return kStart;
  const std::string& bytes = bytes_of_id_[token_id];
  if (bytes.empty()) return kStart;
  return Walk(state, bytes).value_or(kStart);
}

void Utf8Masks::Restrict(State state, absl::Span<uint32_t> mask) const {
  const std::vector<uint32_t>& may_follow = may_follow_[state];
  const size_t words = std::min(mask.size(), may_follow.size());
  for (size_t i = 0; i < words; ++i) mask[i] &= may_follow[i];
}

}  // namespace fathom
