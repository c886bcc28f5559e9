#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/golden_file.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/test_tensor.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 20250218;

TEST(Fp8CodecTest, ReadsEveryCodeAsTheFormatSays) {
  const std::vector<float> table = GoldenFile("fp8.safetensors").Values<float>("e4m3_table");
  ASSERT_EQ(table.size(), 256u);
  for (int code = 0; code < 256; ++code) {
    const float value = ToFloat(Float8E4M3{static_cast<uint8_t>(code)});
    if (std::isnan(table[code])) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      EXPECT_EQ(BitsOf(value), BitsOf(table[code])) << code;
    }
  }
}

TEST(Fp8CodecTest, WritesTheNearestCodeTiesToEvenAndSaturates) {
  const GoldenFile golden("fp8.safetensors");
  const auto values = golden.Values<float>("encode_in");
  const auto codes = golden.Values<uint8_t>("encode_code");
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(ToFloat8E4M3(values[i]).bits, codes[i]) << values[i];
  }
  const float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(ToFloat8E4M3(kInfinity).bits, 0x7e);
  EXPECT_EQ(ToFloat8E4M3(-kInfinity).bits, 0xfe);
  EXPECT_EQ(ToFloat8E4M3(std::numeric_limits<float>::quiet_NaN()).bits & 0x7f, 0x7f);
  EXPECT_EQ(ToFloat8E4M3(0x1p-10f).bits, 0);  // halfway between 0 and the smallest
  EXPECT_EQ(ToFloat8E4M3(-0x1.8p-9f).bits, 0x82);
}

class Fp8Test : public EveryTargetTest {
 protected:
  struct Quantized {
    TestTensor values;
    TestTensor scale_inv;
  };
  Quantized Quantize(const Tensor& x) {
    Quantized quantized = {
        TestTensor(DType::kF8E4M3, {x.dim(0), x.dim(1)}),
        TestTensor(DType::kF32, {(x.dim(0) + 127) / 128, (x.dim(1) + 127) / 128})};
    ops_.QuantizeFp8(x, {.values = quantized.values, .scale_inv = quantized.scale_inv});
    return quantized;
  }

  // Rows in 1×128, through SwiGlu: silu(64) is 64 exactly, so 64 beside x / 64 gives x again.
  QuantizedTensor QuantizeRows(const Tensor& x) {
    const int64_t size = x.dim(1);
    const TestTensor gate_up(x.dtype(), {x.dim(0), 2 * size});
    for (int64_t t = 0; t < x.dim(0); ++t) {
      for (int64_t k = 0; k < size; ++k) {
        SetElement(gate_up, t * 2 * size + k, 64.0f);
        SetElement(gate_up, (t * 2 + 1) * size + k, static_cast<float>(At(x, t, k)) / 64.0f);
      }
    }
    QuantizedTensor quantized(x.dim(0), size);
    ops_.SwiGlu(gate_up, nullptr, quantized);
    return quantized;
  }

  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(2);
  Ops& ops_ = device_->ops();
};

TEST_P(Fp8Test, DequantizesRaggedBlocksExactly) {
  const GoldenFile golden("fp8.safetensors");
  const GoldenFile::Owned codes = golden.Load("w_codes", DType::kF8E4M3);
  const GoldenFile::Owned factors = golden.Load("w_scale_inv", DType::kF32);
  const GoldenFile::Owned expected = golden.Load("w_dequant_f32", DType::kF32);
  const Weight weight = {.values = codes.tensor, .scale_inv = factors.tensor};
  const TestTensor out(DType::kF32, {200, 272});
  ops_.Dequantize(weight, out);
  EXPECT_EQ(BytesOf(out), BytesOf(expected.tensor));

  // A slice of rows that begins inside a block.
  const Weight slice = {
      .values = codes.tensor.Slice(0, 100, 200), .scale_inv = factors.tensor, .row_offset = 100};
  const TestTensor part(DType::kF32, {100, 272});
  ops_.Dequantize(slice, part);
  EXPECT_EQ(BytesOf(part), BytesOf(expected.tensor.Slice(0, 100, 200)));
}

TEST_P(Fp8Test, QuantizesRowsAsDeepSeeksKernelDoes) {
  const GoldenFile golden("fp8.safetensors");
  const GoldenFile::Owned x = golden.Load("act_in", DType::kBF16);
  const auto codes = golden.Values<uint8_t>("act_div.codes");
  const auto scales = golden.Values<float>("act_div.scales");
  const QuantizedTensor quantized = QuantizeRows(x.tensor);
  ExpectQuantized(quantized, x.tensor);
  for (int64_t row = 0; row < 24; ++row) {
    for (int64_t k = 0; k < 512; ++k) {
      EXPECT_EQ(quantized.values->data<uint8_t>()[row * 512 + k], codes[row * 512 + k])
          << "row " << row << " element " << k;
    }
    for (int64_t block = 0; block < 4; ++block) {
      EXPECT_EQ(At(quantized.scales, row, block), scales[row * 4 + block])
          << "row " << row << " block " << block;
    }
  }
}

TEST_P(Fp8Test, QuantizesABlockOfAWeightLikeARowUnlessItIsTiny) {
  const GoldenFile golden("fp8.safetensors");
  const GoldenFile::Owned x = golden.Load("act_in", DType::kBF16);
  const auto codes = golden.Values<uint8_t>("act_div.codes");
  const auto scales = golden.Values<float>("act_div.scales");
  for (int64_t row = 0; row < 24; ++row) {  // a row alone is quantised in blocks of 1×128
    const Quantized quantized = Quantize(x.tensor.Slice(0, row, row + 1));
    for (int64_t block = 0; block < 4; ++block) {
      // Factors of activations do not fall below 1e-4 / 448; those of weights do.
      if (scales[row * 4 + block] <= 1e-4f / 448.0f) continue;
      EXPECT_EQ(At(quantized.scale_inv, 0, block), scales[row * 4 + block]);
      for (int64_t k = block * 128; k < block * 128 + 128; ++k) {
        EXPECT_EQ(quantized.values->data<Float8E4M3>()[k].bits, codes[row * 512 + k]) << k;
      }
    }
  }
}

TEST_P(Fp8Test, QuantizesZerosAndTinyNumbersWithTheSmallestFactor) {
  TestTensor x(DType::kF32, {2, 130});
  for (int64_t k = 0; k < 130; ++k) x->data<float>()[130 + k] = 1e-6f * static_cast<float>(k % 5);
  const QuantizedTensor quantized = QuantizeRows(x);
  ExpectQuantized(quantized, x);
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(ElementAt(quantized.scales, i), 1e-4f / 448.0f);
  EXPECT_EQ(At(quantized.values, 0, 7), 0.0);
  EXPECT_GT(At(quantized.values, 1, 129), 0.0);
}

TEST_P(Fp8Test, KeepsWhatIsNotANumberInItsPlace) {
  TestTensor x = random_.Floats(DType::kF32, {1, 256});
  x->data<float>()[5] = std::numeric_limits<float>::quiet_NaN();
  const QuantizedTensor quantized = QuantizeRows(x);
  for (int64_t k = 0; k < 256; ++k) {
    EXPECT_EQ(std::isnan(At(quantized.values, 0, k)), k == 5) << k;
  }
  EXPECT_TRUE(std::isfinite(At(quantized.scales, 0, 0)));
}

TEST_P(Fp8Test, QuantizesEveryElementToTheCodeOfTheScalarCodec) {
  // A block whose largest element is 448, so that its factor is 1 and its codes are the elements'.
  const auto values = GoldenFile("fp8.safetensors").Values<float>("encode_in");
  for (size_t begin = 0; begin < values.size(); begin += 126) {
    TestTensor x(DType::kF32, {1, 128});
    x->data<float>()[0] = 448.0f;
    for (size_t i = 0; i < 126; ++i) {
      const float value = values[std::min(begin + i, values.size() - 1)];
      x->data<float>()[1 + i] = std::clamp(value, -448.0f, 448.0f);
    }
    x->data<float>()[127] = std::numeric_limits<float>::quiet_NaN();
    const Quantized quantized = Quantize(x);
    ASSERT_EQ(At(quantized.scale_inv, 0, 0), 1.0);
    for (int64_t k = 0; k < 128; ++k) {
      EXPECT_EQ(quantized.values->data<Float8E4M3>()[k].bits & (k == 127 ? 0x7f : 0xff),
                ToFloat8E4M3(x->data<float>()[k]).bits & (k == 127 ? 0x7f : 0xff))
          << x->data<float>()[k];
    }
  }
}

TEST_P(Fp8Test, QuantizesWithinHalfAStepOfEachElement) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(dtype)));
    const TestTensor x = random_.Floats(dtype, {150, 300}, 0.02f);
    for (int64_t i = 0; i < 128; ++i) {
      for (int64_t k = 128; k < 256; ++k) SetElement(x, i * 300 + k, 0.0f);
    }
    const Quantized quantized = Quantize(x);
    const TestTensor back(DType::kF32, {150, 300});
    ops_.Dequantize({.values = quantized.values, .scale_inv = quantized.scale_inv}, back);
    EXPECT_EQ(At(quantized.scale_inv, 0, 1), 1.0);
    for (int64_t n = 0; n < 150; ++n) {
      for (int64_t k = 0; k < 300; ++k) {
        const double factor = At(quantized.scale_inv, n / 128, k / 128);
        // Half of the last of 4 significant bits, or half of the smallest subnormal number.
        const double step = std::max(std::abs(At(x, n, k)) * 0x1p-4, factor * 0x1p-10);
        EXPECT_NEAR(At(back, n, k), At(x, n, k), step * (1 + 1e-5)) << n << ", " << k;
      }
    }
  }
}

TEST_P(Fp8Test, QuantizesWhatIsTooSmallForAFactorToZero) {
  TestTensor x(DType::kF32, {1, 2});
  x->data<float>()[0] = 1e-45f;
  x->data<float>()[1] = -1e-45f;
  const Quantized quantized = Quantize(x);
  EXPECT_EQ(At(quantized.scale_inv, 0, 0), 1.0);
  EXPECT_EQ(At(quantized.values, 0, 0), 0.0);
  EXPECT_EQ(At(quantized.values, 0, 1), 0.0);
}

TEST_P(Fp8Test, MultipliesAGoldenMatrix) {
  const GoldenFile golden("fp8.safetensors");
  const GoldenFile::Owned x = golden.Load("gemm_a", DType::kF32);
  const GoldenFile::Owned codes = golden.Load("gemm_b_codes", DType::kF8E4M3);
  const GoldenFile::Owned factors = golden.Load("gemm_b_scale_inv", DType::kF32);
  const Weight weight = {.values = codes.tensor, .scale_inv = factors.tensor};
  const auto expect_product = [&](const LinearInput& input, const char* key) {
    const auto expected = golden.Values<double>(key);
    const TestTensor out(DType::kF32, {16, 200});
    ops_.Linear(input, weight, out);
    for (int64_t t = 0; t < 16; ++t) {
      for (int64_t n = 0; n < 200; ++n) {
        EXPECT_NEAR(At(out, t, n), expected[t * 200 + n],
                    ReferenceDot(input, t, weight, 0, n).Rounded(DType::kF32).error)
            << key << " row " << t << " output " << n;
      }
    }
  };
  expect_product(x.tensor, "gemm_out_dequant_f64");
  expect_product(QuantizeRows(x.tensor), "gemm_out_actq_f64");
}

INSTANTIATE_ON_EVERY_TARGET(Fp8Test);

}  // namespace
}  // namespace fathom
