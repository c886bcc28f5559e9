// Every operation on the GPU against the CPU's on the same contents. The CPU's are held to
// references in double precision by tests/kernels.
//
// Both sides accumulate in F32, in different orders; a sum of n products errs by at most
// (n + 2) * 2^-24 * Σ |product| on either side, and Σ |product| is what the CPU computes from
// absolute values. A result in BF16 was rounded once more on either side.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/cuda/twin_fixture.h"
#include "tests/kernels/reference.h"

namespace fathom {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kBF16 = DType::kBF16;
constexpr DType kFp8 = DType::kF8E4M3;
constexpr DType kActs[] = {kF32, kBF16};

class ConformanceTest : public TwinTest {
 protected:
  struct LinearCase {
    int64_t rows, outputs, inputs;
    int64_t gap = 0;
    int row_offset = 0, column_offset = 0;
  };
  void CheckLinear(const LinearCase& c, DType x_type, DType weight_type, DType out_type) {
    SCOPED_TRACE(absl::StrCat(c.rows, " x ", c.outputs, " x ", c.inputs, " gap ", c.gap, " ",
                              NameOf(x_type), " ", NameOf(weight_type), " ", NameOf(out_type)));
    const TwinInput x = x_type == kFp8 ? Quantized(c.rows, c.inputs)
                                       : TwinInput(Strided(x_type, c.rows, c.inputs, c.gap));
    const TwinWeight weight =
        RandomWeight(weight_type, 0, c.outputs, c.inputs, c.row_offset, c.column_offset);
    const Twin whole = Floats(out_type, {c.rows, c.outputs + c.gap});
    const Twin out = whole.Slice(1, 0, c.outputs);
    cpu().Linear(x.cpu(), weight.cpu, out.cpu);
    gpu().Linear(x.gpu(), weight.gpu, out.gpu);
    const TestTensor magnitudes(kF32, {c.rows, c.outputs});
    cpu().Linear(AbsoluteInput(x.cpu()), AbsoluteOf(weight.cpu).weight, magnitudes);
    ExpectSums(out, c.inputs, magnitudes, x_type == kFp8 ? 0x1p-13 : 0.0);
    ExpectEqual(whole.Slice(1, c.outputs, c.outputs + c.gap));
  }
};

TEST_F(ConformanceTest, EmbedAgrees) {
  for (const DType stored : kActs) {
    for (const DType act : kActs) {
      for (const int64_t size : {8, 300, 304}) {
        const Twin ids = Of(IntTensor({17, 4, 5, 99, 0, 12, 13}));
        const Twin table = Floats(stored, {8, size});
        const Twin out = Strided(act, 7, size, size % 16 == 0 ? 16 : 5);
        cpu().Embed(ids.cpu, table.cpu, 5, out.cpu);
        gpu().Embed(ids.gpu, table.gpu, 5, out.gpu);
        ExpectEqual(out);
      }
    }
  }
}

TEST_F(ConformanceTest, AddRmsNormAgrees) {
  for (const DType act : kActs) {
    for (const DType gain_type : kActs) {
      for (const int64_t size : {1, 31, 576, 1000, 7168, 9000}) {
        for (const bool adds : {false, true}) {
          SCOPED_TRACE(absl::StrCat(size, " ", NameOf(act), " ", NameOf(gain_type), " ", adds));
          const int64_t gap = size % 8 == 0 ? 16 : 9;
          const Twin x = Strided(act, 7, size, gap), gain = Floats(gain_type, {size});
          const Twin y = adds ? Strided(act, 7, size, 2 * gap) : Twin();
          const Twin normed = Strided(act, 7, size, 4 * gap);
          const TwinInput quantized = Quantized(7, size);
          cpu().AddRmsNorm(x.cpu, y.cpu, gain.cpu, 1e-6f, normed.cpu, quantized.cpu());
          gpu().AddRmsNorm(x.gpu, y.gpu, gain.gpu, 1e-6f, normed.gpu, quantized.gpu());
          ExpectEqual(x);
          // Half of the sum's relative error, and seven roundings around it.
          const double units = static_cast<double>(size) / 2 + 7;
          ExpectWithinUnits(normed, units);
          ExpectQuantizedOf(quantized.gpu(), normed.gpu);

          const TwinInput alone = Quantized(7, size);
          gpu().AddRmsNorm(x.gpu, {}, gain.gpu, 1e-6f, {}, alone.gpu());
          ExpectQuantizedOf(alone.gpu(), normed.gpu);
          gpu().AddRmsNorm(x.gpu, {}, gain.gpu, 1e-6f, x.gpu, {});
          ExpectWithinUnits({normed.cpu, x.gpu}, units);
        }
      }
    }
  }
}

TEST_F(ConformanceTest, AddRmsNormOfManyRowsAgrees) {
  for (const int64_t rows : {512, 1301}) {
    for (const int64_t size : {8, 576, 7168, 8192, 8200}) {
      for (const bool adds : {false, true}) {
        SCOPED_TRACE(absl::StrCat(rows, " ", size, " ", adds));
        const Twin x = Strided(kBF16, rows, size, 16), gain = Floats(kF32, {size});
        const Twin y = adds ? Strided(kBF16, rows, size, 32) : Twin();
        const Twin normed = Strided(kBF16, rows, size, 64);
        const TwinInput quantized = Quantized(rows, size);
        cpu().AddRmsNorm(x.cpu, y.cpu, gain.cpu, 1e-6f, normed.cpu, quantized.cpu());
        gpu().AddRmsNorm(x.gpu, y.gpu, gain.gpu, 1e-6f, normed.gpu, quantized.gpu());
        ExpectEqual(x);
        const double units = static_cast<double>(size) / 2 + 7;
        ExpectWithinUnits(normed, units);
        ExpectQuantizedOf(quantized.gpu(), normed.gpu);
        gpu().AddRmsNorm(x.gpu, {}, gain.gpu, 1e-6f, x.gpu, {});
        ExpectWithinUnits({normed.cpu, x.gpu}, units);
      }
    }
  }
}

TEST_F(ConformanceTest, LinearOfAllTypesAgrees) {
  const LinearCase kCases[] = {{1, 1, 1},
                               {1, 130, 128},
                               {7, 33, 576, 16},
                               {8, 64, 512},
                               {9, 65, 33, 3},
                               {7, 5, 31, 1},
                               {65, 130, 129, 0},
                               {70, 67, 640, 24},
                               {3, 40, 256, 0, 64, 32},
                               {2, 130, 77, 0, 1, 127},
                               {66, 200, 300, 0, 100, 45}};
  for (const DType x : kActs) {
    for (const DType weight : {kF32, kBF16, kFp8}) {
      for (const DType out : kActs) {
        for (const LinearCase& c : kCases) CheckLinear(c, x, weight, out);
      }
    }
  }
  for (const DType out : kActs) {
    for (const LinearCase& c : kCases) CheckLinear(c, kFp8, kFp8, out);
  }
}

// Small enough for a checker that takes a thousand times as long.
TEST_F(ConformanceTest, EachKernelOfLinearLayersAgrees) {
  CheckLinear({3, 40, 64, 0, 64, 32}, kBF16, kFp8, kBF16);
  CheckLinear({9, 65, 33, 3}, kF32, kF32, kF32);
  CheckLinear({9, 64, 72}, kBF16, kBF16, kF32);
  for (const int64_t tokens : {5, 12, 20, 50, 70}) {
    CheckLinear({tokens, 192, 384}, kFp8, kFp8, kBF16);
  }
  CheckLinear({129, 64 * 131, 256}, kFp8, kFp8, kBF16);
}

TEST_F(ConformanceTest, LinearOfDeepSeekV3ShapesAgrees) {
  CheckLinear({1, 512, 7168}, kBF16, kFp8, kBF16);
  CheckLinear({3, 512, 7168}, kFp8, kFp8, kBF16);
  CheckLinear({7, 256, 7168}, kBF16, kBF16, kF32);
  CheckLinear({100, 576, 2048}, kFp8, kFp8, kBF16);
}

// W8A8 on tensor cores, as far as there are kernels for this device.
TEST_F(ConformanceTest, Fp8LinearAgrees) {
  for (const int64_t tokens : {1, 7, 8, 16, 17, 64, 65, 200}) {
    for (const DType out : kActs) {
      CheckLinear({tokens, 576, 1536}, kFp8, kFp8, out);
      CheckLinear({tokens, 320, 256, 16}, kFp8, kFp8, out);
    }
  }
  for (const int64_t outputs : {2112, 7168}) CheckLinear({5, outputs, 2048}, kFp8, kFp8, kBF16);
}

// Tensor cores: every number of tokens of a block, with rows, outputs and inputs left over.
TEST_F(ConformanceTest, Bf16LinearAgrees) {
  for (const int64_t tokens : {1, 8, 9, 16, 30, 64, 65, 130, 257}) {
    for (const DType out : kActs) {
      CheckLinear({tokens, tokens <= 8 ? 4100 : 200, 264, 16}, kBF16, kBF16, out);
      CheckLinear({tokens, tokens <= 8 ? 4096 : 128, 8}, kBF16, kBF16, out);
    }
  }
  CheckLinear({9, 300, 2056}, kBF16, kBF16, kF32);
}

TEST_F(ConformanceTest, LinearOfRandomShapesAgrees) {
  for (int i = 0; i < 40; ++i) {
    const LinearCase c = {1 + random_.Below(90), 1 + random_.Below(150), 1 + random_.Below(500),
                          random_.Below(4) * 8,  random_.Below(128),     random_.Below(128)};
    const DType types[] = {kF32, kBF16, kFp8};
    const DType weight_type = types[random_.Below(3)];
    CheckLinear(c, types[random_.Below(weight_type == kFp8 ? 3 : 2)], weight_type,
                kActs[random_.Below(2)]);
  }
}

TEST_F(ConformanceTest, SwiGluAgrees) {
  for (const DType act : kActs) {
    for (const int64_t size : {1, 100, 256, 2304}) {
      const int64_t gap = size % 8 == 0 ? 16 : 4;
      const Twin gate_up = Strided(act, 7, 2 * size, gap), activated = Strided(act, 7, size, gap);
      cpu().SwiGlu(gate_up.cpu, nullptr, activated.cpu);
      gpu().SwiGlu(gate_up.gpu, nullptr, activated.gpu);
      ExpectWithinUnits(activated, 6);  // exp, and five roundings around it
      const TwinInput quantized = Quantized(7, size);
      gpu().SwiGlu(gate_up.gpu, nullptr, quantized.gpu());
      ExpectQuantizedOf(quantized.gpu(), activated.gpu);
    }
  }
}

TEST_F(ConformanceTest, AddAndGatherRowsAgree) {
  for (const DType act : kActs) {
    for (const int64_t size : {300, 304}) {
      const int64_t gap = size % 16 == 0 ? 16 : 2;
      const Twin x = Strided(act, 7, size, gap), y = Strided(act, 7, size, 3 * gap);
      cpu().Add(x.cpu, y.cpu);
      gpu().Add(x.gpu, y.gpu);
      ExpectEqual(x);

      const Twin rows = Of(IntTensor({6, 0, 3, 3})), gathered = Floats(act, {4, size});
      cpu().GatherRows(x.cpu, rows.cpu, gathered.cpu);
      gpu().GatherRows(x.gpu, rows.gpu, gathered.gpu);
      ExpectEqual(gathered);
    }
  }
}

TEST_F(ConformanceTest, QuantizeFp8AndBackGivesTheSameBits) {
  for (const DType stored : kActs) {
    for (const auto& [rows, columns] :
         {std::pair<int64_t, int64_t>{1, 1}, {130, 257}, {256, 128}, {200, 264}}) {
      const Twin x = Floats(stored, {rows, columns}, 3.0f);
      const Twin values = Floats(kFp8, {rows, columns});
      const Twin factors = Floats(kF32, {(rows + 127) / 128, (columns + 127) / 128});
      const Weight on_cpu = {.values = values.cpu, .scale_inv = factors.cpu};
      const Weight on_gpu = {.values = values.gpu, .scale_inv = factors.gpu};
      cpu().QuantizeFp8(x.cpu, on_cpu);
      gpu().QuantizeFp8(x.gpu, on_gpu);
      ExpectEqual(factors);
      ExpectEqual(values);
      for (const DType out_type : kActs) {
        const Twin out = Strided(out_type, rows, columns, columns % 8 == 0 ? 16 : 3);
        cpu().Dequantize(on_cpu, out.cpu);
        gpu().Dequantize(on_gpu, out.gpu);
        ExpectEqual(out);
      }
    }
  }
  const Twin zeros = Of(TestTensor(kF32, {3, 200})), values = Floats(kFp8, {3, 200});
  const Twin factors = Floats(kF32, {1, 2});
  gpu().QuantizeFp8(zeros.gpu, {.values = values.gpu, .scale_inv = factors.gpu});
  EXPECT_EQ(OnHost(factors.gpu), std::vector<double>({1.0, 1.0}));
}

TEST_F(ConformanceTest, DequantizeOfASliceAgrees) {
  const TwinWeight weight = RandomWeight(kFp8, 0, 200, 300, 77, 45);
  for (const DType out_type : kActs) {
    const Twin out = Floats(out_type, {200, 300});
    cpu().Dequantize(weight.cpu, out.cpu);
    gpu().Dequantize(weight.gpu, out.gpu);
    ExpectEqual(out);
  }
}

TEST_F(ConformanceTest, FillRandomGivesTheSameBits) {
  for (const DType dtype : {kF32, kBF16, kFp8}) {
    for (const int64_t size : {1, 7, 1000, 4096}) {
      const Twin out = Floats(dtype, {size});
      cpu().FillRandom(out.cpu, 0.3f, 77);
      gpu().FillRandom(out.gpu, 0.3f, 77);
      ExpectEqual(out);
    }
  }
}

}  // namespace
}  // namespace fathom
