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

constexpr uint64_t kSeed = 20241226;

// A weight with the memory that holds it.
struct OwnedWeight {
  TestTensor values;
  TestTensor scale_inv;
  Weight weight;
};

OwnedWeight RandomWeight(Random& random, DType dtype, int64_t experts, int64_t outputs,
                         int64_t inputs, int row_offset = 0, int column_offset = 0) {
  const bool is_stack = experts > 0;
  const bool is_fp8 = dtype == DType::kF8E4M3;
  // Two spare factors, as in a slice of a larger matrix.
  const int64_t block_rows = (outputs + row_offset) / kFp8Block + 2;
  const int64_t block_columns = (inputs + column_offset) / kFp8Block + 2;
  // Deviation 0.02 reaches down into the subnormal codes of E4M3.
  OwnedWeight owned = {is_stack
                           ? random.Floats(dtype, {experts, outputs, inputs}, is_fp8 ? 0.02f : 1.0f)
                           : random.Floats(dtype, {outputs, inputs}, is_fp8 ? 0.02f : 1.0f),
                       is_stack ? random.Floats(DType::kF32, {experts, block_rows, block_columns})
                                : random.Floats(DType::kF32, {block_rows, block_columns}),
                       {}};
  owned.weight.values = owned.values;
  if (is_fp8) {
    owned.weight.scale_inv = owned.scale_inv;
    owned.weight.row_offset = row_offset;
    owned.weight.column_offset = column_offset;
  }
  return owned;
}

struct Types {
  DType x;
  DType weight;
  DType out;
};

const std::vector<Types>& AllTypes() {
  static const std::vector<Types>* const kTypes = new std::vector<Types>{
      {DType::kF32, DType::kF32, DType::kF32},    {DType::kF32, DType::kBF16, DType::kF32},
      {DType::kF32, DType::kF8E4M3, DType::kF32}, {DType::kBF16, DType::kF32, DType::kF32},
      {DType::kBF16, DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF8E4M3, DType::kBF16},
      {DType::kBF16, DType::kBF16, DType::kF32},
  };
  return *kTypes;
}

std::string NameOf(const Types& types) {
  return absl::StrCat(fathom::NameOf(types.x), " ", fathom::NameOf(types.weight), " ",
                      fathom::NameOf(types.out));
}

class LinearTest : public EveryTargetTest {
 protected:
  void ExpectRight(const LinearInput& x, const Weight& weight, const Tensor& out) {
    for (int64_t t = 0; t < out.dim(0); ++t) {
      for (int64_t n = 0; n < out.dim(1); ++n) {
        EXPECT_WITHIN(At(out, t, n), ReferenceDot(x, t, weight, 0, n).Rounded(out.dtype()))
            << "row " << t << " output " << n;
      }
    }
  }

  Random random_{kSeed};
  std::unique_ptr<Device> device_ = OpenTestDevice(1);
  Ops& ops_ = device_->ops();
};

TEST_P(LinearTest, MultipliesWhateverTheShape) {
  struct Shape {
    int64_t rows, outputs, inputs;
  };
  const Shape kShapes[] = {{1, 1, 1},   {1, 9, 17},  {7, 3, 5},    {2, 33, 128},
                           {5, 37, 96}, {7, 4, 515}, {99, 35, 70}, {13, 34, 1030}};
  for (const Types& types : AllTypes()) {
    for (const Shape& shape : kShapes) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(types), " ", shape.rows, "x",
                                shape.outputs, "x", shape.inputs));
      const TestTensor x = random_.Floats(types.x, {shape.rows, shape.inputs});
      const OwnedWeight owned = RandomWeight(random_, types.weight, 0, shape.outputs, shape.inputs);
      const TestTensor out(types.out, {shape.rows, shape.outputs});
      ops_.Linear(x, owned.weight, out);
      ExpectRight(x, owned.weight, out);
    }
  }
}

TEST_P(LinearTest, FindsTheFactorsOfASliceThatBeginsInsideABlock) {
  for (int64_t rows : {1, 9}) {
    for (const auto& [row_offset, column_offset] : {std::pair(0, 5), {37, 0}, {127, 127}}) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " rows ", rows, " offsets ", row_offset, ", ",
                                column_offset));
      const TestTensor x = random_.Floats(DType::kF32, {rows, 300});
      const OwnedWeight owned =
          RandomWeight(random_, DType::kF8E4M3, 0, 140, 300, row_offset, column_offset);
      const TestTensor out(DType::kF32, {rows, 140});
      ops_.Linear(x, owned.weight, out);
      ExpectRight(x, owned.weight, out);
    }
  }
}

TEST_P(LinearTest, ReadsAndWritesStridedRows) {
  const TestTensor wide_x = random_.Floats(DType::kBF16, {9, 50});
  const TestTensor wide_out(DType::kF32, {9, 40});
  const OwnedWeight owned = RandomWeight(random_, DType::kBF16, 0, 20, 30);
  const Tensor x = wide_x->Slice(1, 10, 40);
  const Tensor out = wide_out->Slice(1, 5, 25);
  ops_.Linear(x, owned.weight, out);
  ExpectRight(x, owned.weight, out);
  for (int64_t t = 0; t < 9; ++t) {
    EXPECT_EQ(At(wide_out, t, 4), 0.0);
    EXPECT_EQ(At(wide_out, t, 25), 0.0);
  }
}

TEST_P(LinearTest, GivesARowTheSameBitsAloneAndInEveryBatchAndOnEveryThread) {
  constexpr int64_t kRows = 100;  // more than share a panel
  constexpr int64_t kOutputs = 141;
  constexpr int64_t kInputs = 1077;  // more than two chunks of a panel, and not whole vectors
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (const Types& types : AllTypes()) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(types)));
    const TestTensor x = random_.Floats(types.x, {kRows, kInputs});
    const OwnedWeight owned = RandomWeight(random_, types.weight, 0, kOutputs, kInputs, 100, 77);
    const TestTensor together(types.out, {kRows, kOutputs});
    ops_.Linear(x, owned.weight, together);

    const TestTensor threaded(types.out, {kRows, kOutputs});
    three_threads->ops().Linear(x, owned.weight, threaded);
    EXPECT_EQ(BytesOf(threaded), BytesOf(together)) << "three threads";

    for (int64_t batch : {1, 2, 5, 7, 64}) {
      for (int64_t begin = 0; begin + batch <= kRows; begin += 31) {
        const TestTensor out(types.out, {batch, kOutputs});
        ops_.Linear(x->Slice(0, begin, begin + batch), owned.weight, out);
        EXPECT_EQ(BytesOf(out), BytesOf(together->Slice(0, begin, begin + batch)))
            << batch << " rows from " << begin;
      }
    }
  }
}

TEST_P(LinearTest, GivesAnOutputTheSameBitsInEverySliceOfTheOutputs) {
  const TestTensor x = random_.Floats(DType::kF32, {8, 200});
  const OwnedWeight owned = RandomWeight(random_, DType::kF8E4M3, 0, 150, 200);
  const TestTensor whole(DType::kF32, {8, 150});
  ops_.Linear(x, owned.weight, whole);
  for (int64_t begin : {1, 90, 128, 149}) {
    Weight slice = owned.weight;
    slice.values = slice.values.Slice(0, begin, 150);
    slice.row_offset = static_cast<int>(begin);
    const TestTensor out(DType::kF32, {8, 150 - begin});
    ops_.Linear(x, slice, out);
    EXPECT_EQ(BytesOf(out), BytesOf(whole->Slice(1, begin, 150))) << "from " << begin;
  }
}

TEST_P(LinearTest, DecodesEveryCodeOfE4M3AsItIs) {
  // One output per code, and one input of 1 to pick it.
  constexpr int64_t kCodes = 256;
  TestTensor codes(DType::kF8E4M3, {kCodes, 1});
  for (int code = 0; code < kCodes; ++code) {
    codes->data<Float8E4M3>()[code] = {static_cast<uint8_t>(code)};
  }
  TestTensor factors(DType::kF32, {2, 1});
  factors->data<float>()[0] = factors->data<float>()[1] = 1.0f;
  for (int64_t rows : {1, 8}) {
    TestTensor x(DType::kF32, {rows, 1});
    for (int64_t t = 0; t < rows; ++t) x->data<float>()[t] = 1.0f;
    const TestTensor out(DType::kF32, {rows, kCodes});
    ops_.Linear(x, {.values = codes, .scale_inv = factors}, out);
    for (int code = 0; code < kCodes; ++code) {
      const double value = ToFloat(Float8E4M3{static_cast<uint8_t>(code)});
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(At(out, rows - 1, code))) << code;
      } else {
        EXPECT_EQ(At(out, rows - 1, code), value) << code;
      }
    }
  }
}

TEST_P(LinearTest, KeepsWhatIsNotFiniteInItsRow) {
  const float kInfinity = std::numeric_limits<float>::infinity();
  for (DType weight_type : {DType::kF32, DType::kF8E4M3}) {
    TestTensor x = random_.Floats(DType::kF32, {9, 33});
    x->data<float>()[2 * 33 + 32] = std::numeric_limits<float>::quiet_NaN();
    x->data<float>()[5 * 33 + 1] = kInfinity;
    const OwnedWeight owned = RandomWeight(random_, weight_type, 0, 6, 33);
    const TestTensor out(DType::kF32, {9, 6});
    ops_.Linear(x, owned.weight, out);
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t n = 0; n < 6; ++n) {
        EXPECT_EQ(std::isfinite(At(out, t, n)), t != 2 && t != 5) << t << ", " << n;
      }
    }
  }
}

// Quantised inputs against quantised weights ("W8A8").
class QuantizedLinearTest : public LinearTest {
 protected:
  // Codes of all magnitudes with random factors.
  QuantizedTensor RandomInput(int64_t rows, int64_t columns) {
    QuantizedTensor x(rows, columns);
    x.values = random_.Floats(DType::kF8E4M3, {rows, columns}, 20.0f);
    x.scales = random_.Floats(DType::kF32, {rows, (columns + 127) / 128});
    return x;
  }
};

TEST_P(QuantizedLinearTest, MultipliesWhateverTheShape) {
  struct Shape {
    int64_t rows, outputs, inputs;
    int row_offset, column_offset;
  };
  const Shape kShapes[] = {{1, 9, 17, 0, 0},    {1, 140, 300, 37, 0}, {7, 33, 128, 0, 0},
                           {9, 140, 300, 0, 5}, {7, 34, 1030, 0, 0},  {99, 35, 640, 127, 127}};
  for (const Shape& shape : kShapes) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", shape.rows, "x", shape.outputs, "x",
                                shape.inputs, " to ", fathom::NameOf(act)));
      const QuantizedTensor x = RandomInput(shape.rows, shape.inputs);
      const OwnedWeight owned = RandomWeight(random_, DType::kF8E4M3, 0, shape.outputs,
                                             shape.inputs, shape.row_offset, shape.column_offset);
      const TestTensor out(act, {shape.rows, shape.outputs});
      ops_.Linear(x, owned.weight, out);
      ExpectRight(x, owned.weight, out);
    }
  }
}

TEST_P(QuantizedLinearTest, IsExactWhereF32Is) {
  // Small integers and powers of two: every product and sum is a number of F32, in any order.
  constexpr int64_t kRows = 8;
  constexpr int64_t kOutputs = 150;
  constexpr int64_t kInputs = 600;
  const auto integers = [&](std::initializer_list<int64_t> shape) {
    TestTensor tensor(DType::kF8E4M3, shape);
    for (int64_t i = 0; i < tensor->num_elements(); ++i) {
      SetElement(tensor, i, static_cast<float>(random_.Below(17) - 8));
    }
    return tensor;
  };
  const auto powers = [&](std::initializer_list<int64_t> shape) {
    TestTensor tensor(DType::kF32, shape);
    for (int64_t i = 0; i < tensor->num_elements(); ++i) {
      SetElement(tensor, i, std::ldexp(1.0f, random_.Below(4) - 2));
    }
    return tensor;
  };
  const TestTensor x = integers({kRows, kInputs});
  const TestTensor x_scales = powers({kRows, 5});
  const TestTensor w = integers({kOutputs, kInputs});
  const TestTensor scale_inv = powers({2, 5});
  const Weight weight = {.values = w, .scale_inv = scale_inv};
  const TestTensor out(DType::kF32, {kRows, kOutputs});
  ops_.Linear({*x, *x_scales}, weight, out);
  for (int64_t t = 0; t < kRows; ++t) {
    for (int64_t n = 0; n < kOutputs; ++n) {
      EXPECT_EQ(At(out, t, n), ReferenceDot({*x, *x_scales}, t, weight, 0, n).value)
          << "seed " << kSeed << " row " << t << " output " << n;
    }
  }
}

TEST_P(QuantizedLinearTest, GivesARowTheSameBitsAloneAndInEveryBatchAndOnEveryThread) {
  constexpr int64_t kRows = 100;
  constexpr int64_t kInputs = 1077;
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  const QuantizedTensor x = RandomInput(kRows, kInputs);
  const OwnedWeight owned = RandomWeight(random_, DType::kF8E4M3, 0, 141, kInputs, 100, 77);
  const TestTensor together(DType::kBF16, {kRows, 141});
  ops_.Linear(x, owned.weight, together);
  const TestTensor threaded(DType::kBF16, {kRows, 141});
  three_threads->ops().Linear(x, owned.weight, threaded);
  EXPECT_EQ(BytesOf(threaded), BytesOf(together)) << "three threads";
  for (int64_t batch : {1, 5, 64}) {
    for (int64_t begin = 0; begin + batch <= kRows; begin += 31) {
      const TestTensor out(DType::kBF16, {batch, 141});
      ops_.Linear(
          {x.values->Slice(0, begin, begin + batch), x.scales->Slice(0, begin, begin + batch)},
          owned.weight, out);
      EXPECT_EQ(BytesOf(out), BytesOf(together->Slice(0, begin, begin + batch)))
          << batch << " rows from " << begin;
    }
  }
}

TEST_P(QuantizedLinearTest, ReadsRowsAndFactorsOfWiderOnes) {
  const QuantizedTensor wide = RandomInput(6, 600);
  const LinearInput x = {wide.values->Slice(1, 128, 470), wide.scales->Slice(1, 1, 4)};
  const OwnedWeight owned = RandomWeight(random_, DType::kF8E4M3, 0, 11, 342);
  const TestTensor out(DType::kF32, {6, 11});
  ops_.Linear(x, owned.weight, out);
  ExpectRight(x, owned.weight, out);
}

TEST_P(QuantizedLinearTest, TakesQuantizedRowsToFp8WeightsOnly) {
  const QuantizedTensor x = RandomInput(2, 40);
  const OwnedWeight owned = RandomWeight(random_, DType::kBF16, 0, 4, 40);
  const TestTensor out(DType::kF32, {2, 4});
  EXPECT_DEATH(ops_.Linear(x, owned.weight, out), "quantised x for a weight");
}

// Tokens routed at random, expert 1 to nobody, among them ids of other ranks.
class GroupedLinearTest : public QuantizedLinearTest {
 protected:
  static constexpr int kExperts = 4;

  TestTensor RandomChoices(int64_t tokens, int choices) {
    TestTensor experts = random_.Ints({tokens, choices}, kExperts + 2);
    for (int64_t i = 0; i < experts->num_elements(); ++i) {
      int32_t& id = experts->data<int32_t>()[i];
      if (id == 1) id = 2;
    }
    return experts;
  }

  // The weight of expert e alone.
  static Weight ExpertOf(const Weight& weight, int64_t e) {
    Weight expert = weight;
    expert.values = weight.values[e];
    if (weight.scale_inv.present()) expert.scale_inv = weight.scale_inv[e];
    return expert;
  }
};

TEST_P(GroupedLinearTest, GivesEachRowTheBitsOfItsExpertsLinearLayer) {
  const std::unique_ptr<Device> three_threads = OpenTestDevice(3);
  for (const Types& types : AllTypes()) {
    for (int64_t tokens : {1, 7, 60}) {
      for (int choices : {1, 3}) {
        SCOPED_TRACE(absl::StrCat("seed ", kSeed, " ", NameOf(types), " tokens ", tokens));
        const int64_t rows = tokens * choices;
        const TestTensor experts = RandomChoices(tokens, choices);
        const OwnedGroups groups(experts, 0, kExperts);

        const OwnedWeight up = RandomWeight(random_, types.weight, kExperts, 50, 70, 3, 100);
        const OwnedWeight down = RandomWeight(random_, types.weight, kExperts, 30, 50, 90, 0);
        const TestTensor x = random_.Floats(types.x, {tokens, 70});
        const TestTensor middle(types.x, {rows, 50});
        const TestTensor out(types.out, {rows, 30});
        ops_.GroupedLinear(x, groups, up.weight, choices, middle);
        ops_.GroupedLinear(middle, groups, down.weight, 0, out);

        for (int64_t e = 0; e < kExperts; ++e) {
          for (int64_t i = static_cast<int64_t>(At(groups.offsets, e));
               i < At(groups.offsets, e + 1); ++i) {
            const auto token = static_cast<int64_t>(At(groups.rows, i)) / choices;
            const TestTensor alone_middle(types.x, {1, 50});
            const TestTensor alone(types.out, {1, 30});
            ops_.Linear(x->Slice(0, token, token + 1), ExpertOf(up.weight, e), alone_middle);
            ops_.Linear(middle->Slice(0, i, i + 1), ExpertOf(down.weight, e), alone);
            EXPECT_EQ(BytesOf(middle->Slice(0, i, i + 1)), BytesOf(alone_middle)) << "row " << i;
            EXPECT_EQ(BytesOf(out->Slice(0, i, i + 1)), BytesOf(alone)) << "row " << i;
          }
        }
        const TestTensor threaded(types.x, {rows, 50});
        three_threads->ops().GroupedLinear(x, groups, up.weight, choices, threaded);
        EXPECT_EQ(BytesOf(threaded), BytesOf(middle)) << "three threads";
      }
    }
  }
}

TEST_P(GroupedLinearTest, GivesEachQuantizedRowTheBitsOfItsExpertsLinearLayer) {
  for (int64_t tokens : {1, 60}) {
    SCOPED_TRACE(absl::StrCat("seed ", kSeed, " tokens ", tokens));
    constexpr int kChoices = 3;
    const int64_t rows = tokens * kChoices;
    const OwnedGroups groups(RandomChoices(tokens, kChoices), 0, kExperts);
    const OwnedWeight owned = RandomWeight(random_, DType::kF8E4M3, kExperts, 50, 270, 3, 0);
    // By token, and row by row.
    for (int64_t rows_of_x : {tokens, rows}) {
      const QuantizedTensor x = RandomInput(rows_of_x, 270);
      const TestTensor out(DType::kBF16, {rows, 50});
      ops_.GroupedLinear(x, groups, owned.weight, kChoices, out);
      for (int64_t e = 0; e < kExperts; ++e) {
        for (auto i = static_cast<int64_t>(At(groups.offsets, e)); i < At(groups.offsets, e + 1);
             ++i) {
          const int64_t source =
              rows_of_x == rows ? i : static_cast<int64_t>(At(groups.rows, i)) / kChoices;
          const TestTensor alone(DType::kBF16, {1, 50});
          ops_.Linear(
              {x.values->Slice(0, source, source + 1), x.scales->Slice(0, source, source + 1)},
              ExpertOf(owned.weight, e), alone);
          EXPECT_EQ(BytesOf(out->Slice(0, i, i + 1)), BytesOf(alone)) << "row " << i;
        }
      }
    }
  }
}

TEST_P(GroupedLinearTest, LeavesAlonePastTheLastRowOfThisRank) {
  const TestTensor experts = IntTensor({9, 9, 2, 9});
  const OwnedGroups groups(experts, 0, kExperts);
  const OwnedWeight owned = RandomWeight(random_, DType::kF32, kExperts, 5, 6);
  const TestTensor x = random_.Floats(DType::kF32, {4, 6});
  const TestTensor out = random_.Floats(DType::kF32, {4, 5});
  const std::string before = BytesOf(out->Slice(0, 1, 4));
  ops_.GroupedLinear(x, groups, owned.weight, 1, out);
  EXPECT_EQ(BytesOf(out->Slice(0, 1, 4)), before);
}

INSTANTIATE_ON_EVERY_TARGET(LinearTest);
INSTANTIATE_ON_EVERY_TARGET(QuantizedLinearTest);
INSTANTIATE_ON_EVERY_TARGET(GroupedLinearTest);

}  // namespace
}  // namespace fathom
