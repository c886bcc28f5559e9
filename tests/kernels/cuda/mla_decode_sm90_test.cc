// MlaDecodeSm90 against attention in double precision. Needs a Hopper GPU; skips without one.

#include "kernels/cuda/mla_decode_sm90.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/cuda_check.h"

namespace fathom {
namespace {

constexpr int kHeads = MlaDecodeSm90::kHeads;
constexpr int kRank = MlaDecodeSm90::kKvLoraRank;
constexpr int kRope = MlaDecodeSm90::kRopeHeadDim;
constexpr int kBlock = MlaDecodeSm90::kBlockSize;
constexpr int kWidth = kRank + kRope;

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    CUDA_CHECK(cudaMalloc(&data_, size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CUDA_CHECK(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return data_; }
  std::vector<T> ToHost() const {
    std::vector<T> values(size_);
    CUDA_CHECK(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

using Bf16 = __nv_bfloat16;

class MlaDecodeSm90Test : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU here";
    CUDA_CHECK(cudaGetDeviceProperties(&device_, 0));
    if (!MlaDecodeSm90::Supports(device_)) GTEST_SKIP() << device_.name << " is no Hopper";
    seed_ = std::random_device{}();
    RecordProperty("seed", std::to_string(seed_));
    std::printf("seed %u\n", seed_);
    random_.seed(seed_);
  }

  std::vector<Bf16> Normals(size_t size) {
    std::normal_distribution<float> normal;
    std::vector<Bf16> values(size);
    for (Bf16& value : values) value = __float2bfloat16(normal(random_));
    return values;
  }

  // Decodes sequences of these lengths; where the cache holds nothing there is NaN.
  void Decode(const std::vector<int>& context_lens) {
    lens_ = context_lens;
    const int n = static_cast<int>(lens_.size());
    max_blocks_ = (*std::max_element(lens_.begin(), lens_.end()) + kBlock - 1) / kBlock;
    int used = 0;
    for (int len : lens_) used += (len + kBlock - 1) / kBlock;
    std::vector<int> ids(used + 3);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random_);
    tables_.assign(static_cast<size_t>(n) * max_blocks_, 0);
    cache_.assign((used + 3) * static_cast<size_t>(kBlock) * kWidth, __float2bfloat16(NAN));
    for (int s = 0, next = 0; s < n; ++s) {
      for (int b = 0; b * kBlock < lens_[s]; ++b) {
        tables_[s * max_blocks_ + b] = ids[next++];
        const int tokens = std::min(kBlock, lens_[s] - b * kBlock);
        const std::vector<Bf16> rows = Normals(static_cast<size_t>(tokens) * kWidth);
        std::copy(rows.begin(), rows.end(), Token(s, b * kBlock));
      }
    }
    q_latent_ = Normals(static_cast<size_t>(n) * kHeads * kRank);
    q_rope_ = Normals(static_cast<size_t>(n) * kHeads * kRope);

    const int sms = device_.multiProcessorCount;
    const DeviceArray<char> workspace(MlaDecodeSm90::WorkspaceBytes(2, sms));
    const DeviceArray<Bf16> cache(cache_), q_latent(q_latent_), q_rope(q_rope_);
    const DeviceArray<int> tables(tables_), lens(lens_);
    const DeviceArray<Bf16> out(std::vector<Bf16>(q_latent_.size(), __float2bfloat16(NAN)));
    const MlaDecodeSm90 decode(workspace.data(), 2, sms);
    const auto maps = MlaDecodeSm90::MapCache(cache.data(), used + 3);
    decode.Schedule(lens.data(), n, nullptr);
    for (int layer = 0; layer < 2; ++layer) {  // the second as the first: the counters are its own
      decode.Run(maps,
                 {.index = layer,
                  .q_latent = q_latent.data(),
                  .q_rope = q_rope.data(),
                  .block_tables = tables.data(),
                  .max_blocks = max_blocks_,
                  .context_lens = lens.data(),
                  .scale = kScale,
                  .out = out.data()},
                 nullptr);
      CUDA_CHECK(cudaDeviceSynchronize());
      const std::vector<Bf16> result = out.ToHost();
      if (layer > 0) {
        for (size_t i = 0; i < result.size(); ++i) {
          ASSERT_EQ(__bfloat162float(result[i]), __bfloat162float(out_[i])) << "not reproducible";
        }
      }
      out_ = result;
    }
  }

  Bf16* Token(int sequence, int position) {
    const int block = tables_[sequence * max_blocks_ + position / kBlock];
    return &cache_[(static_cast<size_t>(block) * kBlock + position % kBlock) * kWidth];
  }

  // ‖out − reference‖ / ‖reference‖ of one head of one sequence.
  double Error(int sequence, int head) {
    const int len = lens_[sequence];
    const Bf16* latent = &q_latent_[(static_cast<size_t>(sequence) * kHeads + head) * kRank];
    const Bf16* rope = &q_rope_[(static_cast<size_t>(sequence) * kHeads + head) * kRope];
    std::vector<double> weights(len);
    for (int t = 0; t < len; ++t) {
      const Bf16* kv = Token(sequence, t);
      double score = 0;
      for (int i = 0; i < kRank; ++i) {
        score += double{__bfloat162float(latent[i])} * __bfloat162float(kv[i]);
      }
      for (int i = 0; i < kRope; ++i) {
        score += double{__bfloat162float(rope[i])} * __bfloat162float(kv[kRank + i]);
      }
      weights[t] = score * kScale;
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    double difference = 0, norm = 0;
    for (int i = 0; i < kRank; ++i) {
      double expected = 0;
      for (int t = 0; t < len; ++t) {
        expected += weights[t] / sum * __bfloat162float(Token(sequence, t)[i]);
      }
      const double got =
          __bfloat162float(out_[(static_cast<size_t>(sequence) * kHeads + head) * kRank + i]);
      difference += (got - expected) * (got - expected);
      norm += expected * expected;
    }
    return std::sqrt(difference / norm);
  }

  // The output is rounded to BF16 once (relative 2⁻⁹ at most, 2⁻⁹/√3 = 1.1e-3 in the mean) and so
  // is each probability (the same size, averaging out): √2 · 1.1e-3 = 1.6e-3; twice that is the
  // bound.
  static constexpr double kTolerance = 3.2e-3;
  static constexpr float kScale = 0.1352337788608801f / 8;  // random scores spread like real ones

  void ExpectAllClose(int most_sequences) {
    std::vector<int> which(lens_.size());
    std::iota(which.begin(), which.end(), 0);
    std::shuffle(which.begin(), which.end(), random_);
    which.resize(std::min<size_t>(which.size(), most_sequences));
    for (int s : which) {
      for (int head : {0, 5, 10, 15}) {
        EXPECT_LT(Error(s, head), kTolerance)
            << "sequence " << s << " of " << lens_[s] << " tokens";
      }
    }
  }

  cudaDeviceProp device_ = {};
  unsigned seed_ = 0;
  std::mt19937 random_;
  std::vector<int> lens_, tables_;
  int max_blocks_ = 0;
  std::vector<Bf16> cache_, q_latent_, q_rope_, out_;
};

TEST_F(MlaDecodeSm90Test, OneTokenIsItsOwnLatent) {
  Decode({1});
  ExpectAllClose(1);
}

TEST_F(MlaDecodeSm90Test, EveryLengthAroundTheTileSizes) {
  std::vector<int> lens;
  for (int len = 1; len <= 200; ++len) lens.push_back(len);
  Decode(lens);
  ExpectAllClose(200);
}

TEST_F(MlaDecodeSm90Test, OneLongSequenceIsSharedByAllMultiprocessors) {
  Decode({20'011});
  ExpectAllClose(1);
}

TEST_F(MlaDecodeSm90Test, MixedLengthsEndInTheMiddleOfShares) {
  std::vector<int> lens;
  for (int i = 0; i < 97; ++i) lens.push_back(1 + static_cast<int>(random_() % 3000));
  lens.push_back(30'000);
  Decode(lens);
  ExpectAllClose(12);
}

TEST_F(MlaDecodeSm90Test, FewSequencesShareFewerUnitsThanMultiprocessors) {
  Decode({130, 64, 65, 700});
  ExpectAllClose(4);
}

TEST_F(MlaDecodeSm90Test, ThousandShortSequences) {
  std::vector<int> lens;
  for (int i = 0; i < 1024; ++i) lens.push_back(1 + static_cast<int>(random_() % 90));
  Decode(lens);
  ExpectAllClose(60);
}

}  // namespace
}  // namespace fathom
