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
      ops_.RmsNorm(x, weight, static_cast<float>(kEps), out);
      for (int64_t t = 0; t < 4; ++t) {
        double squares = 0.0;
        for (int64_t i = 0; i < size; ++i) squares += At(x, t, i) * At(x, t, i);
        const double factor = 1.0 / std::sqrt(squares / static_cast<double>(size) + kEps);
        for (int64_t i = 0; i < size; ++i) {
          const double value = At(x, t, i) * factor * At(weight, i);
          // The sum of squares is halved in relative error by the root; seven roundings around it.
          const double relative = (static_cast<double>(size) / 2 + 7) * kFloatRoundoff;
          EXPECT_WITHIN(At(out, t, i), (Bounded{value, std::abs(value) * relative}.Rounded(act)));
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
  ops_.RmsNorm(x, weight, 1e-6f, out);
  const TestTensor threaded(DType::kBF16, {70, 93});
  three_threads_->ops().RmsNorm(x, weight, 1e-6f, threaded);
  EXPECT_EQ(BytesOf(threaded), BytesOf(out));
  const TestTensor alone(DType::kBF16, {1, 93});
  ops_.RmsNorm(x.Slice(0, 41, 42), weight, 1e-6f, alone);
  EXPECT_EQ(BytesOf(alone), BytesOf(out->Slice(0, 41, 42)));
  ops_.RmsNorm(x, weight, 1e-6f, x);
  EXPECT_EQ(BytesOf(x), BytesOf(out));
}

TEST_P(ElementwiseTest, RotatesNeighbouringPairsByThePositionsAngle) {
  const TestTensor cos_sin = random_.Floats(DType::kF32, {30, 4, 2});
  const TestTensor positions = IntTensor({0, 29, 3});
  for (DType act : {DType::kF32, DType::kBF16}) {
    const TestTensor wide = random_.Floats(act, {3, 2, 11});
    const TestTensor before(act, {3, 2, 11});
    device_->CopyFromHost(wide->raw(), before);
    ops_.RotaryEmbed(wide->Slice(2, 3, 11), positions, cos_sin);
    for (int64_t t = 0; t < 3; ++t) {
      const auto position = static_cast<int64_t>(At(positions, t));
      for (int64_t a = 0; a < 2; ++a) {
        EXPECT_EQ(At(wide, t, a, 2), At(before, t, a, 2));
        for (int64_t i = 0; i < 4; ++i) {
          const double even = At(before, t, a, 3 + 2 * i);
          const double odd = At(before, t, a, 4 + 2 * i);
          const double cosine = At(cos_sin, position, i, 0);
          const double sine = At(cos_sin, position, i, 1);
          const double error = 2 * kFloatRoundoff * (std::abs(even) + std::abs(odd)) *
                               (std::abs(cosine) + std::abs(sine));
          EXPECT_WITHIN(At(wide, t, a, 3 + 2 * i),
                        (Bounded{even * cosine - odd * sine, error}.Rounded(act)));
          EXPECT_WITHIN(At(wide, t, a, 4 + 2 * i),
                        (Bounded{even * sine + odd * cosine, error}.Rounded(act)));
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, StoresLatentAndRopeSideBySideInTheirPlaces) {
  const TestTensor latent = random_.Floats(DType::kF32, {3, 6});
  const TestTensor rope = random_.Floats(DType::kF32, {3, 2});
  const TestTensor places = IntTensor({7, 0, 5});
  for (DType stored : {DType::kF32, DType::kBF16}) {
    const TestTensor cache(stored, {2, 4, 8});
    ops_.StoreKv(latent, rope, places, cache);
    for (int64_t t = 0; t < 3; ++t) {
      const auto place = static_cast<int64_t>(At(places, t));
      for (int64_t i = 0; i < 8; ++i) {
        const double value = i < 6 ? At(latent, t, i) : At(rope, t, i - 6);
        EXPECT_NEAR(At(cache, place / 4, place % 4, i), value,
                    stored == DType::kF32 ? 0.0 : std::abs(value) * RoundoffOf(stored));
      }
    }
    EXPECT_EQ(At(cache, 0, 1, 0), 0.0);
  }
}

TEST_P(ElementwiseTest, GatesWithSilu) {
  for (DType act : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(act)));
    const TestTensor gate_up = random_.Floats(act, {5, 2 * 37}, 4.0f);
    const TestTensor out(act, {5, 37});
    ops_.SwiGlu(gate_up, out);
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t i = 0; i < 37; ++i) {
        const double gate = At(gate_up, t, i);
        const double value = gate / (1.0 + std::exp(-gate)) * At(gate_up, t, 37 + i);
        // exp errs by two roundings, and sum, quotient and product by one each.
        EXPECT_WITHIN(At(out, t, i),
                      (Bounded{value, std::abs(value) * 6 * kFloatRoundoff}.Rounded(act)));
      }
      const TestTensor alone(act, {1, 37});
      three_threads_->ops().SwiGlu(gate_up->Slice(0, t, t + 1), alone);
      EXPECT_EQ(BytesOf(alone), BytesOf(out->Slice(0, t, t + 1)));
    }
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
  ops_.SwiGlu(gate_up, out);
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
  // GroupedLinear, Linear and the rest store as RmsNorm does: by a factor of 1 here, through the
  // vector code, and by Embed through the scalar code.
  const TestTensor embedded(DType::kBF16, {1, size});
  ops_.Embed(IntTensor({0}), table, 0, embedded);
  const TestTensor one(DType::kF32, {1, 1});
  one->data<float>()[0] = 1.0f;
  for (int64_t i = 0; i < size; ++i) {
    EXPECT_EQ(embedded->data<BFloat16>()[i].bits, expected[i]) << i;
    const TestTensor y(DType::kBF16, {1, 1});
    ops_.Linear(one, {.values = table->Reshape({size, 1}).Slice(0, i, i + 1)}, y);
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

TEST_P(ElementwiseTest, DoesNothingForAStepOfNoTokens) {
  const TestTensor none(DType::kF32, {0, 8});
  const TestTensor weight = random_.Floats(DType::kF32, {8, 8});
  ops_.RmsNorm(none, weight->Reshape({64}).Slice(0, 0, 8), 1e-6f, none);
  ops_.Linear(none, {.values = weight}, none);
  ops_.Add(none, none);
  ops_.Embed(TestTensor(DType::kI32, {0}), weight, 0, none);
}

INSTANTIATE_ON_EVERY_TARGET(ElementwiseTest);

}  // namespace
}  // namespace fathom
