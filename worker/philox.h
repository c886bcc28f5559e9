// Philox4x32-10: random numbers as a pure function of a key and a counter.
//
// There is no state to keep, move or lose: the number of (seed, position) is the same wherever and
// whenever it is asked for, which is what lets a request continue elsewhere with the same tokens.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; known answers in
// the Random123 distribution, tests/kat_vectors. Thread-safe (pure functions).
#pragma once

#include <array>
#include <cstdint>

namespace fathom {

constexpr std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The number in [0, 1) of a seed at a position, a multiple of 2^-53.
constexpr double PhiloxUniform(uint64_t seed, uint64_t position) {
  const std::array<uint32_t, 4> words =
      Philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t bits = (uint64_t{words[1]} << 32) | words[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace fathom
