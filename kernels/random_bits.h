// The numbers of Ops::FillRandom, the same on every device: element `index` of stream `seed`.
//
// The hash is the output function of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom
// Number Generators, 2014) over a counter: good enough for weights that nobody trained.
#pragma once

#include <cstdint>

#include "kernels/number_formats.h"

namespace fathom {

constexpr uint32_t RandomBits(uint64_t seed, uint64_t index) {
  uint64_t x = seed * 0xda942042e4dd58b5u + (index + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

// Uniform in [-1, 1), a multiple of 2⁻²³.
constexpr float RandomUnit(uint64_t seed, uint64_t index) {
  return static_cast<float>(static_cast<int32_t>(RandomBits(seed, index)) >> 8) * 0x1p-23f;
}

// Any of the 112 codes of magnitude below 1.
constexpr Float8E4M3 RandomE4M3(uint64_t seed, uint64_t index) {
  const uint32_t bits = RandomBits(seed, index);
  return {static_cast<uint8_t>((bits & 0x80u) | (((bits >> 8) * uint64_t{0x38}) >> 24))};
}

}  // namespace fathom
