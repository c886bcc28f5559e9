// An FP8 latent cache for MlaDecodeSm90: how a token is stored, and the warps that turn tokens into
// the tiles that the matrix products read.
//
// A stored token is 656 bytes: 512 codes (E4M3), a factor (F32) for each 128 of them, 64 bf16 of
// rotated key. A latent is code times factor, rounded once to bf16, as a BF16 cache would hold it;
// so the products are the same, and eight warps convert one tile while the products use another.
//
// A tile is groups of eight tokens, each nine panels of 64 columns, the last with the key. So one
// of up to 64 tokens is eight groups a constant distance apart, whatever the size of a KV block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/mla_decode_sm90.h"
#include "kernels/cuda/sm90.cuh"

namespace fathom::mla_decode {

using CacheType = MlaDecodeSm90::CacheType;

constexpr int kWidth = MlaDecodeSm90::kKvLoraRank + MlaDecodeSm90::kRopeHeadDim;  // 576
constexpr int kPanels = kWidth / 64;
constexpr int kLatentPanels = kPanels - 1;
constexpr int kGroupTokens = 8;
constexpr int kPanelBytes = kGroupTokens * sm90::kSwizzledRowBytes;
constexpr int kGroupBytes = kPanels * kPanelBytes;

constexpr int kFactorColumns = 128;
constexpr int kKeyAt = MlaDecodeSm90::kKvLoraRank + MlaDecodeSm90::kKvLoraRank / kFactorColumns * 4;
constexpr int kStoredTokenBytes = kKeyAt + MlaDecodeSm90::kRopeHeadDim * 2;
constexpr int kStoredGroupBytes = kGroupTokens * kStoredTokenBytes;
static_assert(kStoredTokenBytes == 656 && kKeyAt % 16 == 0);

constexpr int kConverters = 256;   // threads
constexpr int kStoredGroups = 12;  // in shared memory at once

// Groups of tokens as they are stored, on their way to a tile: group i of all that a block copies
// stands in slot i % kStoredGroups.
struct StoredTokens {
  alignas(16) unsigned char bytes[kStoredGroups][kStoredGroupBytes];
  uint64_t full[kStoredGroups];   // the copy's bytes
  uint64_t empty[kStoredGroups];  // a lane of each converting warp
};
struct StoredSlot {
  int slot, parity;
  __device__ explicit StoredSlot(int group)
      : slot(group % kStoredGroups), parity(group / kStoredGroups & 1) {}
};

// Two codes, the lower byte first.
__device__ inline uint32_t ToBf16(uint16_t codes, float factor) {
  const __half2 pair(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3));
  const float2 values = __half22float2(pair);
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(values.x * factor, values.y * factor);
  return *reinterpret_cast<const uint32_t*>(&rounded);
}
__device__ inline uint4 ToBf16(uint32_t low, uint32_t high, float factor) {
  return make_uint4(ToBf16(static_cast<uint16_t>(low), factor),
                    ToBf16(static_cast<uint16_t>(low >> 16), factor),
                    ToBf16(static_cast<uint16_t>(high), factor),
                    ToBf16(static_cast<uint16_t>(high >> 16), factor));
}

// A group as it is stored becomes one of a tile. All converters take part.
__device__ inline void ConvertGroup(const unsigned char* stored, int thread, unsigned char* group) {
  // A warp takes four panels of two neighbouring tokens: eight lanes that store at once hold every
  // second 16 bytes of both tokens' rows, which the swizzle puts in different banks.
  const int warp = thread / 32, piece = thread % 4;
  const int token = warp / 2 * 2 + thread / 4 % 2, panel = warp % 2 * 4 + thread / 8 % 4;
  const unsigned char* from = stored + token * kStoredTokenBytes;
  const uint4 codes = *reinterpret_cast<const uint4*>(from + panel * 64 + piece * 16);
  const float factor = *reinterpret_cast<const float*>(from + MlaDecodeSm90::kKvLoraRank +
                                                       panel * 64 / kFactorColumns * 4);
  unsigned char* to = group + panel * kPanelBytes + token * sm90::kSwizzledRowBytes;
  *reinterpret_cast<uint4*>(to + ((2 * piece) ^ token) * 16) = ToBf16(codes.x, codes.y, factor);
  *reinterpret_cast<uint4*>(to + ((2 * piece + 1) ^ token) * 16) = ToBf16(codes.z, codes.w, factor);
  if (thread < kGroupTokens * 8) {
    const int of_key = thread / 8, at = thread % 8;
    *reinterpret_cast<uint4*>(group + kLatentPanels * kPanelBytes +
                              of_key * sm90::kSwizzledRowBytes + (at ^ of_key) * 16) =
        *reinterpret_cast<const uint4*>(stored + of_key * kStoredTokenBytes + kKeyAt + at * 16);
  }
}

}  // namespace fathom::mla_decode
