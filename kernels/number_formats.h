// The two short number formats as plain bits, and their exact conversions.
//
// Both conversions to float are exact. Conversions from float round to nearest, ties to even.
// The vector code in cpu/ does the same with the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace fathom {

struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f and 0xff are NaN, largest
// 448. Source: OCP 8-bit Floating Point Specification 1.0, table 1.
struct Float8E4M3 {
  uint8_t bits;
};

inline constexpr float kLargestE4M3 = 448.0f;

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) { return FloatOfBits(uint32_t{value.bits} << 16); }

inline float ToFloat(Float8E4M3 value) {
  const uint32_t sign = uint32_t{value.bits & 0x80u} << 24;
  const uint32_t exponent = (value.bits >> 3) & 15u;
  const uint32_t mantissa = value.bits & 7u;
  if (exponent == 15 && mantissa == 7) return FloatOfBits(sign | 0x7fc00000u);
  if (exponent == 0) return FloatOfBits(sign | BitsOf(static_cast<float>(mantissa) * 0x1p-9f));
  return FloatOfBits(sign | ((exponent + 120) << 23) | (mantissa << 20));
}

inline BFloat16 ToBFloat16(float value) {
  const uint32_t bits = BitsOf(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // stays a NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Saturates: what is larger than 448, infinity included, becomes 448. NaN stays NaN.
inline Float8E4M3 ToFloat8E4M3(float value) {
  const uint32_t sign = (BitsOf(value) >> 24) & 0x80u;
  if (value != value) return {static_cast<uint8_t>(sign | 0x7fu)};
  const float magnitude = FloatOfBits(BitsOf(value) & 0x7fffffffu);
  if (magnitude >= kLargestE4M3) return {static_cast<uint8_t>(sign | 0x7eu)};
  if (magnitude < 0x1p-6f) {
    // Subnormal: 2^14 has its last bit at 2^-9, so this addition rounds as the format does, and the
    // sum's last bits are the code. A carry gives 8, the smallest normal number.
    return {static_cast<uint8_t>(sign | (BitsOf(magnitude + 0x1p14f) & 0xfu))};
  }
  const uint32_t bits = BitsOf(magnitude);
  const uint32_t rounded = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;  // exponent, mantissa
  return {static_cast<uint8_t>(sign | (rounded - (120u << 3)))};
}

inline void StoreFloat(float value, float* to) { *to = value; }
inline void StoreFloat(float value, BFloat16* to) { *to = ToBFloat16(value); }

}  // namespace fathom
