// One layer of the latent cache in the shape of DeepSeek-V3, as attention on Hopper reads it: pages
// of tokens, of 576 bf16 each (512 latents, 64 of rotated key), or of 656 bytes, as
// Ops::StoreLatents writes them (512 e4m3, an f32 factor for each 128 of those, 64 bf16 of key).
#pragma once

#include <cstdint>

namespace fathom {

enum class MlaCacheType { kBf16, kFp8 };

struct MlaCache {
  const void* data = nullptr;  // [num_blocks, block_size, token], 16-byte aligned
  MlaCacheType type = MlaCacheType::kBf16;
  int64_t num_blocks = 0;
  int block_size = 0;  // tokens, a multiple of 16
};

}  // namespace fathom
