#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_tensor.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 20240507;

// Sequences whose queries and keys are known for every position, so that any part of them can be
// computed in any step.
class AttentionTest : public EveryTargetTest {
 protected:
  static constexpr int64_t kHeads = 7;  // more than a tile of rows, and not a multiple of it
  static constexpr int64_t kKvLoraRank = 72;
  static constexpr int64_t kRopeDim = 10;
  static constexpr float kScale = 0.2f;

  struct Sequence {
    TestTensor q_latent;  // [positions, A, R]
    TestTensor q_rope;
    TestTensor latent;  // [positions, R]
    TestTensor rope;
  };

  Sequence RandomSequence(DType dtype, int64_t positions) {
    return {random_.Floats(dtype, {positions, kHeads, kKvLoraRank}),
            random_.Floats(dtype, {positions, kHeads, kRopeDim}),
            random_.Floats(dtype, {positions, kKvLoraRank}),
            random_.Floats(dtype, {positions, kRopeDim})};
  }

  // A cache that holds the sequences in blocks of random order.
  struct Paged {
    TestTensor cache;
    TestTensor block_tables;
  };
  Paged Store(const std::vector<Sequence>& sequences, DType dtype, int block_size) {
    int64_t most_blocks = 0;
    for (const Sequence& s : sequences) {
      most_blocks = std::max(most_blocks, (s.latent->dim(0) + block_size - 1) / block_size);
    }
    const auto num_sequences = static_cast<int64_t>(sequences.size());
    const int64_t num_blocks = num_sequences * most_blocks + 3;
    Paged paged = {TestTensor(dtype, {num_blocks, block_size, kKvLoraRank + kRopeDim}),
                   TestTensor(DType::kI32, {num_sequences, most_blocks})};
    // What no sequence has written is not a number: whoever reads it will show.
    for (int64_t i = 0; i < paged.cache->num_elements(); ++i) {
      SetElement(paged.cache, i, std::numeric_limits<float>::quiet_NaN());
    }
    std::vector<int32_t> order(static_cast<size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(kSeed));
    std::copy_n(order.begin(), num_sequences * most_blocks, paged.block_tables->data<int32_t>());
    for (int64_t s = 0; s < num_sequences; ++s) {
      std::vector<int32_t> places;
      for (int32_t p = 0; p < sequences[s].latent->dim(0); ++p) {
        places.push_back(static_cast<int32_t>(At(paged.block_tables, s, p / block_size)) *
                             block_size +
                         p % block_size);
      }
      ops_.StoreKv(sequences[s].latent, sequences[s].rope, IntTensor(places), paged.cache);
    }
    return paged;
  }

  // Computes positions [begin, end) of one stored sequence in a step of its own.
  TestTensor Attend(Ops& ops, const Sequence& sequence, const Paged& paged, int64_t index,
                    int64_t begin, int64_t end) {
    const TestTensor query_start = IntTensor({0, static_cast<int32_t>(end - begin)});
    const TestTensor context_lens = IntTensor({static_cast<int32_t>(end)});
    const AttentionBatch batch = {.block_tables = paged.block_tables->Slice(0, index, index + 1),
                                  .query_start = query_start,
                                  .context_lens = context_lens,
                                  .block_size = static_cast<int>(paged.cache->dim(1))};
    TestTensor out(sequence.q_latent->dtype(), {end - begin, kHeads, kKvLoraRank});
    ops.MlaAttention(sequence.q_latent->Slice(0, begin, end), sequence.q_rope->Slice(0, begin, end),
                     paged.cache, batch, kScale, out);
    return out;
  }

  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(1);
  Ops& ops_ = device_->ops();
};

TEST_P(AttentionTest, AttendsOverTheTokensBeforeEachToken) {
  struct Case {
    DType act;
    DType cache;
    int64_t positions;
    int64_t begin;
    int block_size;
  };
  const Case kCases[] = {{DType::kF32, DType::kF32, 1, 0, 16},
                         {DType::kF32, DType::kF32, 70, 60, 1},
                         {DType::kF32, DType::kBF16, 133, 126, 16},
                         {DType::kBF16, DType::kBF16, 65, 0, 128},
                         {DType::kBF16, DType::kF32, 150, 149, 128}};
  for (const Case& c : kCases) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " positions ", c.begin, " to ", c.positions));
    const std::vector<Sequence> sequences = {RandomSequence(c.act, c.positions)};
    const Paged paged = Store(sequences, c.cache, c.block_size);
    const TestTensor out = Attend(ops_, sequences[0], paged, 0, c.begin, c.positions);
    for (int64_t t = c.begin; t < c.positions; t += 3) {
      for (int64_t a = 0; a < kHeads; a += 2) {
        const std::vector<Bounded> expected =
            ReferenceAttention((*sequences[0].q_latent)[t][a], (*sequences[0].q_rope)[t][a],
                               paged.cache, paged.block_tables->data<int32_t>(), t + 1, kScale);
        for (int64_t i = 0; i < kKvLoraRank; ++i) {
          EXPECT_WITHIN(At((*out)[t - c.begin], a, i), expected[i].Rounded(c.act))
              << "token " << t << " head " << a << " element " << i;
        }
      }
    }
  }
}

TEST_P(AttentionTest, GivesTheSameBitsHoweverThePromptIsCut) {
  constexpr int64_t kPositions = 530;
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  const std::vector<Sequence> sequences = {RandomSequence(DType::kBF16, kPositions)};
  const Paged first = Store(sequences, DType::kF32, 16);
  const TestTensor whole = Attend(ops_, sequences[0], first, 0, 0, kPositions);
  for (int block_size : {1, 16, 128}) {
    const Paged paged = Store(sequences, DType::kF32, block_size);
    for (int64_t chunk : {1, 7, 512, 530}) {
      Ops& ops = chunk == 7 || chunk == 530 ? three_threads->ops() : ops_;
      // Single tokens are slow: every 13th will do.
      const int64_t step = chunk == 1 ? 13 : chunk;
      for (int64_t begin = 0; begin < kPositions; begin += step) {
        const int64_t end = std::min(begin + chunk, kPositions);
        const TestTensor out = Attend(ops, sequences[0], paged, 0, begin, end);
        ASSERT_EQ(BytesOf(out), BytesOf(whole->Slice(0, begin, end)))
            << "block size " << block_size << " positions " << begin << " to " << end;
      }
    }
  }
}

TEST_P(AttentionTest, GivesTheSameBitsBesideOtherSequences) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  const std::vector<Sequence> sequences = {RandomSequence(DType::kF32, 100),
                                           RandomSequence(DType::kF32, 9),
                                           RandomSequence(DType::kF32, 64)};
  const Paged paged = Store(sequences, DType::kBF16, 16);
  // A prompt's last 40 tokens, a whole prompt, nothing, and one token that is decoded.
  const int64_t kBegins[] = {60, 0, 63};
  std::vector<int32_t> query_start = {0};
  std::vector<int32_t> context_lens;
  int64_t tokens = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    tokens += sequences[s].latent->dim(0) - kBegins[s];
    query_start.push_back(static_cast<int32_t>(tokens));
    context_lens.push_back(static_cast<int32_t>(sequences[s].latent->dim(0)));
  }
  const TestTensor q_latent(DType::kF32, {tokens, kHeads, kKvLoraRank});
  const TestTensor q_rope(DType::kF32, {tokens, kHeads, kRopeDim});
  for (size_t s = 0; s < sequences.size(); ++s) {
    const int64_t end = sequences[s].latent->dim(0);
    device_->CopyFromHost(sequences[s].q_latent->Slice(0, kBegins[s], end).raw(),
                          q_latent->Slice(0, query_start[s], query_start[s + 1]));
    device_->CopyFromHost(sequences[s].q_rope->Slice(0, kBegins[s], end).raw(),
                          q_rope->Slice(0, query_start[s], query_start[s + 1]));
  }
  const TestTensor starts = IntTensor(query_start);
  const TestTensor lens = IntTensor(context_lens);
  const AttentionBatch batch = {.block_tables = paged.block_tables,
                                .query_start = starts,
                                .context_lens = lens,
                                .block_size = 16};
  for (Ops* ops : {&ops_, &three_threads->ops()}) {
    const TestTensor out(DType::kF32, {tokens, kHeads, kKvLoraRank});
    ops->MlaAttention(q_latent, q_rope, paged.cache, batch, kScale, out);
    for (size_t s = 0; s < sequences.size(); ++s) {
      const TestTensor alone =
          Attend(ops_, sequences[s], paged, s, kBegins[s], sequences[s].latent->dim(0));
      EXPECT_EQ(BytesOf(out->Slice(0, query_start[s], query_start[s + 1])), BytesOf(alone))
          << "sequence " << s;
    }
  }
}

TEST_P(AttentionTest, SpreadsWhatIsNotANumberOnlyToTheTokensThatSeeIt) {
  std::vector<Sequence> sequences = {RandomSequence(DType::kF32, 80)};
  sequences[0].rope->data<float>()[70 * kRopeDim] = std::numeric_limits<float>::quiet_NaN();
  const Paged paged = Store(sequences, DType::kF32, 16);
  const TestTensor out = Attend(ops_, sequences[0], paged, 0, 0, 80);
  for (int64_t t = 0; t < 80; ++t) {
    EXPECT_EQ(std::isnan(At((*out)[t], 3, 5)), t >= 70) << t;
  }
}

TEST_P(AttentionTest, StaysFiniteWhenScoresAreLarge) {
  // Scores in the tens of thousands: exp of any of them overflows, of their differences not.
  std::vector<Sequence> sequences = {
      {random_.Floats(DType::kF32, {90, kHeads, kKvLoraRank}, 100.0f),
       random_.Floats(DType::kF32, {90, kHeads, kRopeDim}, 100.0f),
       random_.Floats(DType::kF32, {90, kKvLoraRank}, 100.0f),
       random_.Floats(DType::kF32, {90, kRopeDim}, 100.0f)}};
  const Paged paged = Store(sequences, DType::kF32, 16);
  const TestTensor out = Attend(ops_, sequences[0], paged, 0, 0, 90);
  for (int64_t i = 0; i < out->num_elements(); ++i) {
    ASSERT_TRUE(std::isfinite(ElementAt(out, i))) << i;
  }
}

INSTANTIATE_ON_EVERY_TARGET(AttentionTest);

}  // namespace
}  // namespace fathom
