// What a simulated model says: the next token is a hash of all tokens before it, so that whoever
// knows a prompt can tell whether every token of its answer is right.
//
// All arithmetic is modulo 2^64. With
//
//   Mix(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;
//            x ^= x >> 27;  x *= 0x94D049BB133111EB;
//            x ^= x >> 31                                 (the finaliser of SplitMix64)
//
// the state of a prefix is 0 if it is empty, and else
//
//   state = Mix((state of all tokens but the last ^ last token) + 0x9E3779B97F4A7C15)
//
// and the token after it is state % vocab_size; while that is an end-of-sequence token, the next
// higher one, after the last one token 0.
//
// Logprobs are those of an invented distribution: token (next + r - 1) % vocab_size has rank r and
// probability 1 / (r * (r + 1)). They sum to less than 1 over any vocabulary.
#pragma once

#include <cmath>
#include <cstdint>

#include "absl/algorithm/container.h"
#include "absl/types/span.h"

namespace fathom {

// The tokens before some position, of which it keeps the state alone.
class SimPrefix {
 public:
  void Append(int32_t token_id) {
    state_ = Mix((state_ ^ static_cast<uint64_t>(token_id)) + 0x9E3779B97F4A7C15);
    ++num_tokens_;
  }
  // Appends those of a sequence's tokens that are not there yet, up to position `end`.
  void AppendUpTo(absl::Span<const int32_t> token_ids, int end) {
    while (num_tokens_ < end) Append(token_ids[num_tokens_]);
  }

  // REQUIRES: there is a token that ends no sequence; `eos_token_ids` ascend.
  int32_t NextToken(int vocab_size, absl::Span<const int> eos_token_ids) const {
    auto token_id = static_cast<int32_t>(state_ % static_cast<uint64_t>(vocab_size));
    while (absl::c_binary_search(eos_token_ids, token_id)) token_id = (token_id + 1) % vocab_size;
    return token_id;
  }

  int num_tokens() const { return num_tokens_; }

 private:
  static constexpr uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
  }

  uint64_t state_ = 0;
  int num_tokens_ = 0;
};

// Where `next` is the token that follows.
inline int SimRank(int32_t token_id, int32_t next, int vocab_size) {
  return (token_id - next + vocab_size) % vocab_size + 1;
}
inline float SimLogprob(int rank) { return static_cast<float>(-std::log(rank) - std::log1p(rank)); }

}  // namespace fathom
