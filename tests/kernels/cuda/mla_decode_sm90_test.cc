// MlaDecodeSm90 against attention in double precision. Needs a Hopper GPU; skips without one.

#include "kernels/cuda/mla_decode_sm90.h"

#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "tests/kernels/cuda/sm90_fixture.h"

namespace fathom {
namespace {

constexpr int kHeads = MlaDecodeSm90::kHeads;
constexpr int kRank = MlaDecodeSm90::kKvLoraRank;
constexpr int kRope = MlaDecodeSm90::kRopeHeadDim;
constexpr int kWidth = kRank + kRope;
constexpr int kGroup = 128;  // codes under one factor of an FP8 cache
constexpr int kKeyAt = kRank + kRank / kGroup * 4, kFp8TokenBytes = kKeyAt + kRope * 2;

using Bf16 = __nv_bfloat16;
using CacheType = MlaCacheType;

class MlaDecodeSm90Test : public Sm90Test<MlaDecodeSm90> {
 protected:
  std::vector<Bf16> Normals(size_t size) {
    std::normal_distribution<float> normal;
    std::vector<Bf16> values(size);
    for (Bf16& value : values) value = __float2bfloat16(normal(random_));
    return values;
  }

  // What is decoded beside the lengths of the sequences.
  struct Options {
    int block_size = 64;
    CacheType cache = CacheType::kBf16;
    // The last tokens of a sequence that are rows of this step: each sees those before it.
    std::vector<int> new_tokens = {1};  // of sequence s: entry s % size
    MlaDecodeSm90::Start start = MlaDecodeSm90::Start::kAfterPredecessors;
  };

  // Decodes sequences of these lengths; where the cache holds nothing there is NaN.
  void Decode(const std::vector<int>& context_lens, const Options& options) {
    cache_type_ = options.cache;
    MakeCache(context_lens, options.block_size);
    MakeRows(context_lens, options.new_tokens);
    const int n = static_cast<int>(lens_.size());
    q_latent_ = Normals(static_cast<size_t>(n) * kHeads * kRank);
    q_rope_ = Normals(static_cast<size_t>(n) * kHeads * kRope);

    const int sms = device_.multiProcessorCount;
    const DeviceArray<char> workspace(MlaDecodeSm90::WorkspaceBytes(2, sms));
    const DeviceArray<uint8_t> cache(cache_);
    const DeviceArray<Bf16> q_latent(q_latent_), q_rope(q_rope_);
    const DeviceArray<int> tables(tables_), lens(lens_), sequences(sequences_), tokens(tokens_);
    const MlaDecodeSm90 decode(workspace.data(), 2, sms);
    const auto map = MlaDecodeSm90::MapCache(
        {.data = cache.data(),
         .type = cache_type_,
         .num_blocks = static_cast<int64_t>(cache_.size()) / TokenBytes() / block_size_,
         .block_size = block_size_});
    const bool identity = n == static_cast<int>(context_lens.size());
    decode.Schedule({.count = n,
                     .context_lens = lens.data(),
                     .sequences = identity ? nullptr : sequences.data(),
                     .tokens = identity ? nullptr : tokens.data()},
                    nullptr);
    if (identity) std::iota(tokens_.begin(), tokens_.end(), 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int layer = 0; layer < 2; ++layer) {  // the second as the first: the counters are its own
      const DeviceArray<Bf16> out(std::vector<Bf16>(q_latent_.size(), __float2bfloat16(NAN)));
      decode.Run(map,
                 {.index = layer,
                  .num_rows = n,
                  .q_latent = q_latent.data(),
                  .q_rope = q_rope.data(),
                  .block_tables = tables.data(),
                  .max_blocks = max_blocks_,
                  .scale = kScale,
                  .out = out.data(),
                  .start = options.start},
                 nullptr);
      CUDA_CHECK(cudaDeviceSynchronize());
      const std::vector<Bf16> result = out.ToHost();
      if (layer > 0) {
        ASSERT_EQ(std::memcmp(result.data(), out_.data(), result.size() * sizeof(Bf16)), 0)
            << "not reproducible";
      }
      out_ = result;
    }
  }
  void Decode(const std::vector<int>& context_lens) { Decode(context_lens, Options()); }

  // Random tokens as the cache stores them, all different.
  class TokenPool {
   public:
    explicit TokenPool(MlaDecodeSm90Test& test) : values_(test.Normals(1 << 20)) {
      if (test.cache_type_ == CacheType::kBf16) return;
      codes_.resize(values_.size() / kGroup * kGroup);
      for (size_t i = 0; i < codes_.size(); ++i) {
        codes_[i] = __nv_fp8_e4m3(__bfloat162float(values_[i]) * 100.0f).__x;  // most below 448
      }
    }
    void Draw(MlaDecodeSm90Test& test, uint8_t* token) const {
      const auto copy_values = [&](int count, uint8_t* to) {
        const size_t from = test.random_() % (values_.size() - count);
        std::memcpy(to, &values_[from], count * sizeof(Bf16));
      };
      if (codes_.empty()) {
        copy_values(kWidth, token);
        return;
      }
      std::memcpy(token, &codes_[test.random_() % (codes_.size() - kRank)], kRank);
      for (int i = 0; i < kRank / kGroup; ++i) {
        const float factor = 0.005f + 0.01f * static_cast<float>(test.random_() % 1000) / 1000;
        std::memcpy(token + kRank + i * 4, &factor, sizeof factor);
      }
      copy_values(kRope, token + kKeyAt);
    }

   private:
    std::vector<Bf16> values_;
    std::vector<uint8_t> codes_;  // FP8
  };

  int TokenBytes() const {
    return cache_type_ == CacheType::kFp8 ? kFp8TokenBytes
                                          : kWidth * static_cast<int>(sizeof(Bf16));
  }

  // The latent and key that stand there.
  std::vector<float> TokenAt(size_t place) const {
    const uint8_t* token = &cache_[place];
    std::vector<float> values(kWidth);
    const bool is_fp8 = cache_type_ == CacheType::kFp8;
    for (int i = 0; i < kWidth; ++i) {
      if (is_fp8 && i < kRank) {
        __nv_fp8_e4m3 code;
        code.__x = token[i];
        float factor;
        std::memcpy(&factor, token + kRank + i / kGroup * 4, sizeof factor);
        values[i] = static_cast<float>(code) * factor;
      } else {
        Bf16 value;
        std::memcpy(&value, is_fp8 ? token + kKeyAt + (i - kRank) * 2 : token + i * 2,
                    sizeof value);
        values[i] = __bfloat162float(value);
      }
    }
    return values;
  }

  void MakeCache(const std::vector<int>& context_lens, int block_size) {
    block_size_ = block_size;
    const auto blocks_of = [&](int len) { return (len + block_size - 1) / block_size; };
    max_blocks_ = blocks_of(*std::max_element(context_lens.begin(), context_lens.end()));
    int used = 0;
    for (int len : context_lens) used += blocks_of(len);
    std::vector<int> ids(used + 3);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random_);
    tables_.assign(context_lens.size() * max_blocks_, 1 << 30);  // no block: must not be read
    cache_.assign((used + 3) * static_cast<size_t>(block_size) * TokenBytes(), 0xFF);  // NaN
    const TokenPool pool(*this);
    size_t next = 0;
    for (size_t s = 0; s < context_lens.size(); ++s) {
      for (int b = 0; b < blocks_of(context_lens[s]); ++b) {
        tables_[s * max_blocks_ + b] = ids[next++];
      }
      for (int t = 0; t < context_lens[s]; ++t) {
        pool.Draw(*this, &cache_[Place(static_cast<int>(s), t)]);
      }
    }
  }

  // Each row's token is at a random place among the queries.
  void MakeRows(const std::vector<int>& context_lens, const std::vector<int>& new_tokens) {
    lens_.clear();
    sequences_.clear();
    for (size_t s = 0; s < context_lens.size(); ++s) {
      const int rows = std::min(new_tokens[s % new_tokens.size()], context_lens[s]);
      for (int i = rows - 1; i >= 0; --i) {
        lens_.push_back(context_lens[s] - i);
        sequences_.push_back(static_cast<int>(s));
      }
    }
    tokens_.resize(lens_.size());
    std::iota(tokens_.begin(), tokens_.end(), 0);
    std::shuffle(tokens_.begin(), tokens_.end(), random_);
  }

  size_t Place(int sequence, int position) const {
    const int block = tables_[sequence * max_blocks_ + position / block_size_];
    return (static_cast<size_t>(block) * block_size_ + position % block_size_) * TokenBytes();
  }

  // ‖out − reference‖ / ‖reference‖ of one head of one row.
  double Error(int row, int head) const {
    const int len = lens_[row];
    const Bf16* latent = &q_latent_[(static_cast<size_t>(tokens_[row]) * kHeads + head) * kRank];
    const Bf16* rope = &q_rope_[(static_cast<size_t>(tokens_[row]) * kHeads + head) * kRope];
    std::vector<double> weights(len);
    std::vector<std::vector<float>> tokens(len);
    for (int t = 0; t < len; ++t) {
      tokens[t] = TokenAt(Place(sequences_[row], t));
      double score = 0;
      for (int i = 0; i < kRank; ++i) score += double{__bfloat162float(latent[i])} * tokens[t][i];
      for (int i = 0; i < kRope; ++i) {
        score += double{__bfloat162float(rope[i])} * tokens[t][kRank + i];
      }
      weights[t] = score * kScale;
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    std::vector<double> expected(kRank);
    for (int t = 0; t < len; ++t) {
      for (int i = 0; i < kRank; ++i) expected[i] += weights[t] / sum * tokens[t][i];
    }
    double difference = 0, norm = 0;
    for (int i = 0; i < kRank; ++i) {
      const double got =
          __bfloat162float(out_[(static_cast<size_t>(tokens_[row]) * kHeads + head) * kRank + i]);
      difference += (got - expected[i]) * (got - expected[i]);
      norm += expected[i] * expected[i];
    }
    return std::sqrt(difference / norm);
  }

  // Rounding random numbers to BF16 costs 1.7e-3 in the mean, relative (2⁻⁸/√3 for mantissas near
  // one, less for others). The output is rounded once, and so is each probability, averaging out
  // but for the largest, which is exact: 1.9e-3, seldom 2.9e-3. From an FP8 cache each latent is
  // rounded too: √3 · 1.7e-3 = 2.9e-3, of which twice is the bound.
  double Tolerance() const { return cache_type_ == CacheType::kFp8 ? 5.8e-3 : 3.2e-3; }
  static constexpr float kScale = 0.1352337788608801f / 8;  // random scores spread like real ones

  void ExpectAllClose(int most_rows = 1 << 30) {
    std::vector<int> which(lens_.size());
    std::iota(which.begin(), which.end(), 0);
    std::shuffle(which.begin(), which.end(), random_);
    which.resize(std::min<size_t>(which.size(), most_rows));
    for (int row : which) {
      for (int head : {0, 5, 10, 15}) {
        EXPECT_LT(Error(row, head), Tolerance())  // false for NaN
            << "row " << row << ", head " << head << ", " << lens_[row] << " tokens";
      }
    }
  }

  std::vector<int> RandomLens(int count, int most) {
    std::vector<int> lens(count);
    for (int& len : lens) len = 1 + static_cast<int>(random_() % most);
    return lens;
  }

  int block_size_ = 0, max_blocks_ = 0;
  std::vector<int> tables_;
  std::vector<int> lens_, sequences_, tokens_;  // of each row
  CacheType cache_type_ = CacheType::kBf16;
  std::vector<uint8_t> cache_;
  std::vector<Bf16> q_latent_, q_rope_, out_;
};

TEST_F(MlaDecodeSm90Test, OneTokenIsItsOwnLatent) {
  Decode({1});
  ExpectAllClose();
}

TEST_F(MlaDecodeSm90Test, EveryLengthAroundTheTileSizes) {
  for (int block_size : {16, 32, 48, 64, 128}) {
    std::vector<int> lens(200);
    std::iota(lens.begin(), lens.end(), 1);
    Decode(lens, {.block_size = block_size});
    ExpectAllClose(block_size == 64 ? 200 : 60);
  }
}

TEST_F(MlaDecodeSm90Test, OneSequenceOfAnyLengthIsSharedByACluster) {
  for (int len : {1, 15, 16, 17, 63, 64, 65, 255, 257, 700, 2304, 2305}) {
    Decode({len}, {.block_size = 16});
    ExpectAllClose();
  }
}

TEST_F(MlaDecodeSm90Test, OneLongSequenceIsSharedByAllClusters) {
  Decode({20'011});
  ExpectAllClose();
  Decode({131'072}, {.block_size = 128});
  ExpectAllClose();
}

// Clusters of every size, with rows cut between them and rows that share a cluster.
TEST_F(MlaDecodeSm90Test, AnyNumberOfSequencesOfMixedLengths) {
  for (int count : {2, 3, 5, 8, 9, 13, 16, 23, 32, 33, 48, 64, 65, 100, 131, 132, 133, 200, 256}) {
    Decode(RandomLens(count, 3000), {.block_size = count % 2 == 0 ? 64 : 32});
    ExpectAllClose(8);
  }
}

TEST_F(MlaDecodeSm90Test, AFewLongSequencesAmongManyShortOnes) {
  for (int count : {4, 12, 30, 60, 97}) {
    std::vector<int> lens = RandomLens(count, 300);
    lens[count / 2] = 30'000;
    lens.back() = 9'000;
    Decode(lens);
    ExpectAllClose(12);
    EXPECT_LT(Error(count / 2, 3), Tolerance());
    EXPECT_LT(Error(count - 1, 3), Tolerance());
  }
}

TEST_F(MlaDecodeSm90Test, ThousandShortSequences) {
  Decode(RandomLens(1024, 90));
  ExpectAllClose(60);
}

TEST_F(MlaDecodeSm90Test, SeveralTokensOfASequenceSeeThoseBeforeThem) {
  Decode({40, 1, 700, 16, 2000}, {.new_tokens = {16, 1, 5, 16, 2}});
  ExpectAllClose();
  Decode(RandomLens(70, 900), {.block_size = 16, .new_tokens = {1, 1, 9, 16}});
  ExpectAllClose(60);
}

// All that differs between the kinds of cache: tiles of other sizes, tokens that end within a pair,
// a group, a tile; rows in clusters of every size, cut and whole, that share the rings.
TEST_F(MlaDecodeSm90Test, FromAnFp8Cache) {
  std::vector<int> lens(200);
  std::iota(lens.begin(), lens.end(), 1);
  for (int block_size : {16, 64}) {
    Decode(lens, {.block_size = block_size, .cache = CacheType::kFp8});
    ExpectAllClose(200);
  }
  for (int count : {1, 2, 7, 8, 15, 16, 30, 33, 64, 65, 66, 132, 133, 256}) {
    Decode(RandomLens(count, 3000), {.block_size = count % 2 == 0 ? 64 : 32,
                                     .cache = CacheType::kFp8,
                                     .start = MlaDecodeSm90::Start::kEarly});
    ExpectAllClose(8);
  }
  Decode({131'072}, {.block_size = 128, .cache = CacheType::kFp8});
  ExpectAllClose();
  Decode({40, 1, 700, 16, 2000}, {.cache = CacheType::kFp8, .new_tokens = {16, 1, 5, 16, 2}});
  ExpectAllClose();
}

TEST_F(MlaDecodeSm90Test, AnEarlyStartGivesTheSame) {
  for (int count : {1, 8, 50, 256}) {
    Decode(RandomLens(count, 2500), {.new_tokens = {1, 4}, .start = MlaDecodeSm90::Start::kEarly});
    ExpectAllClose(10);
  }
}

}  // namespace
}  // namespace fathom
