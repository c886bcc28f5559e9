#include "coordinator/prefix_index.h"

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace fathom {
namespace {

class PrefixIndexTest : public ::testing::Test {
 protected:
  std::vector<BlockHash> Chunks(int num_tokens, uint32_t first_token,
                                const std::string& salt = "") const {
    Request request;
    request.prompt_token_ids.resize(num_tokens);
    std::iota(request.prompt_token_ids.begin(), request.prompt_token_ids.end(), first_token);
    request.cache_salt = salt;
    return PrefixIndex::ChunksOf(hasher_, request);
  }

  const BlockHasher hasher_{BlockHasher::Options{}};
  PrefixIndex index_;
};

TEST_F(PrefixIndexTest, KnowsTheBeginningThatPromptsShare) {
  index_.Use(Chunks(640, 0));
  EXPECT_EQ(index_.CountKnown(Chunks(640, 0)), 10);
  EXPECT_EQ(index_.CountKnown(Chunks(200, 0)), 3) << "only full chunks count";
  EXPECT_EQ(index_.CountKnown(Chunks(640, 1)), 0);
  EXPECT_EQ(index_.CountKnown(Chunks(640, 0, "salt")), 0);
  EXPECT_EQ(index_.CountKnown(Chunks(63, 0)), 0);
  index_.Clear();
  EXPECT_EQ(index_.CountKnown(Chunks(640, 0)), 0);
}

TEST_F(PrefixIndexTest, ForgetsTheEndsOfWhatWasUsedTheLongestAgo) {
  const std::vector<BlockHash> old_one = Chunks(640, 0);
  const std::vector<BlockHash> kept = Chunks(640, 1'000'000);
  index_.Use(old_one);
  index_.Use(kept);
  index_.Use(Chunks((PrefixIndex::kMaxChunks - 12) * PrefixIndex::kChunkTokens, 2'000'000));
  EXPECT_EQ(index_.CountKnown(old_one), 2);
  EXPECT_EQ(index_.CountKnown(kept), 10);
}

}  // namespace
}  // namespace fathom
