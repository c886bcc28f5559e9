// Operations that treat each row, or each element, by itself.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_tensor.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 20240104;

class ElementwiseTest : public EveryTargetTest {
 protected:
  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(1);
  std::unique_ptr<Device> three_threads_ = OpenTestDevice(3);
  Ops& ops_ = device_->ops();
};

TEST_P(ElementwiseTest, EmbedsTheTokensOfThisRankAndZeroesTheOthers) {
  const TestTensor table = random_.Floats(DType::kBF16, {5, 19});
  const TestTensor ids = IntTensor({100, 104, 99, 105, 0, 102});
  for (DType act : {DType::kF32, DType::kBF16}) {
    const TestTensor out = random_.Floats(act, {6, 19});
    ops_.Embed(ids, table, 100, out);
    for (int64_t t = 0; t < 6; ++t) {
      const auto row = static_cast<int64_t>(At(ids, t)) - 100;
      for (int64_t i = 0; i < 19; ++i) {
        EXPECT_EQ(At(out, t, i), row >= 0 && row < 5 ? At(table, row, i) : 0.0);
      }
    }
  }
}

TEST_P(ElementwiseTest, NormalizesRowsByTheirRootMeanSquare) {
  constexpr double kEps = 1e-6;
  for (DType act : {DType::kF32, DType::kBF16}) {
    for (int64_t size : {1, 5, 64, 131, 1536}) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act), " size ", size));
      const TestTensor x = random_.Floats(act, {4, size}, 3.0f);
      const TestTensor weight = random_.Floats(DType::kBF16, {size});
      const TestTensor out(act, {4, size});
      ops_.AddRmsNorm(x, {}, weight, static_cast<float>(kEps), out, {});
      for (int64_t t = 0; t < 4; ++t) {
        const double factor = ReferenceNormFactor(x, t, kEps);
        for (int64_t i = 0; i < size; ++i) {
          EXPECT_WITHIN(At(out, t, i), ReferenceNorm(x, t, i, factor, At(weight, i)).Rounded(act));
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, NormalizesInPlaceAndStridedWithTheSameBits) {
  const TestTensor wide = random_.Floats(DType::kBF16, {70, 120});
  const Tensor x = wide->Slice(1, 7, 100);
  const TestTensor weight = random_.Floats(DType::kF32, {93});
  const TestTensor out(DType::kBF16, {70, 93});
  ops_.AddRmsNorm(x, {}, weight, 1e-6f, out, {});
  const TestTensor threaded(DType::kBF16, {70, 93});
  three_threads_->ops().AddRmsNorm(x, {}, weight, 1e-6f, threaded, {});
  EXPECT_EQ(BytesOf(threaded), BytesOf(out));
  const TestTensor alone(DType::kBF16, {1, 93});
  ops_.AddRmsNorm(x.Slice(0, 41, 42), {}, weight, 1e-6f, alone, {});
  EXPECT_EQ(BytesOf(alone), BytesOf(out->Slice(0, 41, 42)));
  ops_.AddRmsNorm(x, {}, weight, 1e-6f, x, {});
  EXPECT_EQ(BytesOf(x), BytesOf(out));
}

TEST_P(ElementwiseTest, AddsThenNormalizesWhatWasRounded) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    const TestTensor x = random_.Floats(act, {70, 300});
    const TestTensor y = random_.Floats(act, {70, 300});
    const TestTensor weight = random_.Floats(DType::kF32, {300});
    const TestTensor sum(act, {70, 300});
    device_->CopyFromHost(x->raw(), sum);
    ops_.Add(sum, y);
    const TestTensor expected(act, {70, 300});
    ops_.AddRmsNorm(sum, {}, weight, 1e-6f, expected, {});

    const TestTensor normed(act, {70, 300});
    const QuantizedTensor quantized(70, 300);
    three_threads_->ops().AddRmsNorm(x, y, weight, 1e-6f, normed, quantized);
    EXPECT_EQ(BytesOf(x), BytesOf(sum));
    EXPECT_EQ(BytesOf(normed), BytesOf(expected));
    ExpectQuantized(quantized, expected);
    const QuantizedTensor alone(1, 300);
    ops_.AddRmsNorm(sum->Slice(0, 41, 42), {}, weight, 1e-6f, {}, alone);
    ExpectQuantized(alone, expected->Slice(0, 41, 42));
  }
}

TEST_P(ElementwiseTest, GatesWithSilu) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act)));
    const TestTensor gate_up = random_.Floats(act, {5, 2 * 37}, 4.0f);
    const TestTensor out(act, {5, 37});
    ops_.SwiGlu(gate_up, nullptr, *out);
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t i = 0; i < 37; ++i) {
        const double gate = At(gate_up, t, i);
        const double value = gate / (1.0 + std::exp(-gate)) * At(gate_up, t, 37 + i);
        // exp errs by two roundings, and sum, quotient and product by one each.
        EXPECT_WITHIN(At(out, t, i),
                      (Bounded{value, std::abs(value) * 6 * kFloatRoundoff}.Rounded(act)));
      }
      const TestTensor alone(act, {1, 37});
      three_threads_->ops().SwiGlu(gate_up->Slice(0, t, t + 1), nullptr, *alone);
      EXPECT_EQ(BytesOf(alone), BytesOf(out->Slice(0, t, t + 1)));
    }
  }
}

TEST_P(ElementwiseTest, GatesOnlyTheRowsOfThisRanksExperts) {
  const TestTensor experts = IntTensor({9, 1, 0, 9});
  const OwnedGroups owned(experts, 0, 2);
  const ExpertGroups groups = owned;
  const TestTensor gate_up = random_.Floats(DType::kF32, {4, 2 * 200});
  const TestTensor all(DType::kF32, {4, 200});
  ops_.SwiGlu(gate_up, nullptr, *all);
  const TestTensor out(DType::kF32, {4, 200});
  ops_.SwiGlu(gate_up, &groups, *out);
  EXPECT_EQ(BytesOf(out->Slice(0, 0, 2)), BytesOf(all->Slice(0, 0, 2)));
  EXPECT_EQ(BytesOf(out->Slice(0, 2, 4)), std::string(2 * 200 * 4, '\0'));
  const QuantizedTensor quantized(4, 200);
  three_threads_->ops().SwiGlu(gate_up, &groups, quantized);
  ExpectQuantized({quantized.values->Slice(0, 0, 2), quantized.scales->Slice(0, 0, 2)},
                  all->Slice(0, 0, 2));
  EXPECT_EQ(BytesOf(quantized.values->Slice(0, 2, 4)), std::string(2 * 200, '\0'));
}

TEST_P(ElementwiseTest, QuantizesWhatItGated) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    const TestTensor gate_up = random_.Floats(act, {60, 2 * 300}, 4.0f);
    const TestTensor out(act, {60, 300});
    ops_.SwiGlu(gate_up, nullptr, *out);
    const QuantizedTensor quantized(60, 300);
    three_threads_->ops().SwiGlu(gate_up, nullptr, quantized);
    ExpectQuantized(quantized, out);
  }
}

TEST_P(ElementwiseTest, GatesToItsLimitsWhereExpEnds) {
  const float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gates = {0.0f,     -0.0f,  90.0f,
                                    -90.0f,   1e9f,   -1e9f,
                                    3e38f,    -3e38f, std::numeric_limits<float>::quiet_NaN(),
                                    kInfinity};
  const auto size = static_cast<int64_t>(gates.size());
  const TestTensor gate_up(DType::kF32, {1, 2 * size});
  for (int64_t i = 0; i < size; ++i) {
    gate_up->data<float>()[i] = gates[static_cast<size_t>(i)];
    gate_up->data<float>()[size + i] = 1.0f;
  }
  const TestTensor out(DType::kF32, {1, size});
  ops_.SwiGlu(gate_up, nullptr, *out);
  const double kExpected[] = {0.0, 0.0, 90.0, 0.0, 1e9f, 0.0, 3e38f, 0.0};
  for (int64_t i = 0; i < 8; ++i) {
    EXPECT_NEAR(At(out, 0, i), kExpected[i], 1e-30 + kExpected[i] * kFloatRoundoff) << gates[i];
  }
  EXPECT_TRUE(std::isnan(At(out, 0, 8)));
  EXPECT_EQ(At(out, 0, 9), kInfinity);
}

TEST_P(ElementwiseTest, AddsInPlace) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    const TestTensor x = random_.Floats(act, {3, 45});
    const TestTensor y = random_.Floats(act, {3, 45});
    const TestTensor before(act, {3, 45});
    device_->CopyFromHost(x->raw(), before);
    ops_.Add(x, y);
    for (int64_t i = 0; i < x->num_elements(); ++i) {
      const double sum = ElementAt(before, i) + ElementAt(y, i);
      EXPECT_WITHIN(ElementAt(x, i), (Bounded{sum, std::abs(sum) * kFloatRoundoff}.Rounded(act)));
    }
  }
}

TEST_P(ElementwiseTest, RoundsToBfloat16ToTheNearestEven) {
  // Halfway cases, a carry into the exponent, overflow to infinity, subnormal, NaN.
  const std::vector<uint32_t> inputs = {0x3f808000, 0x3f818000, 0x3f808001, 0x3fffffff, 0x7f7fffff,
                                        0x00018000, 0x80000001, 0x7f800001, 0x7f800000};
  const std::vector<uint16_t> expected = {0x3f80, 0x3f82, 0x3f81, 0x4000, 0x7f80,
                                          0x0002, 0x8000, 0x7fc0, 0x7f80};
  const auto size = static_cast<int64_t>(inputs.size());
  const TestTensor table(DType::kF32, {1, size});
  std::memcpy(table->raw(), inputs.data(), inputs.size() * 4);
  // GroupedLinear, Linear and the rest store as AddRmsNorm does: by a factor of 1 here, through the
  // vector code, and by Embed through the scalar code.
  const TestTensor embedded(DType::kBF16, {1, size});
  ops_.Embed(IntTensor({0}), table, 0, embedded);
  const TestTensor one(DType::kF32, {1, 1});
  one->data<float>()[0] = 1.0f;
  for (int64_t i = 0; i < size; ++i) {
    EXPECT_EQ(embedded->data<BFloat16>()[i].bits, expected[i]) << i;
    const TestTensor y(DType::kBF16, {1, 1});
    ops_.Linear(*one, {.values = table->Reshape({size, 1}).Slice(0, i, i + 1)}, y);
    EXPECT_EQ(y->data<BFloat16>()[0].bits, expected[i]) << i;
  }
}

TEST_P(ElementwiseTest, GathersRowsOfAnyType) {
  const TestTensor x = random_.Floats(DType::kBF16, {6, 9});
  const TestTensor rows = IntTensor({5, 0, 5, 2});
  const TestTensor out(DType::kBF16, {4, 9});
  ops_.GatherRows(x, rows, out);
  for (int64_t r = 0; r < 4; ++r) {
    const auto row = static_cast<int64_t>(At(rows, r));
    EXPECT_EQ(BytesOf(out->Slice(0, r, r + 1)), BytesOf(x->Slice(0, row, row + 1)));
  }
}

TEST_P(ElementwiseTest, FillsWithUniformNumbersOfAStream) {
  constexpr int64_t kSize = 100'000;
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const TestTensor out(dtype, {kSize});
    three_threads_->ops().FillRandom(out, 0.5f, 7);
    double sum = 0.0;
    double squares = 0.0;
    for (int64_t i = 0; i < kSize; ++i) {
      ASSERT_LE(std::abs(At(out, i)), 0.5);
      sum += At(out, i);
      squares += At(out, i) * At(out, i);
    }
    // Mean 0 and variance 1/12, six deviations of the estimates away at most.
    EXPECT_NEAR(sum / kSize, 0.0, 6 * std::sqrt(1.0 / 12 / kSize));
    EXPECT_NEAR(squares / kSize, 1.0 / 12, 6 * std::sqrt(1.0 / 180 / kSize));
    const TestTensor same(dtype, {kSize});
    ops_.FillRandom(same, 0.5f, 7);
    EXPECT_EQ(BytesOf(same), BytesOf(out));
    ops_.FillRandom(same, 0.5f, 8);
    EXPECT_NE(BytesOf(same), BytesOf(out));
  }
}

TEST_P(ElementwiseTest, FillsWithEveryCodeOfE4M3BelowOne) {
  constexpr int64_t kSize = 100'000;
  const TestTensor out(DType::kF8E4M3, {10, kSize / 10});
  ops_.FillRandom(out, 123.0f, 7);
  std::vector<int64_t> counts(256);
  for (int64_t i = 0; i < kSize; ++i) ++counts[out->data<uint8_t>()[i]];
  constexpr double kExpected = kSize / 112.0;
  for (int code = 0; code < 256; ++code) {
    EXPECT_NEAR(counts[code], (code & 0x7f) < 0x38 ? kExpected : 0.0, 6 * std::sqrt(kExpected));
  }
}

TEST_P(ElementwiseTest, DoesNothingForAStepOfNoTokens) {
  const TestTensor none(DType::kF32, {0, 8});
  const TestTensor weight = random_.Floats(DType::kF32, {8, 8});
  ops_.AddRmsNorm(none, {}, weight->Reshape({64}).Slice(0, 0, 8), 1e-6f, none, {});
  ops_.Linear(*none, {.values = weight}, none);
  ops_.Add(none, none);
  ops_.Embed(TestTensor(DType::kI32, {0}), weight, 0, none);
}

INSTANTIATE_ON_EVERY_TARGET(ElementwiseTest);

}  // namespace
}  // namespace fathom
