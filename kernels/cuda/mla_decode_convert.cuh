// An FP8 latent cache for MlaDecodeSm90: the warps that turn stored tokens into the tiles that the
// matrix products read.
//
// A latent becomes bf16 as a BF16 cache would hold it; so the products are the same, and eight
// warps convert one tile while the products use another.
//
// A tile is groups of eight tokens, each nine panels of 64 columns, the last with the key. So one
// of up to 64 tokens is eight groups a constant distance apart, whatever the size of a KV block.
#pragma once

#include <cstdint>

#include "kernels/cuda/mla_decode_sm90.h"
#include "kernels/cuda/mla_stored_token.cuh"
#include "kernels/cuda/sm90.cuh"

namespace fathom::mla_decode {

constexpr int kWidth = MlaDecodeSm90::kKvLoraRank + MlaDecodeSm90::kRopeHeadDim;  // 576
constexpr int kPanels = kWidth / 64;
constexpr int kLatentPanels = kPanels - 1;
constexpr int kGroupTokens = 8;
constexpr int kPanelBytes = kGroupTokens * sm90::kSwizzledRowBytes;
constexpr int kGroupBytes = kPanels * kPanelBytes;

constexpr int kStoredGroupBytes = kGroupTokens * mla_stored_token::kBytes;
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

// A group as it is stored becomes one of a tile. All converters take part.
__device__ inline void ConvertGroup(const unsigned char* stored, int thread, unsigned char* group) {
  // A warp takes four panels of two neighbouring tokens: eight lanes that store at once hold every
  // second 16 bytes of both tokens' rows, which the swizzle puts in different banks.
  const int warp = thread / 32, piece = thread % 4;
  const int token = warp / 2 * 2 + thread / 4 % 2, panel = warp % 2 * 4 + thread / 8 % 4;
  const unsigned char* from = stored + token * mla_stored_token::kBytes;
  const uint4 codes = *reinterpret_cast<const uint4*>(from + panel * 64 + piece * 16);
  uint4 latents[2];
  mla_stored_token::Convert(codes, mla_stored_token::FactorOf(from, panel * 64), latents);
  unsigned char* to = group + panel * kPanelBytes + token * sm90::kSwizzledRowBytes;
  *reinterpret_cast<uint4*>(to + ((2 * piece) ^ token) * 16) = latents[0];
  *reinterpret_cast<uint4*>(to + ((2 * piece + 1) ^ token) * 16) = latents[1];
  if (thread < kGroupTokens * 8) {
    const int of_key = thread / 8, at = thread % 8;
    *reinterpret_cast<uint4*>(group + kLatentPanels * kPanelBytes +
                              of_key * sm90::kSwizzledRowBytes + (at ^ of_key) * 16) =
        *reinterpret_cast<const uint4*>(stored + of_key * mla_stored_token::kBytes +
                                        mla_stored_token::kKeyAt + at * 16);
  }
}

}  // namespace fathom::mla_decode
