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
constexpr double kEps = 1e-6;

// Sequences whose queries and latents are known for every position, so that any part of them can be
// computed in any step.
class AttentionTest : public EveryTargetTest {
 protected:
  static constexpr int64_t kHeads = 7;         // more than a tile of rows, and not a multiple of it
  static constexpr int64_t kKvLoraRank = 136;  // one group of 1×128 and a bit
  static constexpr int64_t kRopeDim = 10;
  static constexpr int64_t kMostPositions = 530;
  static constexpr float kScale = 0.1f;

  // What all tokens share.
  struct Layer {
    TestTensor w_uk;
    TestTensor w_uv;
    TestTensor kv_norm;
    TestTensor cos_sin;

    int64_t nope_dim() const { return w_uk->dim(2); }
    int64_t v_dim() const { return w_uv->dim(1); }
  };
  Layer RandomLayer(DType act) {
    constexpr int64_t kNopeDim = 20;
    constexpr int64_t kVDim = 18;
    return {random_.Floats(act, {kHeads, kKvLoraRank, kNopeDim}, 0.2f),
            random_.Floats(act, {kHeads, kVDim, kKvLoraRank}),
            random_.Floats(DType::kF32, {kKvLoraRank}),
            random_.Floats(DType::kF32, {kMostPositions, kRopeDim / 2, 2}, 0.7f)};
  }
  // Steps around attention that change nothing, bit by bit.
  Layer PlainLayer(DType act) {
    Layer layer = {TestTensor(act, {kHeads, kKvLoraRank, kKvLoraRank}),
                   TestTensor(act, {kHeads, kKvLoraRank, kKvLoraRank}),
                   random_.Floats(DType::kF32, {kKvLoraRank}),
                   TestTensor(DType::kF32, {kMostPositions, kRopeDim / 2, 2})};
    for (int64_t a = 0; a < kHeads; ++a) {
      for (int64_t i = 0; i < kKvLoraRank; ++i) {
        SetElement((*layer.w_uk)[a], i * kKvLoraRank + i, 1.0f);
        SetElement((*layer.w_uv)[a], i * kKvLoraRank + i, 1.0f);
      }
    }
    for (int64_t i = 0; i < layer.cos_sin->num_elements(); i += 2) {
      layer.cos_sin->data<float>()[i] = 1.0f;
    }
    return layer;
  }

  struct Sequence {
    TestTensor q;     // [positions, A, D + P]
    TestTensor kv_a;  // [positions, R + P]

    int64_t size() const { return kv_a->dim(0); }
  };
  Sequence RandomSequence(const Layer& layer, int64_t positions) {
    const DType act = layer.w_uk->dtype();
    return {random_.Floats(act, {positions, kHeads, layer.nope_dim() + kRopeDim}),
            random_.Floats(act, {positions, kKvLoraRank + kRopeDim})};
  }

  // A cache that holds the sequences in blocks of random order.
  struct Paged {
    TestTensor cache;
    TestTensor block_tables;
  };
  Paged Store(const Layer& layer, const std::vector<Sequence>& sequences, DType dtype,
              int block_size) {
    int64_t most_blocks = 0;
    for (const Sequence& s : sequences) {
      most_blocks = std::max(most_blocks, (s.size() + block_size - 1) / block_size);
    }
    const auto num_sequences = static_cast<int64_t>(sequences.size());
    const int64_t num_blocks = num_sequences * most_blocks + 3;
    const int64_t width =
        dtype == DType::kF8E4M3 ? kKvLoraRank + 2 * 4 + kRopeDim * 2 : kKvLoraRank + kRopeDim;
    Paged paged = {TestTensor(dtype, {num_blocks, block_size, width}),
                   TestTensor(DType::kI32, {num_sequences, most_blocks})};
    // What no sequence has written is not a number: whoever reads it will show.
    std::fill_n(static_cast<char*>(paged.cache->raw()), paged.cache->num_bytes(), '\xff');
    std::vector<int32_t> order(static_cast<size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(kSeed));
    std::copy_n(order.begin(), num_sequences * most_blocks, paged.block_tables->data<int32_t>());
    for (int64_t s = 0; s < num_sequences; ++s) {
      std::vector<int32_t> places;
      for (int64_t p = 0; p < sequences[s].size(); ++p) {
        places.push_back(static_cast<int32_t>(PlaceOf(paged, s, p)));
      }
      ops_.StoreLatents(sequences[s].kv_a, {}, layer.kv_norm, static_cast<float>(kEps),
                        Positions(0, sequences[s].size()), layer.cos_sin, IntTensor(places), {},
                        paged.cache);
    }
    return paged;
  }

  static int64_t PlaceOf(const Paged& paged, int64_t sequence, int64_t position) {
    const int64_t block_size = paged.cache->dim(1);
    return static_cast<int64_t>(At(paged.block_tables, sequence, position / block_size)) *
               block_size +
           position % block_size;
  }

  static TestTensor Positions(int64_t begin, int64_t end) {
    std::vector<int32_t> positions(static_cast<size_t>(end - begin));
    std::iota(positions.begin(), positions.end(), static_cast<int32_t>(begin));
    return IntTensor(positions);
  }

  // Computes positions [begin, end) of one stored sequence in a step of its own.
  void Attend(Ops& ops, const Layer& layer, const Sequence& sequence, const Paged& paged,
              int64_t index, int64_t begin, int64_t end, const LinearInput& out) {
    const TestTensor query_start = IntTensor({0, static_cast<int32_t>(end - begin)});
    const TestTensor context_lens = IntTensor({static_cast<int32_t>(end)});
    const AttentionBatch batch = {.block_tables = paged.block_tables->Slice(0, index, index + 1),
                                  .query_start = query_start,
                                  .context_lens = context_lens,
                                  .block_size = static_cast<int>(paged.cache->dim(1))};
    ops.MlaAttention(sequence.q->Slice(0, begin, end), {layer.w_uk, layer.w_uv},
                     Positions(begin, end), layer.cos_sin, paged.cache, batch, kScale, out);
  }
  TestTensor Attend(Ops& ops, const Layer& layer, const Sequence& sequence, const Paged& paged,
                    int64_t index, int64_t begin, int64_t end) {
    TestTensor out(sequence.q->dtype(), {end - begin, kHeads * layer.v_dim()});
    Attend(ops, layer, sequence, paged, index, begin, end, *out);
    return out;
  }

  // Head a of the token at `position`, step by step as MlaAttention rounds.
  std::vector<Bounded> Reference(const Layer& layer, const Sequence& sequence, const Paged& paged,
                                 int64_t position, int64_t a) {
    const DType act = sequence.q->dtype();
    const Tensor q = (*sequence.q)[position][a];
    std::vector<Bounded> nope;
    for (int64_t i = 0; i < layer.nope_dim(); ++i) nope.push_back({At(q, i), 0.0});
    std::vector<Bounded> query = ReferenceHead((*layer.w_uk)[a], nope, act);
    for (int64_t i = 0; i < kRopeDim; i += 2) {
      const auto [even, odd] = ReferenceRotate(
          At(q, layer.nope_dim() + i), At(q, layer.nope_dim() + i + 1), layer.cos_sin, position, i);
      query.push_back(even.Rounded(act));
      query.push_back(odd.Rounded(act));
    }
    std::vector<std::vector<double>> cached;
    for (int64_t p = 0; p <= position; ++p) {
      cached.push_back(CachedAt(paged.cache, PlaceOf(paged, 0, p), kKvLoraRank, kRopeDim));
    }
    std::vector<Bounded> latent = ReferenceAttention(query, cached, kKvLoraRank, kScale);
    for (Bounded& element : latent) element = element.Rounded(act);
    return ReferenceHead((*layer.w_uv)[a], latent, act);
  }

  struct Case {
    DType act;
    DType cache;
    int64_t positions;
    int64_t begin;
    int block_size;
  };
  void ExpectRight(const Layer& layer, const Case& c) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " positions ", c.begin, " to ", c.positions));
    const std::vector<Sequence> sequences = {RandomSequence(layer, c.positions)};
    const Paged paged = Store(layer, sequences, c.cache, c.block_size);
    const TestTensor out = Attend(ops_, layer, sequences[0], paged, 0, c.begin, c.positions);
    for (int64_t t = c.begin; t < c.positions; t += 5) {
      for (int64_t a = 0; a < kHeads; a += 3) {
        const std::vector<Bounded> expected = Reference(layer, sequences[0], paged, t, a);
        for (int64_t i = 0; i < layer.v_dim(); ++i) {
          EXPECT_WITHIN(At(out, t - c.begin, a * layer.v_dim() + i), expected[i])
              << "token " << t << " head " << a << " element " << i;
        }
      }
    }
  }

  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(1);
  Ops& ops_ = device_->ops();
};

TEST_P(AttentionTest, AttendsOverTheTokensBeforeEachToken) {
  const Case kCases[] = {
      {DType::kF32, DType::kF32, 1, 0, 16},      {DType::kF32, DType::kF32, 70, 60, 1},
      {DType::kF32, DType::kBF16, 133, 126, 16}, {DType::kF32, DType::kF8E4M3, 133, 126, 16},
      {DType::kBF16, DType::kBF16, 65, 0, 128},  {DType::kBF16, DType::kF8E4M3, 65, 0, 64},
      {DType::kBF16, DType::kF32, 150, 149, 128}};
  for (const Case& c : kCases) {
    // With nothing around it the bounds are tightest in BF16; F32 stays tight all the way.
    ExpectRight(PlainLayer(c.act), c);
    ExpectRight(RandomLayer(c.act), c);
  }
}

TEST_P(AttentionTest, QuantizesWhatItWouldHaveWritten) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (DType act : {DType::kF32, DType::kBF16}) {
    const Layer layer = RandomLayer(act);
    const std::vector<Sequence> sequences = {RandomSequence(layer, 300)};
    const Paged paged = Store(layer, sequences, DType::kF8E4M3, 16);
    const TestTensor out = Attend(ops_, layer, sequences[0], paged, 0, 10, 300);
    for (Ops* ops : {&ops_, &three_threads->ops()}) {
      const QuantizedTensor quantized(290, kHeads * layer.v_dim());
      Attend(*ops, layer, sequences[0], paged, 0, 10, 300, quantized);
      ExpectQuantized(quantized, out);
    }
  }
}

TEST_P(AttentionTest, GivesTheSameBitsHoweverThePromptIsCut) {
  constexpr int64_t kPositions = kMostPositions;
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (DType cache : {DType::kF32, DType::kF8E4M3}) {
    const Layer layer = RandomLayer(DType::kBF16);
    const std::vector<Sequence> sequences = {RandomSequence(layer, kPositions)};
    const Paged first = Store(layer, sequences, cache, 16);
    const TestTensor whole = Attend(ops_, layer, sequences[0], first, 0, 0, kPositions);
    // How positions are found is the same for every type of cache.
    for (int block_size : cache == DType::kF32 ? std::vector<int>{1, 16, 128} : std::vector{16}) {
      const Paged paged = Store(layer, sequences, cache, block_size);
      for (int64_t chunk : {1, 7, 512}) {
        Ops& ops = chunk == 1 ? ops_ : three_threads->ops();
        // Few tokens at a time are slow: some of them will do.
        const int64_t step = chunk == 512 ? chunk : 53;
        for (int64_t begin = 0; begin < kPositions; begin += step) {
          const int64_t end = std::min(begin + chunk, kPositions);
          const TestTensor out = Attend(ops, layer, sequences[0], paged, 0, begin, end);
          ASSERT_EQ(BytesOf(out), BytesOf(whole->Slice(0, begin, end)))
              << "block size " << block_size << " positions " << begin << " to " << end;
        }
      }
    }
  }
}

TEST_P(AttentionTest, GivesTheSameBitsBesideOtherSequences) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  const Layer layer = RandomLayer(DType::kF32);
  const std::vector<Sequence> sequences = {RandomSequence(layer, 400), RandomSequence(layer, 9),
                                           RandomSequence(layer, 64)};
  const Paged paged = Store(layer, sequences, DType::kBF16, 16);
  // A prompt's last 340 tokens, more than go through the steps at a time; a whole prompt; and one
  // token that is decoded.
  const int64_t kBegins[] = {60, 0, 63};
  std::vector<int32_t> query_start = {0};
  std::vector<int32_t> context_lens;
  std::vector<int32_t> positions;
  int64_t tokens = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t p = kBegins[s]; p < sequences[s].size(); ++p, ++tokens) {
      positions.push_back(static_cast<int32_t>(p));
    }
    query_start.push_back(static_cast<int32_t>(tokens));
    context_lens.push_back(static_cast<int32_t>(sequences[s].size()));
  }
  const TestTensor q(DType::kF32, {tokens, kHeads, layer.nope_dim() + kRopeDim});
  for (size_t s = 0; s < sequences.size(); ++s) {
    device_->CopyFromHost(sequences[s].q->Slice(0, kBegins[s], sequences[s].size()).raw(),
                          q->Slice(0, query_start[s], query_start[s + 1]));
  }
  const TestTensor starts = IntTensor(query_start);
  const TestTensor lens = IntTensor(context_lens);
  const AttentionBatch batch = {.block_tables = paged.block_tables,
                                .query_start = starts,
                                .context_lens = lens,
                                .block_size = 16};
  for (Ops* ops : {&ops_, &three_threads->ops()}) {
    const TestTensor out(DType::kF32, {tokens, kHeads * layer.v_dim()});
    ops->MlaAttention(q, {layer.w_uk, layer.w_uv}, IntTensor(positions), layer.cos_sin, paged.cache,
                      batch, kScale, *out);
    for (size_t s = 0; s < sequences.size(); ++s) {
      const TestTensor alone =
          Attend(ops_, layer, sequences[s], paged, s, kBegins[s], sequences[s].size());
      EXPECT_EQ(BytesOf(out->Slice(0, query_start[s], query_start[s + 1])), BytesOf(alone))
          << "sequence " << s;
    }
  }
}

TEST_P(AttentionTest, SpreadsWhatIsNotANumberOnlyToTheTokensThatSeeIt) {
  const Layer layer = RandomLayer(DType::kF32);
  for (DType cache : {DType::kF32, DType::kF8E4M3}) {
    std::vector<Sequence> sequences = {RandomSequence(layer, 80)};
    sequences[0].kv_a->data<float>()[70 * (kKvLoraRank + kRopeDim) + kKvLoraRank] =
        std::numeric_limits<float>::quiet_NaN();
    const Paged paged = Store(layer, sequences, cache, 16);
    const TestTensor out = Attend(ops_, layer, sequences[0], paged, 0, 0, 80);
    for (int64_t t = 0; t < 80; ++t) {
      EXPECT_EQ(std::isnan(At(out, t, 3 * layer.v_dim() + 5)), t >= 70) << t;
    }
  }
}

TEST_P(AttentionTest, StaysFiniteWhenScoresAreLarge) {
  // Scores in the tens of thousands: exp of any of them overflows, of their differences not.
  const Layer layer = RandomLayer(DType::kF32);
  std::vector<Sequence> sequences = {
      {random_.Floats(DType::kF32, {90, kHeads, layer.nope_dim() + kRopeDim}, 1e4f),
       random_.Floats(DType::kF32, {90, kKvLoraRank + kRopeDim})}};
  const Paged paged = Store(layer, sequences, DType::kF32, 16);
  const TestTensor out = Attend(ops_, layer, sequences[0], paged, 0, 0, 90);
  for (int64_t i = 0; i < out->num_elements(); ++i) {
    ASSERT_TRUE(std::isfinite(ElementAt(out, i))) << i;
  }
}

// What StoreLatents makes of the three parts of a row.
class StoreLatentsTest : public AttentionTest {
 protected:
  static constexpr int64_t kQLoraRank = 150;
  static constexpr int64_t kTokens = 5;

  struct Stored {
    TestTensor q_a;
    QuantizedTensor q_a_quantized;
    TestTensor cache;
  };
  // The tokens at places 9, 0, 5, 3, 7 of a cache of 12.
  Stored Store(Ops& ops, DType cache_type) {
    const int64_t width =
        cache_type == DType::kF8E4M3 ? kKvLoraRank + 2 * 4 + kRopeDim * 2 : kKvLoraRank + kRopeDim;
    Stored stored = {TestTensor(qkv_a_.dtype(), {kTokens, kQLoraRank}),
                     QuantizedTensor(kTokens, kQLoraRank), TestTensor(cache_type, {3, 4, width})};
    ops.StoreLatents(qkv_a_, q_norm_, kv_norm_, static_cast<float>(kEps), positions_, cos_sin_,
                     places_, *stored.q_a, stored.cache);
    const TestTensor other_cache(cache_type, {3, 4, width});
    ops.StoreLatents(qkv_a_, q_norm_, kv_norm_, static_cast<float>(kEps), positions_, cos_sin_,
                     places_, stored.q_a_quantized, other_cache);
    EXPECT_EQ(BytesOf(other_cache), BytesOf(stored.cache));
    return stored;
  }

  void Draw(DType act) {
    // The rows lie within wider ones.
    wide_ = random_.Floats(act, {kTokens, 4 + kQLoraRank + kKvLoraRank + kRopeDim}, 3.0f);
    qkv_a_ = wide_->Slice(1, 4, 4 + kQLoraRank + kKvLoraRank + kRopeDim);
  }

  TestTensor wide_{DType::kF32, {1, 1}};
  Tensor qkv_a_;
  TestTensor q_norm_ = random_.Floats(DType::kF32, {kQLoraRank});
  TestTensor kv_norm_ = random_.Floats(DType::kF32, {kKvLoraRank});
  TestTensor cos_sin_ = random_.Floats(DType::kF32, {30, kRopeDim / 2, 2});
  TestTensor positions_ = IntTensor({0, 29, 3, 3, 17});
  TestTensor places_ = IntTensor({9, 0, 5, 3, 7});
};

TEST_P(StoreLatentsTest, NormsBothLatentsAndRotatesTheKey) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act)));
    Draw(act);
    const Tensor q_a = qkv_a_.Slice(1, 0, kQLoraRank);
    const Tensor latent = qkv_a_.Slice(1, kQLoraRank, kQLoraRank + kKvLoraRank);
    const Tensor key = qkv_a_.Slice(1, kQLoraRank + kKvLoraRank, qkv_a_.dim(1));
    for (DType cache_type : {DType::kF32, DType::kBF16}) {
      const Stored stored = Store(ops_, cache_type);
      for (int64_t t = 0; t < kTokens; ++t) {
        const double q_factor = ReferenceNormFactor(q_a, t, kEps);
        for (int64_t i = 0; i < kQLoraRank; ++i) {
          EXPECT_WITHIN(At(stored.q_a, t, i),
                        ReferenceNorm(q_a, t, i, q_factor, At(q_norm_, i)).Rounded(act));
        }
        const auto place = static_cast<int64_t>(At(places_, t));
        const std::vector<double> cached = CachedAt(stored.cache, place, kKvLoraRank, kRopeDim);
        const double kv_factor = ReferenceNormFactor(latent, t, kEps);
        for (int64_t i = 0; i < kKvLoraRank; ++i) {
          EXPECT_WITHIN(cached[i], ReferenceNorm(latent, t, i, kv_factor, At(kv_norm_, i))
                                       .Rounded(act)
                                       .Rounded(cache_type));
        }
        for (int64_t i = 0; i < kRopeDim; i += 2) {
          const auto [even, odd] = ReferenceRotate(At(key, t, i), At(key, t, i + 1), cos_sin_,
                                                   static_cast<int64_t>(At(positions_, t)), i);
          EXPECT_WITHIN(cached[kKvLoraRank + i], even.Rounded(act).Rounded(cache_type));
          EXPECT_WITHIN(cached[kKvLoraRank + i + 1], odd.Rounded(act).Rounded(cache_type));
        }
      }
      EXPECT_EQ(At(stored.cache, 0, 1, 0), 0.0) << "a place that is nobody's";
      ExpectQuantized(stored.q_a_quantized, stored.q_a);
    }
  }
}

TEST_P(StoreLatentsTest, QuantizesTheNormedLatentForAnFp8Cache) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act)));
    Draw(act);
    const Stored plain = Store(ops_, act);
    const Stored stored = Store(ops_, DType::kF8E4M3);
    const Tensor all = plain.cache->Reshape({12, kKvLoraRank + kRopeDim});
    for (int64_t t = 0; t < kTokens; ++t) {
      const auto place = static_cast<int64_t>(At(places_, t));
      const auto* row =
          static_cast<const uint8_t*>(stored.cache->raw()) + place * stored.cache->dim(2);
      const QuantizedRow expected = ReferenceQuantize(all.Slice(1, 0, kKvLoraRank), place);
      EXPECT_TRUE(std::equal(expected.codes.begin(), expected.codes.end(), row));
      EXPECT_EQ(std::memcmp(row + kKvLoraRank, expected.factors.data(), 8), 0);
      for (int64_t i = 0; i < kRopeDim; ++i) {
        const BFloat16 key = ToBFloat16(static_cast<float>(At(all, place, kKvLoraRank + i)));
        EXPECT_EQ(std::memcmp(row + kKvLoraRank + 8 + 2 * i, &key, 2), 0) << i;
      }
    }
  }
}

TEST_P(StoreLatentsTest, GivesARowTheSameBitsAloneAndOnEveryThread) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  constexpr int64_t kMany = 300;
  const TestTensor kv_a = random_.Floats(DType::kBF16, {kMany, kKvLoraRank + kRopeDim});
  std::vector<int32_t> places(kMany);
  std::iota(places.begin(), places.end(), 0);
  const TestTensor positions = random_.Ints({kMany}, 30);
  const TestTensor together(DType::kBF16, {kMany, 1, kKvLoraRank + kRopeDim});
  three_threads->ops().StoreLatents(kv_a, {}, kv_norm_, 1e-6f, positions, cos_sin_,
                                    IntTensor(places), {}, together);
  const TestTensor alone(DType::kBF16, {kMany, 1, kKvLoraRank + kRopeDim});
  for (int32_t t = 0; t < kMany; ++t) {
    ops_.StoreLatents(kv_a->Slice(0, t, t + 1), {}, kv_norm_, 1e-6f, positions->Slice(0, t, t + 1),
                      cos_sin_, IntTensor({t}), {}, alone);
  }
  EXPECT_EQ(BytesOf(alone), BytesOf(together));
}

INSTANTIATE_ON_EVERY_TARGET(AttentionTest);
INSTANTIATE_ON_EVERY_TARGET(StoreLatentsTest);

}  // namespace
}  // namespace fathom
