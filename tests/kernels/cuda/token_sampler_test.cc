// The GPU's draw against a plain one in double: sort, cut, add up in the order of ids.

#include "kernels/cuda/token_sampler.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/cuda_check.h"

namespace fathom {
namespace {

// Moves the borders between tokens; see TokenIsPlausible.
struct Nudge {
  double uniform = 0.0, top_p = 0.0;
};

int ReferenceToken(const std::vector<float>& logits, const SamplingRow& how, const Nudge& nudge) {
  const int vocab_size = static_cast<int>(logits.size());
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  for (const float logit : logits) {
    if (!(logit < std::numeric_limits<float>::infinity())) return -1;
    if (std::isinf(logit) && !how.may_ban) return -1;
  }
  const float best = logits[order[0]];
  if (std::isinf(best)) return -1;
  if (how.inverse_temperature == 0.0 || how.top_k == 1) return order[0];

  if (how.top_k > 0) order.resize(std::min(how.top_k, vocab_size));
  const auto weight = [&](int id) {
    return std::exp((static_cast<double>(logits[id]) - best) * how.inverse_temperature);
  };
  std::erase_if(order, [&](int id) {
    return weight(id) < std::max<double>(how.min_p, std::numeric_limits<double>::min());
  });
  const auto total_of = [&] {
    double total = 0.0;
    for (const int id : order) total += weight(id);
    return total;
  };
  if (how.top_p < 1.0f) {
    const double enough = (how.top_p + nudge.top_p) * total_of();
    double sum = 0.0;
    size_t kept = 0;
    while (kept < order.size() && (kept == 0 || sum < enough)) sum += weight(order[kept++]);
    order.resize(kept);
  }
  std::sort(order.begin(), order.end());
  const double target = std::clamp(how.uniform + nudge.uniform, 0.0, 1.0) * total_of();
  double cumulative = 0.0;
  for (const int id : order) {
    cumulative += weight(id);
    if (target < cumulative) return id;
  }
  return order.back();
}

// Weights are right to 2^-22 ≈ 2.4e-7, and cut to 2^-44 of the best one: 129280 · 2^-44 < 1e-8.
bool TokenIsPlausible(int token, const std::vector<float>& logits, const SamplingRow& how) {
  for (const double u : {0.0, -1e-6, 1e-6}) {
    for (const double p : {0.0, -1e-6, 1e-6}) {
      if (token == ReferenceToken(logits, how, {.uniform = u, .top_p = p})) return true;
    }
  }
  return false;
}

class TokenSamplerTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    const unsigned seed = std::random_device()();
    std::printf("seed %u\n", seed);
    random_.seed(seed);
  }

  std::vector<int> Sample(const std::vector<std::vector<float>>& logits,
                          const std::vector<SamplingRow>& rows) {
    const size_t vocab_size = logits[0].size(), stride = vocab_size + 3;
    std::vector<SamplingRow> numbered = rows;
    for (size_t r = 0; r < rows.size(); ++r) numbered[r].logit_row = static_cast<int32_t>(r);
    std::vector<float> packed(logits.size() * stride, std::numeric_limits<float>::quiet_NaN());
    for (size_t r = 0; r < logits.size(); ++r) {
      std::copy(logits[r].begin(), logits[r].end(), packed.begin() + r * stride);
    }
    float* device_logits = nullptr;
    SamplingRow* device_rows = nullptr;
    int* device_tokens = nullptr;
    std::vector<int> tokens(rows.size(), -7);
    CUDA_CHECK(cudaMalloc(&device_logits, packed.size() * sizeof(float)));
    CUDA_CHECK(cudaMalloc(&device_rows, rows.size() * sizeof(SamplingRow)));
    CUDA_CHECK(cudaMalloc(&device_tokens, tokens.size() * sizeof(int)));
    CUDA_CHECK(cudaMemcpy(device_logits, packed.data(), packed.size() * sizeof(float),
                          cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(device_rows, numbered.data(), rows.size() * sizeof(SamplingRow),
                          cudaMemcpyHostToDevice));
    SampleTokens(device_logits, static_cast<int64_t>(stride), static_cast<int>(vocab_size),
                 device_rows, static_cast<int>(rows.size()), device_tokens, nullptr);
    CUDA_CHECK(cudaMemcpy(tokens.data(), device_tokens, tokens.size() * sizeof(int),
                          cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(device_logits));
    CUDA_CHECK(cudaFree(device_rows));
    CUDA_CHECK(cudaFree(device_tokens));
    return tokens;
  }

  // `step` > 0 rounds to multiples of it, so that tokens tie.
  std::vector<float> RandomLogits(int vocab_size, float step) {
    std::normal_distribution<float> normal(0.0f, 3.0f);
    std::vector<float> logits(vocab_size);
    for (float& logit : logits) {
      logit = normal(random_);
      if (step > 0.0f) logit = std::round(logit / step) * step;
    }
    return logits;
  }

  SamplingRow RandomRow() {
    std::uniform_real_distribution<double> uniform;
    SamplingRow row;
    row.inverse_temperature = 1.0 / (0.1 + 2.0 * uniform(random_));
    row.uniform = std::floor(uniform(random_) * 0x1p53) * 0x1p-53;
    if (random_() % 2) row.top_p = static_cast<float>(0.01 + 0.98 * uniform(random_));
    if (random_() % 3 == 0) row.min_p = static_cast<float>(0.3 * uniform(random_));
    if (random_() % 2) row.top_k = 1 << random_() % 12;
    return row;
  }

  std::mt19937 random_;
};

TEST_F(TokenSamplerTest, DrawsWhatAPlainSamplerDraws) {
  for (const int vocab_size : {1, 31, 1000, 4099, 129280}) {
    std::vector<std::vector<float>> logits;
    std::vector<SamplingRow> rows;
    for (int r = 0; r < (vocab_size > 10000 ? 24 : 150); ++r) {
      logits.push_back(RandomLogits(vocab_size, r % 3 == 0 ? 0.5f : 0.0f));
      rows.push_back(RandomRow());
    }
    const std::vector<int> tokens = Sample(logits, rows);
    for (size_t r = 0; r < rows.size(); ++r) {
      EXPECT_TRUE(TokenIsPlausible(tokens[r], logits[r], rows[r]))
          << "row " << r << " of " << vocab_size << ": token " << tokens[r] << ", expected "
          << ReferenceToken(logits[r], rows[r], {}) << "; top_k " << rows[r].top_k << ", top_p "
          << rows[r].top_p << ", min_p " << rows[r].min_p << ", u " << rows[r].uniform;
    }
  }
}

TEST_F(TokenSamplerTest, GreedyTakesTheLowestOfTheBest) {
  std::vector<float> logits = RandomLogits(129280, 0.0f);
  logits[70001] = logits[4] = logits[129279] = 50.0f;
  SamplingRow top_one = RandomRow();
  top_one.top_k = 1;
  EXPECT_EQ(Sample({logits, logits}, {SamplingRow{}, top_one}), (std::vector<int>{4, 4}));
}

TEST_F(TokenSamplerTest, ZerosOfEitherSignTie) {
  const std::vector<float> logits = {-0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f};
  SamplingRow first, second;
  first.inverse_temperature = second.inverse_temperature = 1.0;
  first.top_k = second.top_k = 2;
  first.uniform = 0.25;
  second.uniform = 0.75;
  EXPECT_EQ(Sample({logits, logits}, {first, second}), (std::vector<int>{0, 1}));
  first.top_k = second.top_k = 0;
  first.top_p = second.top_p = 0.3f;
  EXPECT_EQ(Sample({logits, logits}, {first, second}), (std::vector<int>{0, 1}));
}

TEST_F(TokenSamplerTest, ARowThatIsNotFiniteIsAFaultOfItsOwn) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> good = RandomLogits(5000, 0.0f);
  std::vector<std::vector<float>> logits(6, good);
  logits[1][4999] = std::numeric_limits<float>::quiet_NaN();
  logits[2][17] = infinity;
  logits[3][17] = -infinity;
  logits[4][0] = -infinity;                  // banned
  logits[5].assign(good.size(), -infinity);  // all of them
  std::vector<SamplingRow> rows(6);
  rows[4].may_ban = rows[5].may_ban = 1;
  const std::vector<int> tokens = Sample(logits, rows);
  EXPECT_EQ(tokens[0], ReferenceToken(good, {}, {}));
  EXPECT_EQ(tokens[1], -1);
  EXPECT_EQ(tokens[2], -1);
  EXPECT_EQ(tokens[3], -1);
  EXPECT_EQ(tokens[4], ReferenceToken(logits[4], rows[4], {}));
  EXPECT_EQ(tokens[5], -1);
}

TEST_F(TokenSamplerTest, EveryTokenComesAsOftenAsItIsLikely) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f};
  constexpr int kDraws = 20000;
  std::vector<SamplingRow> rows(kDraws);
  std::uniform_real_distribution<double> uniform;
  for (SamplingRow& row : rows) {
    row.inverse_temperature = 1.0;
    row.uniform = std::floor(uniform(random_) * 0x1p53) * 0x1p-53;
  }
  const std::vector<int> tokens = Sample(std::vector<std::vector<float>>(kDraws, logits), rows);
  double total = 0.0;
  for (const float logit : logits) total += std::exp(logit);
  for (size_t id = 0; id < logits.size(); ++id) {
    const double share = std::exp(logits[id]) / total;
    const double expected = share * kDraws;
    // Six standard deviations of a binomial.
    EXPECT_NEAR(std::count(tokens.begin(), tokens.end(), static_cast<int>(id)), expected,
                6.0 * std::sqrt(expected * (1.0 - share)));
  }
}

}  // namespace
}  // namespace fathom
