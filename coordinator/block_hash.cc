#include "coordinator/block_hash.h"

#include <xxhash.h>

#include <cstring>
#include <random>

#include "base/check.h"

namespace fathom {
namespace {

// The lowest `count` bits.
uint64_t Mask(int count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

}  // namespace

BlockHasher::BlockHasher(Options options) : options_(options) {
  static_assert(sizeof(secret_) >= XXH3_SECRET_SIZE_MIN);
  CHECK(options.num_bits >= 0 && options.num_bits <= 128) << options.num_bits;
  std::random_device random;
  for (uint32_t& word : secret_) word = random();
}

BlockHash BlockHasher::Root(std::string_view salt) const {
  return HashOf(salt.data(), salt.size());
}

BlockHash BlockHasher::Next(const BlockHash& previous, absl::Span<const uint32_t> token_ids) const {
  CHECK_LE(token_ids.size(), size_t{kMaxBlockTokens});
  std::array<unsigned char, sizeof(BlockHash) + kMaxBlockTokens * sizeof(uint32_t)> bytes;
  std::memcpy(bytes.data(), &previous, sizeof(previous));
  std::memcpy(bytes.data() + sizeof(previous), token_ids.data(),
              token_ids.size() * sizeof(uint32_t));
  return HashOf(bytes.data(), sizeof(previous) + token_ids.size() * sizeof(uint32_t));
}

BlockHash BlockHasher::HashOf(const void* data, size_t num_bytes) const {
  const XXH128_hash_t hash =
      XXH3_128bits_withSecret(data, num_bytes, secret_.data(), sizeof(secret_));
  return {.low = hash.low64 & Mask(options_.num_bits),
          .high = hash.high64 & Mask(options_.num_bits - 64)};
}

}  // namespace fathom
