#include "gateway/text/byte_pair_encoder.h"

#include <array>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gateway/text/byte_level.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;

// A vocabulary of the 256 bytes (ids equal to them) and random joins over a few letters.
struct RandomVocabulary {
  std::vector<std::string> bytes;  // [id]
  std::vector<BytePairEncoder::Merge> merges;
};

RandomVocabulary MakeVocabulary(std::mt19937& random, int num_merges) {
  RandomVocabulary vocabulary;
  for (int byte = 0; byte < 256; ++byte) {
    vocabulary.bytes.emplace_back(1, static_cast<char>(byte));
  }
  std::vector<uint32_t> usable = {'a', 'b', 'c'};
  std::map<std::string, uint32_t> ids;
  std::set<std::pair<uint32_t, uint32_t>> pairs;
  for (int i = 0; i < num_merges; ++i) {
    const uint32_t left = usable[random() % usable.size()];
    const uint32_t right = usable[random() % usable.size()];
    if (!pairs.emplace(left, right).second) continue;
    const std::string joined = vocabulary.bytes[left] + vocabulary.bytes[right];
    const auto [entry, is_new] =
        ids.emplace(joined, static_cast<uint32_t>(vocabulary.bytes.size()));
    if (is_new) {
      vocabulary.bytes.push_back(joined);
      usable.push_back(entry->second);
    }
    vocabulary.merges.push_back({left, right, entry->second});
  }
  return vocabulary;
}

BytePairEncoder MakeEncoder(const RandomVocabulary& vocabulary) {
  std::array<uint32_t, 256> byte_ids;
  for (uint32_t byte = 0; byte < 256; ++byte) byte_ids[byte] = byte;
  std::vector<BytePairEncoder::Token> tokens;
  for (uint32_t id = 0; id < vocabulary.bytes.size(); ++id) {
    tokens.push_back({vocabulary.bytes[id], id});
  }
  return BytePairEncoder(byte_ids, vocabulary.merges, std::move(tokens));
}

// As the definition says: join the best pair, leftmost first, until none is left.
std::vector<uint32_t> EncodeByDefinition(const RandomVocabulary& vocabulary,
                                         const std::string& word) {
  std::vector<uint32_t> ids;
  for (const char byte : word) ids.push_back(static_cast<unsigned char>(byte));
  for (size_t rank = 0; rank < vocabulary.merges.size();) {
    const BytePairEncoder::Merge& merge = vocabulary.merges[rank];
    size_t i = 0;
    while (i + 1 < ids.size() && (ids[i] != merge.left || ids[i + 1] != merge.right)) ++i;
    if (i + 1 >= ids.size()) {
      ++rank;
      continue;
    }
    ids[i] = merge.joined;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    rank = 0;  // the join may have made a better pair
  }
  return ids;
}

TEST(BytePairEncoderTest, JoinsTheBestPairFirstAndTheLeftmostOfEquals) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  BytePairEncoder::Workspace workspace;
  for (int trial = 0; trial < 100; ++trial) {
    const RandomVocabulary vocabulary = MakeVocabulary(random, static_cast<int>(random() % 60));
    const BytePairEncoder encoder = MakeEncoder(vocabulary);
    for (int i = 0; i < 50; ++i) {
      std::string word;
      for (int length = static_cast<int>(random() % 40); length > 0; --length) {
        word.push_back("abcd"[random() % 4]);
      }
      std::vector<uint32_t> ids;
      encoder.Encode(word, workspace, ids);
      ASSERT_EQ(ids, EncodeByDefinition(vocabulary, word)) << word;
    }
  }
}

TEST(BytePairEncoderTest, ATokenThatMergesCannotReachIsNeverUsed) {
  // "abc" is in the vocabulary, but "b" joins "c" first and "a", "bc" do not join.
  RandomVocabulary vocabulary;
  std::mt19937 random(0);
  vocabulary = MakeVocabulary(random, 0);
  vocabulary.bytes.insert(vocabulary.bytes.end(), {"bc", "ab", "abc"});
  vocabulary.merges = {{'b', 'c', 256}, {'a', 'b', 257}, {257, 'c', 258}};
  const BytePairEncoder encoder = MakeEncoder(vocabulary);
  BytePairEncoder::Workspace workspace;
  std::vector<uint32_t> ids;
  encoder.Encode("abc", workspace, ids);
  EXPECT_THAT(ids, ElementsAre('a', 256));
}

TEST(ByteLevelTest, SpellsEveryByteAsHuggingFaceDoes) {
  EXPECT_EQ(SpellByte(' '), "Ġ");
  EXPECT_EQ(SpellByte('\n'), "Ċ");
  EXPECT_EQ(SpellByte('A'), "A");
  EXPECT_EQ(SpellByte(0xAD), "Ń");
  std::set<std::string> spellings;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string spelling = SpellByte(static_cast<uint8_t>(byte));
    spellings.insert(spelling);
    EXPECT_EQ(BytesFromSpelling(spelling), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(spellings.size(), 256u);
  EXPECT_EQ(BytesFromSpelling("<｜User｜>"), std::nullopt);
  EXPECT_EQ(BytesFromSpelling("a b"), std::nullopt);  // a space is never spelled as itself
}

}  // namespace
}  // namespace fathom
