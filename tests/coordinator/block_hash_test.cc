#include "coordinator/block_hash.h"

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace fathom {
namespace {

TEST(BlockHashTest, TheSameTokensAfterTheSamePrefixHaveTheSameName) {
  const BlockHasher hasher({});
  for (const size_t num_tokens : {1, 16, 32, 64, 128}) {
    const std::vector<uint32_t> token_ids(num_tokens, 7);
    const BlockHash root = hasher.Root("");
    EXPECT_EQ(hasher.Next(root, token_ids), hasher.Next(hasher.Root(""), token_ids));
  }
}

TEST(BlockHashTest, EveryTokenItsPlaceThePrefixAndTheSaltChangeTheName) {
  const BlockHasher hasher({});
  const BlockHash root = hasher.Root("");
  const std::vector<uint32_t> token_ids = {1, 2, 3, 4};
  const std::vector<BlockHash> names = {hasher.Next(root, token_ids),
                                        hasher.Next(root, {1, 2, 3, 5}),
                                        hasher.Next(root, {2, 1, 3, 4}),
                                        hasher.Next(root, {1, 2, 3, 4, 0}),
                                        hasher.Next(hasher.Next(root, token_ids), token_ids),
                                        hasher.Next(hasher.Root("a"), token_ids),
                                        hasher.Next(hasher.Root("b"), token_ids)};
  std::set<std::pair<uint64_t, uint64_t>> different;
  for (const BlockHash& name : names) different.emplace(name.low, name.high);
  EXPECT_EQ(different.size(), names.size());
}

TEST(BlockHashTest, EveryProcessHasASecretOfItsOwn) {
  const std::vector<uint32_t> token_ids = {1, 2, 3, 4};
  const BlockHasher one({});
  const BlockHasher other({});
  EXPECT_FALSE(one.Next({}, token_ids) == other.Next({}, token_ids));
  EXPECT_FALSE(one.Root("") == other.Root(""));
}

TEST(BlockHashTest, ATestCanMakeNamesClash) {
  const BlockHasher hasher({.num_bits = 2});
  std::set<std::pair<uint64_t, uint64_t>> different;
  for (uint32_t token = 0; token < 1000; ++token) {
    const BlockHash name = hasher.Next({}, {token});
    different.emplace(name.low, name.high);
  }
  EXPECT_EQ(different.size(), 4u);
}

}  // namespace
}  // namespace fathom
