// Routing and what follows it, on the GPU against the CPU's; sorted rows and the notes about them
// against what they should be.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/expert_chunks.h"
#include "tests/kernels/cuda/twin_fixture.h"
#include "tests/kernels/reference.h"

namespace fathom {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kBF16 = DType::kBF16;
constexpr DType kFp8 = DType::kF8E4M3;
constexpr DType kActs[] = {kF32, kBF16};

class ExpertsConformanceTest : public TwinTest {
 protected:
  static constexpr int kFirstExpert = 2;
  static constexpr int kExperts = 5;

  struct Routed {
    Twin logits, experts, weights;
    TwinGroups groups;
    Routes cpu() const { return {logits.cpu, experts.cpu, weights.cpu, groups.cpu()}; }
    Routes gpu() const { return {logits.gpu, experts.gpu, weights.gpu, groups.gpu()}; }
  };
  Routed RoomForRoutes(int64_t tokens, int64_t n_routed_experts, int64_t choices,
                       int64_t local_experts) {
    const int64_t rows = tokens * choices;
    return {Floats(kF32, {tokens, n_routed_experts}),
            Ints({tokens, choices}, 5),
            Floats(kF32, {tokens, choices}),
            {Ints({rows}, 99), Ints({local_experts + 1}, 99),
             Ints({NumGroupNotes(local_experts, rows)}, 99)}};
  }

  // Sorted rows, offsets and notes of these choices, made here.
  static std::vector<int32_t> NotesOf(const OwnedGroups& groups, int64_t local_experts) {
    const int64_t rows = groups.rows->dim(0);
    const int chunk_rows = RowsPerChunk(rows, local_experts);
    std::vector<int32_t> notes(NumGroupNotes(local_experts, rows), 0);
    const auto* offsets = groups.offsets->data<int32_t>();
    const int64_t places = PlacesNote(local_experts, rows);
    std::fill(notes.begin() + places, notes.end(), -1);
    for (int e = 0; e < local_experts; ++e) {
      for (int begin = offsets[e]; begin < offsets[e + 1]; begin += chunk_rows) {
        int32_t* chunk = &notes[kFirstChunkNote + 4 * notes[0]++];
        chunk[0] = e;
        chunk[1] = begin;
        chunk[2] = std::min(chunk_rows, offsets[e + 1] - begin);
      }
    }
    for (int i = 0; i < offsets[local_experts]; ++i) {
      notes[places + groups.rows->data<int32_t>()[i]] = i;
    }
    return notes;
  }

  // What the GPU wrote about its own choices.
  void ExpectGroupsOfOwnChoices(const Routed& routed, int first_expert) {
    const auto local_experts = static_cast<int>(routed.groups.offsets.cpu.dim(0) - 1);
    const OwnedGroups expected(HostCopy(routed.experts.gpu), first_expert, local_experts);
    const std::vector<int32_t> notes = NotesOf(expected, local_experts);
    const TestTensor offsets = HostCopy(routed.groups.offsets.gpu);
    const TestTensor rows = HostCopy(routed.groups.rows.gpu);
    const TestTensor found = HostCopy(routed.groups.notes.gpu);
    for (int e = 0; e <= local_experts; ++e) {
      ASSERT_EQ(offsets->data<int32_t>()[e], expected.offsets->data<int32_t>()[e]) << e;
    }
    for (int i = 0; i < expected.offsets->data<int32_t>()[local_experts]; ++i) {
      ASSERT_EQ(rows->data<int32_t>()[i], expected.rows->data<int32_t>()[i]) << i;
    }
    ASSERT_EQ(found->data<int32_t>()[0], notes[0]);
    for (int i = 0; i < 4 * notes[0]; ++i) {
      const int place = kFirstChunkNote + i;
      ASSERT_EQ(found->data<int32_t>()[place], notes[place]) << "chunk " << i / 4;
    }
    const int64_t places = PlacesNote(local_experts, rows->dim(0));
    for (int64_t i = 0; i < rows->dim(0); ++i) {
      ASSERT_EQ(found->data<int32_t>()[places + i], notes[places + i]) << "row " << i;
    }
  }

  // Numbers of few bits, so that logits are exact whatever the order of their sums.
  Twin ExactFloats(DType dtype, int64_t rows, int64_t columns, float unit) {
    TestTensor values(dtype, {rows, columns});
    for (int64_t i = 0; i < rows * columns; ++i) {
      SetElement(values, i, static_cast<float>(random_.Below(9) - 4) * unit);
    }
    return Of(values);
  }

  // The same ids, unless two experts' choices differ by less than scores err: by four units of the
  // last place of 1, and by the bias's own rounding.
  void ExpectSameChoices(const Routed& routed, const Twin& bias, const RoutingConfig& config) {
    const TestTensor found = HostCopy(routed.experts.gpu);
    const auto score = [&](int64_t t, int64_t e) {
      const double logit = At(routed.logits.cpu, t, e);
      const bool is_biased = config.topk_method == TopkMethod::kNoauxTc;
      if (config.scoring_func == ScoringFunc::kSoftmax) return logit;  // monotonous
      return 1.0 / (1.0 + std::exp(-logit)) + (is_biased ? At(bias.cpu, e) : 0.0);
    };
    for (int64_t t = 0; t < routed.experts.cpu.dim(0); ++t) {
      for (int64_t j = 0; j < routed.experts.cpu.dim(1); ++j) {
        const auto expected = static_cast<int64_t>(At(routed.experts.cpu, t, j));
        const auto id = static_cast<int64_t>(At(found, t, j));
        if (id == expected) continue;
        ASSERT_LT(id, routed.logits.cpu.dim(1)) << t << " " << j;
        EXPECT_NEAR(score(t, id), score(t, expected), 0x1p-21) << "token " << t << " choice " << j;
      }
    }
  }

  void CheckRoute(const RoutingConfig& config, int64_t tokens, int64_t experts, int64_t inputs,
                  DType act, DType stored, int first_expert, int64_t local_experts) {
    SCOPED_TRACE(absl::StrCat(tokens, " tokens, ", experts, " experts, ", inputs, " inputs ",
                              NameOf(act), " ", NameOf(stored)));
    const auto unit = static_cast<float>(std::exp2(-std::floor(std::log2(inputs) / 2) - 3));
    const Twin x = ExactFloats(act, tokens, inputs, 1.0f);
    const Twin gate = ExactFloats(stored, experts, inputs, unit);
    const Twin bias = Floats(kF32, {experts}, 0.1f);
    const int64_t k = config.num_choices();
    const Routed routed = RoomForRoutes(tokens, experts, k, local_experts);
    cpu().Route(x.cpu, gate.cpu, bias.cpu, config, first_expert, routed.cpu());
    gpu().Route(x.gpu, gate.gpu, bias.gpu, config, first_expert, routed.gpu());
    ExpectEqual(routed.logits);
    ExpectSameChoices(routed, bias, config);
    // The sums of the scores: of the chosen ones, or of all; and eight roundings around them.
    const bool is_softmax = config.scoring_func == ScoringFunc::kSoftmax;
    ExpectWithinUnits(routed.weights, static_cast<double>(is_softmax ? experts : k) + 8);
    ExpectGroupsOfOwnChoices(routed, first_expert);
    gpu().Route(x.gpu, gate.gpu, bias.gpu, config, first_expert, routed.gpu());  // leaves no trace
    ExpectGroupsOfOwnChoices(routed, first_expert);
  }

  struct GroupedCase {
    DType x, weight;
    int64_t outputs, inputs;
    int per_token;
    int row_offset = 0, column_offset = 0;
  };
  void CheckGroupedLinear(const GroupedCase& c, int64_t tokens, int64_t choices,
                          const TwinGroups& groups) {
    SCOPED_TRACE(absl::StrCat(tokens, " tokens, ", c.outputs, " x ", c.inputs, " ", NameOf(c.x),
                              " ", NameOf(c.weight), " ", c.per_token));
    const int64_t rows = tokens * choices, rows_of_x = c.per_token > 0 ? tokens : rows;
    const TwinInput x = c.x == kFp8 ? Quantized(rows_of_x, c.inputs)
                                    : TwinInput(Strided(c.x, rows_of_x, c.inputs, 8));
    const TwinWeight weight =
        RandomWeight(c.weight, kExperts, c.outputs, c.inputs, c.row_offset, c.column_offset);
    const DType act = c.x == kF32 ? kF32 : kBF16;
    const Twin out = Strided(act, rows, c.outputs, c.outputs % 8 == 0 ? 16 : 2);
    cpu().GroupedLinear(x.cpu(), groups.cpu(), weight.cpu, c.per_token, out.cpu);
    gpu().GroupedLinear(x.gpu(), groups.gpu(), weight.gpu, c.per_token, out.gpu);
    const TestTensor magnitudes(kF32, {rows, c.outputs});
    cpu().GroupedLinear(AbsoluteInput(x.cpu()), groups.cpu(), AbsoluteOf(weight.cpu).weight,
                        c.per_token, magnitudes);
    ExpectSums(out, c.inputs, magnitudes, c.x == kFp8 ? 0x1p-13 : 0.0);  // others' rows as before
  }

  // Choices of experts [0, 8), of which 2 to 6 are this rank's and 3 is nobody's choice.
  TwinGroups RandomGroups(int64_t tokens, int64_t choices) {
    TestTensor experts(DType::kI32, {tokens, choices});
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int> ids = {0, 1, 2, 4, 5, 6, 7};
      for (int64_t j = 0; j < choices; ++j) {
        const auto pick = ids.begin() + random_.Below(static_cast<int>(ids.size()));
        experts->data<int32_t>()[t * choices + j] = *pick;
        ids.erase(pick);
      }
    }
    const OwnedGroups groups(experts, kFirstExpert, kExperts);
    return {Of(groups.rows), Of(groups.offsets), Of(IntTensor(NotesOf(groups, kExperts)))};
  }
};

constexpr RoutingConfig kV3 = {.num_experts_per_tok = 8,
                               .n_group = 8,
                               .topk_group = 4,
                               .norm_topk_prob = true,
                               .routed_scaling_factor = 2.5f,
                               .num_shared_experts = 1};
constexpr RoutingConfig kV2 = {.num_experts_per_tok = 6,
                               .n_group = 8,
                               .topk_group = 3,
                               .scoring_func = ScoringFunc::kSoftmax,
                               .topk_method = TopkMethod::kGroupLimitedGreedy,
                               .routed_scaling_factor = 16.0f,
                               .num_shared_experts = 2};
constexpr RoutingConfig kGreedy = {.num_experts_per_tok = 3,
                                   .scoring_func = ScoringFunc::kSoftmax,
                                   .topk_method = TopkMethod::kGreedy};

TEST_F(ExpertsConformanceTest, RouteOfAllKindsAgrees) {
  RoutingConfig one_group = kV3;
  one_group.n_group = one_group.topk_group = 1;
  for (const RoutingConfig& config : {kV3, one_group, kV2, kGreedy}) {
    for (const int64_t experts : {16, 64, 160, 256}) {
      for (const int64_t tokens : {1, 7, 40}) {
        for (const DType act : kActs) {
          CheckRoute(config, tokens, experts, 100, act, kF32, 0, experts);
          CheckRoute(config, tokens, experts, 96, act, kBF16, static_cast<int>(experts) / 4,
                     experts / 2 + config.num_shared_experts);
        }
      }
    }
  }
}

// Small enough for a checker that takes a thousand times as long.
TEST_F(ExpertsConformanceTest, EachKernelOfTheRouterAgrees) {
  for (const int64_t tokens : {1, 5, 20, 70}) {
    CheckRoute(kV3, tokens, 64, 480, kBF16, kBF16, 0, 65);
  }
  CheckRoute(kV2, 5, 40, 96, kF32, kF32, 8, 20);
}

TEST_F(ExpertsConformanceTest, RouteOfDeepSeekV3sShapeAgrees) {
  for (const int64_t tokens : {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 256, 257, 600}) {
    CheckRoute(kV3, tokens, 256, 7168, kBF16, kBF16, 0, 257);
  }
  CheckRoute(kV3, 2048, 256, 7168, kBF16, kBF16, 0, 257);
  CheckRoute(kV3, 4300, 256, 512, kBF16, kBF16, 0, 257);
  CheckRoute(kV3, 300, 256, 448, kBF16, kBF16, 64, 32);
  CheckRoute(kV3, 30, 256, 7168, kBF16, kBF16, 64, 32);  // an eighth of the experts
  CheckRoute(kV2, 20, 160, 5120, kBF16, kBF16, 0, 162);
  CheckRoute(kV3, 5, 384, 7168, kBF16, kBF16, 0, 385);
}

TEST_F(ExpertsConformanceTest, ABrokenRowIsRoutedToExpertsThatExist) {
  for (const int64_t experts : {8, 256}) {
    TestTensor values = random_.Floats(kBF16, {3, 96});
    for (int64_t i = 96; i < 2 * 96; ++i) {
      SetElement(values, i, std::numeric_limits<float>::quiet_NaN());
    }
    const Twin x = Of(values), gate = Floats(kBF16, {experts, 96}), bias = Floats(kF32, {experts});
    const RoutingConfig config = {.num_experts_per_tok = 4, .n_group = 4, .topk_group = 2};
    const Routed routed = RoomForRoutes(3, experts, 4, experts);
    cpu().Route(x.cpu, gate.cpu, bias.cpu, config, 0, routed.cpu());
    gpu().Route(x.gpu, gate.gpu, bias.gpu, config, 0, routed.gpu());
    ExpectEqual(routed.experts);
    ExpectGroupsOfOwnChoices(routed, 0);
  }
}

TEST_F(ExpertsConformanceTest, TiesGoToTheLowerId) {
  const Twin x = Of(TestTensor(kBF16, {3, 96})), gate = Floats(kBF16, {256, 96});
  const Twin bias = Of(TestTensor(kF32, {256}));
  const Routed routed = RoomForRoutes(3, 256, 9, 257);
  gpu().Route(x.gpu, gate.gpu, bias.gpu, kV3, 0, routed.gpu());
  const TestTensor found = HostCopy(routed.experts.gpu);
  for (int i = 0; i < 27; ++i) {
    EXPECT_EQ(found->data<int32_t>()[i], i % 9 == 8 ? 256 : i % 9) << i;
  }
}

TEST_F(ExpertsConformanceTest, GroupedLinearAgrees) {
  constexpr int kChoices = 3;
  for (const int64_t tokens : {1, 7, 60}) {
    const TwinGroups groups = RandomGroups(tokens, kChoices);
    for (const DType x : {kF32, kBF16, kFp8}) {
      for (const DType weight : {kF32, kBF16, kFp8}) {
        if (x == kFp8 && weight != kFp8) continue;
        for (const int64_t inputs : {33, 256}) {
          for (const int per_token : {kChoices, 0}) {
            CheckGroupedLinear({x, weight, 70, inputs, per_token, 96, 64}, tokens, kChoices,
                               groups);
          }
        }
      }
    }
  }
}

// W8A8 on tensor cores, as far as there are kernels for this device: chunks of 16 to 128 rows.
TEST_F(ExpertsConformanceTest, Fp8GroupedLinearAgrees) {
  constexpr int kChoices = 3;
  for (const int64_t tokens : {1, 7, 20, 35, 70, 200}) {
    const TwinGroups groups = RandomGroups(tokens, kChoices);
    CheckGroupedLinear({kFp8, kFp8, 512, 1024, kChoices}, tokens, kChoices, groups);
    CheckGroupedLinear({kFp8, kFp8, 384, 256, 0}, tokens, kChoices, groups);
  }
}

TEST_F(ExpertsConformanceTest, SwiGluOfSortedRowsAgrees) {
  for (const DType act : kActs) {
    const TwinGroups groups = RandomGroups(30, 3);
    const ExpertGroups on_cpu = groups.cpu(), on_gpu = groups.gpu();
    const Twin gate_up = Floats(act, {90, 512}), out = Floats(act, {90, 256});
    cpu().SwiGlu(gate_up.cpu, &on_cpu, out.cpu);
    gpu().SwiGlu(gate_up.gpu, &on_gpu, out.gpu);
    ExpectWithinUnits(out, 6);  // exp, and five roundings around it
  }
}

// Fewer kernels where there are such. Of one token they round less: apart, each expert's row is
// rounded to bf16 (2⁻⁹ of it) before the sum is.
TEST_F(ExpertsConformanceTest, DownAndCombineIsItsPartsTheOneAfterTheOther) {
  constexpr int kChoices = 3;
  for (const int64_t tokens : {1, 7, 70}) {
    for (const int64_t inputs : {128, 256, 512}) {
      SCOPED_TRACE(absl::StrCat(tokens, " tokens, ", inputs, " inputs"));
      const int64_t rows = tokens * kChoices, size = 384;
      const TwinGroups groups = RandomGroups(tokens, kChoices);
      const Routes routes = {{}, {}, Floats(kF32, {tokens, kChoices}).gpu, groups.gpu()};
      const Tensor gate_up = Floats(kBF16, {rows, 2 * inputs}, 3.0f).gpu;
      const Weight weight = RandomWeight(kFp8, kExperts, size, inputs, 0, 0).gpu;
      const ExpertRoom room = {Quantized(rows, inputs).gpu(), Floats(kBF16, {rows, size}).gpu};
      const Tensor apart = Floats(kBF16, {tokens, size}).gpu;
      const Tensor together = Floats(kBF16, {tokens, size}).gpu;
      gpu().DownAndCombine(gate_up, routes, weight, /*accumulate=*/false, room, together);
      gpu().SwiGlu(gate_up, &routes.groups, room.activated);
      gpu().GroupedLinear(room.activated, routes.groups, weight, /*num_choices=*/0, room.y);
      gpu().CombineExperts(room.y, routes, /*accumulate=*/false, apart);
      const std::vector<double> expected = OnHost(apart), found = OnHost(together);
      if (tokens > 1) {
        EXPECT_EQ(found, expected);
        continue;
      }
      const std::vector<double> y = OnHost(room.y), shares = OnHost(routes.weights);
      const std::vector<double> choices = OnHost(routes.groups.rows);
      const auto num_rows = static_cast<int64_t>(OnHost(routes.groups.offsets)[kExperts]);
      std::vector<double> terms(found.size(), 0.0);
      for (int64_t row = 0; row < num_rows; ++row) {
        const double share = shares[static_cast<size_t>(choices[row])];
        for (int64_t i = 0; i < size; ++i) terms[i] += std::abs(share * y[row * size + i]);
      }
      double difference = 0.0, norm = 0.0;
      for (size_t i = 0; i < found.size(); ++i) {
        difference += std::pow(found[i] - expected[i], 2);
        norm += terms[i] * terms[i];
      }
      EXPECT_LE(std::sqrt(difference), 3 * 0x1p-9 * std::sqrt(norm));
    }
  }
}

TEST_F(ExpertsConformanceTest, CombineExpertsAgrees) {
  for (const int64_t tokens : {1, 7, 60}) {
    for (const DType act : kActs) {
      for (const int64_t size : {300, 7168}) {
        for (const bool accumulate : {false, true}) {
          constexpr int64_t kChoices = 3;
          const TwinGroups groups = RandomGroups(tokens, kChoices);
          const Twin y = Floats(act, {tokens * kChoices, size});
          const Twin weights = Floats(kF32, {tokens, kChoices});
          const Twin out = Strided(act, tokens, size, 16);
          const TestTensor magnitudes = AbsoluteRows(out.cpu);
          const auto routes = [](const Tensor& shares, const ExpertGroups& sorted) {
            return Routes{{}, {}, shares, sorted};
          };
          cpu().CombineExperts(AbsoluteRows(y.cpu),
                               routes(Absolute(weights.cpu, {tokens, kChoices}), groups.cpu()),
                               accumulate, magnitudes);
          cpu().CombineExperts(y.cpu, routes(weights.cpu, groups.cpu()), accumulate, out.cpu);
          gpu().CombineExperts(y.gpu, routes(weights.gpu, groups.gpu()), accumulate, out.gpu);
          ExpectSums(out, kChoices + 1, magnitudes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fathom
