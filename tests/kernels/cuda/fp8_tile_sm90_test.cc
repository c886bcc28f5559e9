// Fp8TileSm90 against sums in double precision. Needs a Hopper GPU; skips without one.

#include "kernels/cuda/fp8_tile_sm90.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "tests/kernels/cuda/sm90_fixture.h"

namespace fathom {
namespace {

using Bf16 = __nv_bfloat16;
using Fp8 = __nv_fp8_e4m3;

// Values of both signs between 2⁻⁶ and 2, and zeros: all that is exact in E4M3 near 1.
float RandomFp8(uint32_t bits, Fp8* value) {
  const int exponent = 1 + static_cast<int>(bits % 7);
  value->__x = static_cast<__nv_fp8_storage_t>((bits >> 8 & 0x87) | exponent << 3);
  if ((bits >> 16) % 13 == 0) value->__x = 0;
  return static_cast<float>(*value);
}

class Fp8TileSm90Test : public Sm90Test<Fp8TileSm90> {
 protected:
  void MakeFp8(size_t size, std::vector<Fp8>& values, std::vector<float>& as_floats) {
    values.resize(size);
    as_floats.resize(size);
    for (size_t i = 0; i < size; ++i) as_floats[i] = RandomFp8(random_(), &values[i]);
  }
  std::vector<float> MakeFactors(size_t size) {
    std::uniform_real_distribution<float> uniform(0.01f, 1.0f);
    std::vector<float> factors(size);
    for (float& factor : factors) factor = uniform(random_);
    return factors;
  }

  // Random x and weights.
  void Make(int rows, int experts, int outputs, int inputs) {
    experts_ = experts;
    outputs_ = outputs;
    inputs_ = inputs;
    rows_ = rows;
    const int blocks = (outputs + 127) / 128;
    MakeFp8(static_cast<size_t>(rows) * XStride(), x_, x_floats_);
    MakeFp8(static_cast<size_t>(experts) * outputs * inputs, weight_, weight_floats_);
    x_scales_ = MakeFactors(static_cast<size_t>(rows) * (inputs / 128));
    factors_ = MakeFactors(static_cast<size_t>(experts) * blocks * (inputs / 128));
  }
  int XStride() const { return inputs_ + 64; }
  int OutStride() const { return outputs_ + 24; }

  // Runs it twice on poisoned memory: what it must not write stays poison, the bits are the same.
  template <typename Launch>
  void Run(int out_rows, Launch run) {
    const DeviceArray<Fp8> x(x_), weight(weight_);
    const DeviceArray<float> x_scales(x_scales_), factors(factors_);
    const Fp8TileSm90 tile(device_.multiProcessorCount);
    std::vector<Bf16> poison(static_cast<size_t>(out_rows) * OutStride());
    std::memset(static_cast<void*>(poison.data()), kPoison, poison.size() * sizeof(Bf16));
    for (int repeat = 0; repeat < 2; ++repeat) {
      const DeviceArray<Bf16> out(poison);
      run(tile,
          Fp8TileSm90::Input{.values = x.data(),
                             .scales = x_scales.data(),
                             .rows = rows_,
                             .values_stride = XStride(),
                             .scales_stride = inputs_ / 128},
          Fp8TileSm90::Weight{.values = weight.data(),
                              .factors = factors.data(),
                              .experts = experts_,
                              .outputs = outputs_,
                              .inputs = inputs_},
          Fp8TileSm90::Output{.values = out.data(), .stride = OutStride()});
      CUDA_CHECK(cudaDeviceSynchronize());
      const std::vector<Bf16> result = out.ToHost();
      if (repeat > 0) {
        EXPECT_EQ(std::memcmp(result.data(), out_.data(), result.size() * sizeof(Bf16)), 0)
            << "not reproducible";
      }
      out_ = result;
    }
  }

  bool IsPoison(size_t at) const {
    uint16_t bits;
    std::memcpy(&bits, &out_[at], sizeof(bits));
    return bits == (kPoison << 8 | kPoison);
  }

  // ‖out − reference‖ / ‖reference‖ of some outputs of row `out_row`, which is x_row · expert.
  double Error(int out_row, int x_row, int expert, int samples) {
    const int k_blocks = inputs_ / 128, blocks = (outputs_ + 127) / 128;
    const float* x = &x_floats_[static_cast<size_t>(x_row) * XStride()];
    double difference = 0, norm = 0;
    for (int s = 0; s < samples; ++s) {
      const int n = s < 4 ? (s & 1 ? outputs_ - 1 - s : s) : static_cast<int>(random_() % outputs_);
      const float* w = &weight_floats_[(static_cast<size_t>(expert) * outputs_ + n) * inputs_];
      double expected = 0;
      for (int k = 0; k < k_blocks; ++k) {
        double sum = 0;
        for (int i = k * 128; i < (k + 1) * 128; ++i) sum += double{x[i]} * w[i];
        expected += sum * x_scales_[static_cast<size_t>(x_row) * k_blocks + k] *
                    factors_[(static_cast<size_t>(expert) * blocks + n / 128) * k_blocks + k];
      }
      const double got = __bfloat162float(out_[static_cast<size_t>(out_row) * OutStride() + n]);
      difference += (got - expected) * (got - expected);
      norm += expected * expected;
    }
    return std::sqrt(difference / norm);
  }

  // The output is rounded to BF16 once: relative 2⁻⁹/√3 = 1.1e-3 in the mean. The tensor cores cut
  // every product off at 2⁻¹³ of the largest of its 32: 128 products of a block lose half of that
  // each, all in one direction, 128 · 2⁻¹⁴ = 0.8 % of the largest, which a sum of 128 exceeds about
  // threefold: 2.6e-3. Beyond their sum nothing is left.
  static constexpr double kTolerance = 4e-3;
  static constexpr uint16_t kPoison = 0xC7;

  void Dense(int tokens, int outputs, int inputs) {
    SCOPED_TRACE(testing::Message() << tokens << " × " << outputs << " × " << inputs);
    Make(tokens, 1, outputs, inputs);
    Run(tokens,
        [](const Fp8TileSm90& tile, const Fp8TileSm90::Input& x, const Fp8TileSm90::Weight& weight,
           const Fp8TileSm90::Output& out) { tile.Linear(x, weight, out, nullptr); });
    const int step = std::max(1, tokens / 97);
    for (int t = 0; t < tokens; t += step) {
      ASSERT_LT(Error(t, t, 0, 48), kTolerance) << "token " << t;
    }
    for (int t = 0; t < tokens; ++t) {
      for (int n = 0; n < OutStride(); ++n) {
        ASSERT_EQ(IsPoison(static_cast<size_t>(t) * OutStride() + n), n >= outputs)
            << "token " << t << " output " << n;
      }
    }
  }

  // Experts with these many rows; x gathered from `tokens` rows, or sorted already (tokens = 0).
  void Grouped(const std::vector<int>& counts, int chunk_rows, int tokens, int outputs,
               int inputs) {
    SCOPED_TRACE(testing::Message() << outputs << " × " << inputs << ", chunks of " << chunk_rows);
    const int experts = static_cast<int>(counts.size());
    std::vector<int> expert_of, notes(4);
    for (int e = 0; e < experts; ++e) {
      for (int first = 0; first < counts[e]; first += chunk_rows) {
        notes.insert(notes.end(), {e, static_cast<int>(expert_of.size()) + first,
                                   std::min(chunk_rows, counts[e] - first), 0});
        ++notes[0];
      }
      expert_of.insert(expert_of.end(), counts[e], e);
    }
    const int sorted = static_cast<int>(expert_of.size()), spare = 5;
    constexpr int kDivisor = 3;
    Make(tokens > 0 ? tokens : sorted + spare, experts, outputs, inputs);
    std::vector<int> rows(sorted);
    for (int i = 0; i < sorted; ++i) {
      rows[i] = tokens > 0 ? static_cast<int>(random_() % (tokens * kDivisor)) : i * kDivisor;
    }
    const DeviceArray<int> device_notes(notes), device_rows(rows);
    Run(sorted + spare, [&](const Fp8TileSm90& tile, const Fp8TileSm90::Input& x,
                            const Fp8TileSm90::Weight& weight, const Fp8TileSm90::Output& out) {
      tile.GroupedLinear(x,
                         {.notes = device_notes.data(),
                          .rows = device_rows.data(),
                          .divisor = tokens > 0 ? kDivisor : 0},
                         weight, out, nullptr);
    });
    const int step = std::max(1, sorted / 97);
    for (int i = 0; i < sorted; i += step) {
      ASSERT_LT(Error(i, rows[i] / kDivisor, expert_of[i], 48), kTolerance)
          << "row " << i << " of expert " << expert_of[i];
    }
    for (int i = 0; i < sorted + spare; ++i) {
      for (int n = 0; n < OutStride(); ++n) {
        ASSERT_EQ(IsPoison(static_cast<size_t>(i) * OutStride() + n), n >= outputs || i >= sorted)
            << "row " << i << " output " << n;
      }
    }
  }

  int rows_ = 0, experts_ = 0, outputs_ = 0, inputs_ = 0;
  std::vector<Fp8> x_, weight_;
  std::vector<float> x_floats_, weight_floats_, x_scales_, factors_;
  std::vector<Bf16> out_;
};

TEST_F(Fp8TileSm90Test, FewTokensShareInputsAmongBlocks) {
  for (int tokens : {1, 31, 33, 64, 100}) Dense(tokens, 2112, 7168);
  for (int tokens : {32, 50, 128, 256}) Dense(tokens, 3072, 1536);
  for (int tokens : {17, 64, 129}) Dense(tokens, 7168, 2048);
}

TEST_F(Fp8TileSm90Test, ManyTokensFillEveryMultiprocessor) {
  Dense(2048, 2112, 7168);
  Dense(1100, 3072, 1536);
  Dense(385, 7168, 2304);
  Dense(2500, 704, 256);
  Dense(5000, 704, 256);
  Dense(2048, 7168, 256);
  Dense(20'000, 192, 384);
}

TEST_F(Fp8TileSm90Test, SmallestLayers) {
  for (int tokens : {1, 64, 65, 300}) {
    Dense(tokens, 64, 128);
    Dense(tokens, 192, 384);
  }
  Dense(20'000, 64, 128);
}

TEST_F(Fp8TileSm90Test, GatheredRowsOfExperts) {
  for (int chunk_rows : {32, 64, 128}) {
    Grouped({0, 1, 33, 200, 64, 0, 128, 97, 31, 0}, chunk_rows, 111, 512, 1024);
    Grouped({70, 0, 5}, chunk_rows, 40, 384, 128);
  }
  Grouped({17, 64, 90, 120, 300}, 128, 300, 512, 7168);
}

// More tiles than blocks, large and small ones, and more chunks than are sorted.
TEST_F(Fp8TileSm90Test, UnevenGatheredRows) {
  std::vector<int> counts(150);
  for (int& count : counts) count = static_cast<int>(random_() % 30);
  counts[20] = 700;
  counts[90] = 1000;
  counts[149] = 600;
  Grouped(counts, 128, 600, 512, 256);
  Grouped({25'000, 3}, 32, 500, 256, 128);
}

TEST_F(Fp8TileSm90Test, SortedRowsOfExperts) {
  for (int chunk_rows : {32, 64, 128}) {
    Grouped({0, 1, 33, 200, 64, 0, 128, 97, 31, 0}, chunk_rows, 0, 1024, 256);
    Grouped({70, 0, 5}, chunk_rows, 0, 384, 384);
  }
  Grouped({17, 64, 90, 120, 300}, 128, 0, 7168, 256);
}

TEST_F(Fp8TileSm90Test, OneExpertHasEverything) {
  std::vector<int> counts(40);
  counts[17] = 2048;
  Grouped(counts, 128, 500, 512, 512);
  Grouped(counts, 128, 0, 1024, 256);
}

TEST_F(Fp8TileSm90Test, NobodyHasAnything) { Grouped({0, 0, 0}, 64, 100, 256, 256); }

}  // namespace
}  // namespace fathom
