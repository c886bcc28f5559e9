// MlaPrefillSm90 against attention in double precision. Needs a Hopper GPU; skips without one.

#include "kernels/cuda/mla_prefill_sm90.h"

#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/ops.h"
#include "tests/kernels/cuda/sm90_fixture.h"

namespace fathom {
namespace {

constexpr int kHeads = MlaPrefillSm90::kHeads;
constexpr int kRank = MlaPrefillSm90::kKvLoraRank;
constexpr int kRope = MlaPrefillSm90::kRopeHeadDim;
constexpr int kHeadDim = MlaPrefillSm90::kHeadDim;
constexpr int kQueryDim = kHeadDim + kRope;
constexpr int kWidth = kRank + kRope;
constexpr int kFp8TokenBytes = kRank + 4 * kRank / 128 + 2 * kRope;

using Bf16 = __nv_bfloat16;
using CacheType = MlaCacheType;

struct Sequence {
  int chunk;        // queries of this step
  int earlier = 0;  // tokens in the cache before them
  int length() const { return earlier + chunk; }
};

struct Setting {
  int block_size = 64;
  CacheType cache = CacheType::kBf16;
  int piece_tokens = 16384;
  int min_chunk = 1;
};

class MlaPrefillSm90Test : public Sm90Test<MlaPrefillSm90> {
 protected:
  float Normal() { return normal_(random_); }
  std::vector<Bf16> Normals(size_t size, float deviation = 1.0f) {
    std::vector<Bf16> values(size);
    for (Bf16& value : values) value = __float2bfloat16(deviation * Normal());
    return values;
  }

  // One token of the cache: what the kernel shall see, and its bytes.
  void FillToken(CacheType type, float* seen, unsigned char* bytes) {
    if (type == CacheType::kBf16) {
      for (int i = 0; i < kWidth; ++i) {
        const Bf16 value = __float2bfloat16(Normal());
        seen[i] = __bfloat162float(value);
        std::memcpy(bytes + i * 2, &value, 2);
      }
      return;
    }
    for (int i = 0; i < kRank; ++i) {
      float factor;
      if (i % 128 == 0) {
        factor = 0.01f * (1.0f + std::abs(Normal()));
        std::memcpy(bytes + kRank + i / 128 * 4, &factor, 4);
      }
      std::memcpy(&factor, bytes + kRank + i / 128 * 4, 4);
      const __nv_fp8_e4m3 value(Normal() / factor);
      std::memcpy(bytes + i, &value, 1);
      seen[i] = static_cast<float>(value) * factor;
    }
    for (int i = 0; i < kRope; ++i) {
      const Bf16 value = __float2bfloat16(Normal());
      seen[kRank + i] = __bfloat162float(value);
      std::memcpy(bytes + kRank + 16 + i * 2, &value, 2);
    }
  }

  // The sequences' caches, in shuffled blocks; NaN where they hold nothing.
  void FillCache(const Setting& setting) {
    const size_t token_bytes = setting.cache == CacheType::kBf16 ? kWidth * 2 : kFp8TokenBytes;
    const int size = setting.block_size;
    int used = 0;
    max_blocks_ = 0;
    for (const Sequence& s : sequences_) {
      const int blocks = (s.length() + size - 1) / size;
      max_blocks_ = std::max(max_blocks_, blocks);
      used += blocks;
    }
    num_blocks_ = used + 3;
    std::vector<int> ids(num_blocks_);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random_);
    tables_.assign(sequences_.size() * max_blocks_, -1'000'000);
    cache_.assign(num_blocks_ * size * token_bytes, 0xFF);
    seen_.clear();
    for (size_t s = 0, next = 0; s < sequences_.size(); ++s) {
      seen_.emplace_back(static_cast<size_t>(sequences_[s].length()) * kWidth);
      for (int t = 0; t < sequences_[s].length(); ++t) {
        int& id = tables_[s * max_blocks_ + t / size];
        if (t % size == 0) id = ids[next++];
        FillToken(setting.cache, &seen_[s][static_cast<size_t>(t) * kWidth],
                  &cache_[(static_cast<size_t>(id) * size + t % size) * token_bytes]);
      }
    }
  }

  // Computes the sequences in one step, as BF16 and as FP8.
  void Prefill(const std::vector<Sequence>& sequences, const Setting& setting = {}) {
    sequences_ = sequences;
    FillCache(setting);
    query_start_ = {0};
    positions_.clear();
    std::vector<int> lens;
    int total = 0;
    for (const Sequence& s : sequences) {
      query_start_.push_back(query_start_.back() + s.chunk);
      lens.push_back(s.length());
      total += s.length();
      for (int i = 0; i < s.chunk; ++i) positions_.push_back(s.earlier + i);
    }
    const int tokens = query_start_.back();
    q_ = Normals(static_cast<size_t>(tokens) * kHeads * kQueryDim);
    const float deviation = 1.0f / std::sqrt(static_cast<float>(kRank));
    w_uk_ = Normals(static_cast<size_t>(kHeads) * kRank * kHeadDim, deviation);
    w_uv_ = Normals(static_cast<size_t>(kHeads) * kHeadDim * kRank, deviation);
    cos_sin_.clear();
    for (int t = 0; t <= *std::max_element(lens.begin(), lens.end()); ++t) {
      for (int i = 0; i < kRope / 2; ++i) {
        const double angle = t * std::pow(10000.0, -2.0 * i / kRope);
        cos_sin_.push_back(static_cast<float>(std::cos(angle)));
        cos_sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }

    const MlaPrefillSm90::Limits limits = {
        .max_tokens = tokens, .max_context_tokens = total, .piece_tokens = setting.piece_tokens};
    const DeviceArray<char> workspace(MlaPrefillSm90::WorkspaceBytes(limits));
    const DeviceArray<unsigned char> cache(cache_);
    const DeviceArray<Bf16> q(q_), w_uk(w_uk_), w_uv(w_uv_);
    const DeviceArray<int> tables(tables_), starts(query_start_), contexts(lens),
        positions(positions_);
    const DeviceArray<float> cos_sin(cos_sin_);
    const size_t outputs = static_cast<size_t>(tokens) * kHeads * kHeadDim;
    const DeviceArray<Bf16> out(outputs);
    const DeviceArray<uint8_t> out_fp8(outputs);
    const DeviceArray<float> out_scales(outputs / kHeadDim);
    const MlaPrefillSm90 prefill(workspace.data(), limits, device_.multiProcessorCount);
    const auto step = prefill.Schedule({.num_sequences = static_cast<int>(sequences.size()),
                                        .min_chunk = setting.min_chunk,
                                        .query_start = starts.data(),
                                        .context_lens = contexts.data(),
                                        .host_query_start = query_start_.data(),
                                        .host_context_lens = lens.data()},
                                       nullptr);
    MlaPrefillSm90::Layer layer = {.q = q.data(),
                                   .w_uk = w_uk.data(),
                                   .w_uv = w_uv.data(),
                                   .positions = positions.data(),
                                   .cos_sin = cos_sin.data(),
                                   .block_tables = tables.data(),
                                   .max_blocks = max_blocks_,
                                   .scale = kScale,
                                   .out = out.data()};
    const MlaCache where = {cache.data(), setting.cache, num_blocks_, setting.block_size};
    prefill.Run(step, where, layer, nullptr);
    layer.out = nullptr;
    layer.out_fp8 = out_fp8.data();
    layer.out_scales = out_scales.data();
    prefill.Run(step, where, layer, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    out_ = out.ToHost();
    out_fp8_ = out_fp8.ToHost();
    out_scales_ = out_scales.ToHost();
  }

  // ‖out − reference‖ / ‖reference‖ of one head of one query. The reference works in the latent
  // space, as the report's equations do.
  double Error(int sequence, int query, int head) {
    const int token = query_start_[sequence] + query;
    const Bf16* q = &q_[(static_cast<size_t>(token) * kHeads + head) * kQueryDim];
    std::vector<double> absorbed(kWidth, 0.0);
    for (int r = 0; r < kRank; ++r) {
      const Bf16* row = &w_uk_[(static_cast<size_t>(head) * kRank + r) * kHeadDim];
      for (int d = 0; d < kHeadDim; ++d) {
        absorbed[r] += double{__bfloat162float(row[d])} * __bfloat162float(q[d]);
      }
    }
    for (int i = 0; i < kRope; i += 2) {
      const float* turn = &cos_sin_[static_cast<size_t>(positions_[token]) * kRope + i];
      const double a = __bfloat162float(q[kHeadDim + i]), b = __bfloat162float(q[kHeadDim + i + 1]);
      absorbed[kRank + i] = a * turn[0] - b * turn[1];
      absorbed[kRank + i + 1] = a * turn[1] + b * turn[0];
    }
    const int length = sequences_[sequence].earlier + query + 1;
    const float* cache = seen_[sequence].data();
    std::vector<double> weights(length);
    for (int t = 0; t < length; ++t) {
      double score = 0;
      for (int i = 0; i < kWidth; ++i) score += absorbed[i] * cache[size_t(t) * kWidth + i];
      weights[t] = score * kScale;
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    std::vector<double> latent(kRank, 0.0);
    for (int t = 0; t < length; ++t) {
      for (int r = 0; r < kRank; ++r) {
        latent[r] += weights[t] / sum * cache[size_t(t) * kWidth + r];
      }
    }
    double difference = 0, norm = 0;
    for (int d = 0; d < kHeadDim; ++d) {
      const Bf16* row = &w_uv_[(static_cast<size_t>(head) * kHeadDim + d) * kRank];
      double expected = 0;
      for (int r = 0; r < kRank; ++r) expected += latent[r] * __bfloat162float(row[r]);
      const double got =
          __bfloat162float(out_[(static_cast<size_t>(token) * kHeads + head) * kHeadDim + d]);
      difference += (got - expected) * (got - expected);
      norm += expected * expected;
    }
    return std::sqrt(difference / norm);
  }

  // Keys, values, rotated queries, probabilities and the output are rounded to BF16 (2⁻⁹/√3
  // = 1.1e-3 in the mean each), and so is the latent of an FP8 cache; scores have a deviation of 1,
  // so that an error of theirs counts like one of the probabilities: √6 · 1.1e-3 = 2.7e-3. Where
  // few keys count nothing averages out: three times that is the bound.
  static constexpr double kTolerance = 8e-3;
  static constexpr float kScale = 0.07216878f;  // 1 / √192

  void ExpectAllClose(int queries_each = 8) {
    for (size_t s = 0; s < sequences_.size(); ++s) {
      const int chunk = sequences_[s].chunk;
      std::set<int> queries = {0, chunk - 1, std::min(127, chunk - 1), std::min(128, chunk - 1)};
      for (int i = 4; i < queries_each; ++i) queries.insert(static_cast<int>(random_() % chunk));
      for (int query : queries) {
        for (int head : {0, static_cast<int>(1 + random_() % (kHeads - 2)), kHeads - 1}) {
          EXPECT_LT(Error(static_cast<int>(s), query, head), kTolerance)
              << "sequence " << s << " of " << sequences_[s].earlier << " + " << chunk
              << " tokens, query " << query << ", head " << head;
        }
      }
    }
    ExpectFp8IsTheRoundedBf16();
  }

  void ExpectFp8IsTheRoundedBf16() {
    int wrong = 0;
    for (size_t row = 0; row < out_scales_.size(); ++row) {
      const Bf16* values = &out_[row * kHeadDim];
      float largest = 0;
      for (int d = 0; d < kHeadDim; ++d) {
        largest = std::max(largest, std::abs(__bfloat162float(values[d])));
      }
      const float factor = std::max(largest, kSmallestQuantizedMagnitude) / 448.0f;
      wrong += out_scales_[row] != factor;
      for (int d = 0; d < kHeadDim; ++d) {
        const __nv_fp8_e4m3 expected(__bfloat162float(values[d]) / factor);
        wrong += out_fp8_[row * kHeadDim + d] != expected.__x;
      }
    }
    EXPECT_EQ(wrong, 0);
  }

  std::normal_distribution<float> normal_;
  std::vector<Sequence> sequences_;
  std::vector<int> tables_, query_start_, positions_;
  int max_blocks_ = 0;
  int64_t num_blocks_ = 0;
  std::vector<unsigned char> cache_;
  std::vector<std::vector<float>> seen_;  // [sequence][token][576]
  std::vector<Bf16> q_, w_uk_, w_uv_, out_;
  std::vector<float> cos_sin_;
  std::vector<uint8_t> out_fp8_;
  std::vector<float> out_scales_;
};

TEST_F(MlaPrefillSm90Test, OneTokenIsItsOwnValue) {
  Prefill({{.chunk = 1}});
  ExpectAllClose();
}

TEST_F(MlaPrefillSm90Test, ChunkLengthsAroundTheTileSizes) {
  for (int chunk : {7, 64, 100, 129, 300}) {
    Prefill({{.chunk = chunk}});
    ExpectAllClose();
  }
}

TEST_F(MlaPrefillSm90Test, ALongPromptFillsTheGrid) {
  Prefill({{.chunk = 2048}});
  ExpectAllClose(16);
}

TEST_F(MlaPrefillSm90Test, ChunksContinueWhatIsCached) {
  for (int earlier : {5, 1000}) {
    for (int chunk : {1, 129, 500}) {
      Prefill({{chunk, earlier}});
      ExpectAllClose();
    }
  }
}

TEST_F(MlaPrefillSm90Test, SeveralSequencesInOneStep) {
  Prefill({{100, 0}, {1, 1000}, {7, 5}, {129, 64}, {64, 127}, {2, 0}, {300, 700}});
  ExpectAllClose();
}

TEST_F(MlaPrefillSm90Test, SmallPagesAndPagesOfFp8) {
  for (CacheType cache : {CacheType::kBf16, CacheType::kFp8}) {
    for (int block_size : {16, 64, 128}) {
      Prefill({{100, 0}, {257, 45}, {3, 30}}, {.block_size = block_size, .cache = cache});
      ExpectAllClose();
    }
  }
}

TEST_F(MlaPrefillSm90Test, ContextsLongerThanAPieceContinueInTheNext) {
  for (int piece : {128, 384}) {
    Prefill({{500, 0}, {300, 1000}, {100, 29}, {1, 640}}, {.piece_tokens = piece});
    ExpectAllClose();
  }
  Prefill({{200, 1500}}, {.cache = CacheType::kFp8, .piece_tokens = 512});
  ExpectAllClose();
}

TEST_F(MlaPrefillSm90Test, SequencesThatDecodeAreLeftAlone) {
  Prefill({{1, 1000}, {129, 10}, {1, 0}, {2, 3}}, {.min_chunk = 2});
  for (int token : {0, 130}) {
    for (int i = 0; i < kHeads * kHeadDim; ++i) {
      ASSERT_TRUE(std::isnan(__bfloat162float(out_[token * kHeads * kHeadDim + i])));
    }
  }
  for (int sequence : {1, 3}) EXPECT_LT(Error(sequence, 1, 3), kTolerance);
}

TEST_F(MlaPrefillSm90Test, ManySequencesInOneStep) {
  std::vector<Sequence> sequences;
  for (int i = 0; i < 150; ++i) {
    sequences.push_back({1 + static_cast<int>(random_() % 40), static_cast<int>(random_() % 200)});
  }
  Prefill(sequences, {.piece_tokens = 4096});
  ExpectAllClose(4);
}

}  // namespace
}  // namespace fathom
