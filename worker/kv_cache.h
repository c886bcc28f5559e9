// Memory of KV blocks: what multi-head latent attention keeps of each token, in pages.
//
// Per layer one tensor [num_blocks, block_size, TokenWidth]: the latent after its norm, then the
// rotated key that all heads share. Every rank holds all of it. Who owns which block is the
// coordinator's business; nothing here knows.
//
// Not thread-safe; only the forward pass writes it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "worker/model_config.h"

namespace fathom {

struct KvCacheOptions {
  DType dtype = DType::kF32;  // kF32, kBF16 or kF8E4M3
  int block_size = 16;        // tokens per block
  int num_blocks = 0;
};

class KvCache {
 public:
  // What a token takes in a layer, in elements of `dtype`: kv_lora_rank + qk_rope_head_dim numbers;
  // or, as Ops::MlaAttention lays out F8_E4M3, a byte for each of the latent's, 4 for each 128 of
  // them, 2 for each of the key's: 656 for DeepSeek-V3.
  static int64_t TokenWidth(DType dtype, const ModelConfig& config);
  // Bytes of one block over all layers.
  static int64_t BlockBytes(const KvCacheOptions& options, const ModelConfig& config);

  // ResourceExhausted when the device has no room; names the number of bytes.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(const KvCacheOptions& options,
                                                         const ModelConfig& config, Device& device);

  const KvCacheOptions& options() const { return options_; }

  // [num_blocks, block_size, TokenWidth]
  const Tensor& layer(int index) const { return layers_[index]; }

  // Unlike that of any other cache of this process: who keeps recordings can tell whether they are
  // of this one.
  int64_t id() const { return id_; }

 private:
  explicit KvCache(const KvCacheOptions& options);

  const KvCacheOptions options_;
  const int64_t id_;
  std::vector<Buffer> buffers_;
  std::vector<Tensor> layers_;
};

}  // namespace fathom
