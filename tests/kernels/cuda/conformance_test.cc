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
#include <limits>
#include <numeric>
#include <set>
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
  // A weight of `experts` matrices, or a plain one for 0, as a slice of a larger one.
  TwinWeight RandomWeight(DType dtype, int64_t experts, int64_t outputs, int64_t inputs,
                          int row_offset, int column_offset) {
    const bool is_stack = experts > 0;
    const float deviation = dtype == kFp8 ? 0.02f : 1.0f;
    const Twin values = is_stack ? Floats(dtype, {experts, outputs, inputs}, deviation)
                                 : Floats(dtype, {outputs, inputs}, deviation);
    TwinWeight weight = {{.values = values.cpu}, {.values = values.gpu}};
    if (dtype != kFp8) return weight;
    const int64_t block_rows = (outputs + row_offset) / kFp8Block + 2;
    const int64_t block_columns = (inputs + column_offset) / kFp8Block + 2;
    const Twin factors = is_stack ? Floats(kF32, {experts, block_rows, block_columns})
                                  : Floats(kF32, {block_rows, block_columns});
    for (Weight* side : {&weight.cpu, &weight.gpu}) {
      side->scale_inv = side == &weight.cpu ? factors.cpu : factors.gpu;
      side->row_offset = row_offset;
      side->column_offset = column_offset;
    }
    return weight;
  }

  struct AbsoluteWeight {
    TestTensor values, scale_inv;
    Weight weight;
  };
  static AbsoluteWeight AbsoluteOf(const Weight& weight) {
    const auto absolute = [](const Tensor& tensor) {
      return tensor.rank() == 3 ? Absolute(tensor, {tensor.dim(0), tensor.dim(1), tensor.dim(2)})
                                : Absolute(tensor, {tensor.dim(0), tensor.dim(1)});
    };
    const bool is_fp8 = weight.scale_inv.present();
    AbsoluteWeight result = {absolute(weight.values),
                             is_fp8 ? absolute(weight.scale_inv) : TestTensor(kF32, {1, 1}),
                             {}};
    result.weight = weight;
    result.weight.values = result.values;
    if (is_fp8) result.weight.scale_inv = result.scale_inv;
    return result;
  }
  // Absolute values of a tensor of rank 2 whose rows may be strided.
  static TestTensor AbsoluteRows(const Tensor& tensor) {
    TestTensor absolute(kF32, {tensor.dim(0), tensor.dim(1)});
    for (int64_t i = 0; i < tensor.num_elements(); ++i) {
      const double value = At(tensor, i / tensor.dim(1), i % tensor.dim(1));
      SetElement(absolute, i, std::abs(static_cast<float>(value)));
    }
    return absolute;
  }

  // `magnitudes`: Σ |product| of each element of `out`, dense.
  void ExpectSums(const Twin& out, int64_t inputs, const Tensor& magnitudes) {
    const double relative = 2 * static_cast<double>(inputs + 2) * kFloatRoundoff;
    const double own = OwnRounding(out.cpu.dtype());
    ExpectWithin(out, [&](int64_t i, double value) {
      const double error = relative * ElementAt(magnitudes, i);
      return error + own * (std::abs(value) + error);
    });
  }

  struct LinearCase {
    int64_t rows, outputs, inputs;
    int64_t gap = 0;
    int row_offset = 0, column_offset = 0;
  };
  void CheckLinear(const LinearCase& c, DType x_type, DType weight_type, DType out_type) {
    SCOPED_TRACE(absl::StrCat(c.rows, " x ", c.outputs, " x ", c.inputs, " gap ", c.gap, " ",
                              NameOf(x_type), " ", NameOf(weight_type), " ", NameOf(out_type)));
    const Twin x = Strided(x_type, c.rows, c.inputs, c.gap);
    const TwinWeight weight =
        RandomWeight(weight_type, 0, c.outputs, c.inputs, c.row_offset, c.column_offset);
    const Twin whole = Floats(out_type, {c.rows, c.outputs + c.gap});
    const Twin out = whole.Slice(1, 0, c.outputs);
    cpu().Linear(x.cpu, weight.cpu, out.cpu);
    gpu().Linear(x.gpu, weight.gpu, out.gpu);
    const TestTensor magnitudes(kF32, {c.rows, c.outputs});
    cpu().Linear(AbsoluteRows(x.cpu), AbsoluteOf(weight.cpu).weight, magnitudes);
    ExpectSums(out, c.inputs, magnitudes);
    ExpectEqual(whole.Slice(1, c.outputs, c.outputs + c.gap));
  }

  // Choices of experts [0, 8), of which 2 to 6 are this rank's and 3 is nobody's choice.
  Twin Choices(int64_t tokens, int64_t choices) {
    TestTensor experts(DType::kI32, {tokens, choices});
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int> ids = {0, 1, 2, 4, 5, 6, 7};
      for (int64_t j = 0; j < choices; ++j) {
        const auto pick = ids.begin() + random_.Below(static_cast<int>(ids.size()));
        experts->data<int32_t>()[t * choices + j] = *pick;
        ids.erase(pick);
      }
    }
    return Of(experts);
  }
  static constexpr int kFirstExpert = 2;
  static constexpr int64_t kExperts = 5;
  TwinGroups Group(const Twin& experts) {
    const TwinGroups groups = {Ints({experts.cpu.num_elements()}, 99), Ints({kExperts + 1}, 99)};
    cpu().GroupByExpert(experts.cpu, kFirstExpert, groups.cpu());
    gpu().GroupByExpert(experts.gpu, kFirstExpert, groups.gpu());
    return groups;
  }
};

TEST_F(ConformanceTest, EmbedAgrees) {
  for (const DType stored : kActs) {
    for (const DType act : kActs) {
      const Twin ids = Of(IntTensor({17, 4, 5, 99, 0, 12, 13}));
      const Twin table = Floats(stored, {8, 300});
      const Twin out = Strided(act, 7, 300, 5);
      cpu().Embed(ids.cpu, table.cpu, 5, out.cpu);
      gpu().Embed(ids.gpu, table.gpu, 5, out.gpu);
      ExpectEqual(out);
    }
  }
}

TEST_F(ConformanceTest, RmsNormAgrees) {
  for (const DType act : kActs) {
    for (const DType gain_type : kActs) {
      for (const int64_t size : {1, 31, 576, 7168}) {
        const Twin x = Strided(act, 7, size, 9), gain = Floats(gain_type, {size});
        const Twin out = Strided(act, 7, size, 4);
        cpu().RmsNorm(x.cpu, gain.cpu, 1e-6f, out.cpu);
        gpu().RmsNorm(x.gpu, gain.gpu, 1e-6f, out.gpu);
        // Half of the sum's relative error, and seven roundings around it.
        ExpectWithinUnits(out, static_cast<double>(size) / 2 + 7);
        gpu().RmsNorm(x.gpu, gain.gpu, 1e-6f, x.gpu);
        ExpectWithinUnits({out.cpu, x.gpu}, static_cast<double>(size) / 2 + 7);
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
}

TEST_F(ConformanceTest, LinearOfDeepSeekV3ShapesAgrees) {
  CheckLinear({1, 512, 7168}, kBF16, kFp8, kBF16);
  CheckLinear({7, 256, 7168}, kBF16, kBF16, kF32);
  CheckLinear({100, 576, 2048}, kBF16, kFp8, kBF16);
}

TEST_F(ConformanceTest, LinearOfRandomShapesAgrees) {
  for (int i = 0; i < 40; ++i) {
    const LinearCase c = {1 + random_.Below(90), 1 + random_.Below(150), 1 + random_.Below(500),
                          random_.Below(4) * 8,  random_.Below(128),     random_.Below(128)};
    const DType weight_types[] = {kF32, kBF16, kFp8};
    CheckLinear(c, kActs[random_.Below(2)], weight_types[random_.Below(3)],
                kActs[random_.Below(2)]);
  }
}

TEST_F(ConformanceTest, HeadLinearAgrees) {
  for (const DType act : kActs) {
    for (const DType stored : kActs) {
      for (const int64_t tokens : {1, 7, 40}) {
        constexpr int64_t kHeads = 5, kInputs = 24, kRest = 8, kOutputs = 70;
        const Twin q = Floats(act, {tokens, kHeads * (kInputs + kRest)});
        const Twin x = q.SplitLast(kHeads, kInputs + kRest).Slice(2, 0, kInputs);
        const Twin weight = Floats(stored, {kHeads, kOutputs, kInputs});
        const Twin out = Floats(act, {tokens, kHeads, kOutputs});
        cpu().HeadLinear(x.cpu, weight.cpu, out.cpu);
        gpu().HeadLinear(x.gpu, weight.gpu, out.gpu);
        const TestTensor q_sizes = AbsoluteRows(q.cpu);
        const TestTensor magnitudes(kF32, {tokens, kHeads, kOutputs});
        cpu().HeadLinear(q_sizes->SplitLast(kHeads, kInputs + kRest).Slice(2, 0, kInputs),
                         Absolute(weight.cpu, {kHeads, kOutputs, kInputs}), magnitudes);
        ExpectSums(out, kInputs, magnitudes);
      }
    }
  }
}

TEST_F(ConformanceTest, RotaryEmbedAgrees) {
  for (const DType act : kActs) {
    constexpr int64_t kTokens = 7, kHeads = 3, kNope = 10, kRope = 64;
    const Twin q = Floats(act, {kTokens, kHeads * (kNope + kRope)});
    const Twin x = q.SplitLast(kHeads, kNope + kRope).Slice(2, kNope, kNope + kRope);
    const Twin positions = Ints({kTokens}, 50), cos_sin = Floats(kF32, {50, kRope / 2, 2});
    const double largest = 6.0 * 6.0;  // of either product: six standard deviations
    cpu().RotaryEmbed(x.cpu, positions.cpu, cos_sin.cpu);
    gpu().RotaryEmbed(x.gpu, positions.gpu, cos_sin.gpu);
    const double own = OwnRounding(act);
    ExpectWithin(q, [&](int64_t, double value) {
      return 2 * 3 * kFloatRoundoff * largest + own * std::abs(value);
    });
  }
}

TEST_F(ConformanceTest, StoreKvAgrees) {
  for (const DType act : kActs) {
    for (const DType stored : kActs) {
      const Twin kv = Floats(act, {7, 576});
      const Twin cache = Floats(stored, {5, 16, 576});
      const Twin places = Of(IntTensor({79, 0, 16, 17, 15, 3, 40}));
      const Twin latent = kv.Slice(1, 0, 512), rope = kv.Slice(1, 512, 576);
      cpu().StoreKv(latent.cpu, rope.cpu, places.cpu, cache.cpu);
      gpu().StoreKv(latent.gpu, rope.gpu, places.gpu, cache.gpu);
      ExpectEqual(cache);
    }
  }
}

TEST_F(ConformanceTest, RouteExpertsAgrees) {
  const RoutingConfig kV3 = {.num_experts_per_tok = 8,
                             .n_group = 8,
                             .topk_group = 4,
                             .norm_topk_prob = true,
                             .routed_scaling_factor = 2.5f};
  RoutingConfig one_group = kV3;
  one_group.n_group = one_group.topk_group = 1;
  const RoutingConfig kV2 = {.num_experts_per_tok = 6,
                             .n_group = 8,
                             .topk_group = 3,
                             .scoring_func = ScoringFunc::kSoftmax,
                             .topk_method = TopkMethod::kGroupLimitedGreedy,
                             .routed_scaling_factor = 16.0f};
  const RoutingConfig kGreedy = {.num_experts_per_tok = 3,
                                 .scoring_func = ScoringFunc::kSoftmax,
                                 .topk_method = TopkMethod::kGreedy};
  for (const RoutingConfig& config : {kV3, one_group, kV2, kGreedy}) {
    for (const int64_t experts : {16, 256}) {
      for (const int64_t tokens : {1, 7, 130}) {
        const Twin logits = Strided(kF32, tokens, experts, 3), bias = Floats(kF32, {experts}, 0.1f);
        const int64_t k = config.num_experts_per_tok;
        const Twin ids = Ints({tokens, k}, 5), weights = Floats(kF32, {tokens, k});
        cpu().RouteExperts(logits.cpu, bias.cpu, config, ids.cpu, weights.cpu);
        gpu().RouteExperts(logits.gpu, bias.gpu, config, ids.gpu, weights.gpu);
        ExpectEqual(ids);
        // The sums of the scores: of the chosen ones, or of all; and eight roundings around them.
        const bool is_softmax = config.scoring_func == ScoringFunc::kSoftmax;
        ExpectWithinUnits(weights, static_cast<double>(is_softmax ? experts : k) + 8);
      }
    }
  }
}

TEST_F(ConformanceTest, ABrokenRowIsRoutedToExpertsThatExist) {
  TestTensor values = random_.Floats(kF32, {3, 8});
  std::fill_n(values->data<float>() + 8, 8, std::numeric_limits<float>::quiet_NaN());
  const Twin logits = Of(values), bias = Floats(kF32, {8}), ids = Ints({3, 4}, 1);
  const Twin weights = Floats(kF32, {3, 4});
  const RoutingConfig config = {.num_experts_per_tok = 4, .n_group = 4, .topk_group = 2};
  cpu().RouteExperts(logits.cpu, bias.cpu, config, ids.cpu, weights.cpu);
  gpu().RouteExperts(logits.gpu, bias.gpu, config, ids.gpu, weights.gpu);
  ExpectEqual(ids);
  ExpectWithinUnits(weights, 12);
}

TEST_F(ConformanceTest, GroupByExpertAgrees) {
  for (const int64_t tokens : {1, 7, 300}) {
    const TwinGroups groups = Group(Choices(tokens, 3));
    ExpectEqual(groups.offsets);
    ExpectEqual(groups.rows);
  }
}

TEST_F(ConformanceTest, GroupedLinearAgrees) {
  constexpr int64_t kChoices = 3, kOutputs = 70;
  for (const int64_t tokens : {1, 7, 60}) {
    const TwinGroups groups = Group(Choices(tokens, kChoices));
    const int64_t rows = tokens * kChoices;
    for (const DType act : kActs) {
      for (const DType stored : {kF32, kBF16, kFp8}) {
        for (const int64_t inputs : {33, 256}) {
          for (const int per_token : {static_cast<int>(kChoices), 0}) {
            SCOPED_TRACE(absl::StrCat(tokens, " tokens, ", inputs, " inputs, ", NameOf(act), " ",
                                      NameOf(stored), " ", per_token));
            const Twin x = Strided(act, per_token > 0 ? tokens : rows, inputs, 8);
            const TwinWeight weight = RandomWeight(stored, kExperts, kOutputs, inputs, 96, 64);
            const Twin out = Strided(act, rows, kOutputs, 2);  // rows of others stay as they are
            cpu().GroupedLinear(x.cpu, groups.cpu(), weight.cpu, per_token, out.cpu);
            gpu().GroupedLinear(x.gpu, groups.gpu(), weight.gpu, per_token, out.gpu);
            const TestTensor magnitudes(kF32, {rows, kOutputs});
            cpu().GroupedLinear(AbsoluteRows(x.cpu), groups.cpu(), AbsoluteOf(weight.cpu).weight,
                                per_token, magnitudes);
            ExpectSums(out, inputs, magnitudes);
          }
        }
      }
    }
  }
}

TEST_F(ConformanceTest, CombineExpertsAgrees) {
  for (const int64_t tokens : {1, 7, 60}) {
    for (const DType act : kActs) {
      constexpr int64_t kChoices = 3, kSize = 300;
      const TwinGroups groups = Group(Choices(tokens, kChoices));
      const Twin y = Floats(act, {tokens * kChoices, kSize});
      const Twin weights = Floats(kF32, {tokens, kChoices});
      const Twin out = Floats(act, {tokens, kSize});
      const TestTensor magnitudes = Absolute(out.cpu, {tokens, kSize});
      cpu().CombineExperts(Absolute(y.cpu, {tokens * kChoices, kSize}), groups.cpu(),
                           Absolute(weights.cpu, {tokens, kChoices}), magnitudes);
      cpu().CombineExperts(y.cpu, groups.cpu(), weights.cpu, out.cpu);
      gpu().CombineExperts(y.gpu, groups.gpu(), weights.gpu, out.gpu);
      ExpectSums(out, kChoices + 1, magnitudes);
    }
  }
}

TEST_F(ConformanceTest, SwiGluAddClearAndGatherRowsAgree) {
  for (const DType act : kActs) {
    const Twin gate_up = Strided(act, 7, 600, 4), activated = Strided(act, 7, 300, 2);
    cpu().SwiGlu(gate_up.cpu, activated.cpu);
    gpu().SwiGlu(gate_up.gpu, activated.gpu);
    ExpectWithinUnits(activated, 6);  // exp, and five roundings around it

    const Twin x = Strided(act, 7, 300, 2), y = Strided(act, 7, 300, 6);
    cpu().Add(x.cpu, y.cpu);
    gpu().Add(x.gpu, y.gpu);
    ExpectEqual(x);

    const Twin rows = Of(IntTensor({6, 0, 3, 3})), gathered = Floats(act, {4, 300});
    cpu().GatherRows(x.cpu, rows.cpu, gathered.cpu);
    gpu().GatherRows(x.gpu, rows.gpu, gathered.gpu);
    ExpectEqual(gathered);

    const Twin whole = Floats(act, {7, 50}), cleared = whole.Slice(1, 10, 31);
    cpu().Clear(cleared.cpu);
    gpu().Clear(cleared.gpu);
    ExpectEqual(whole);
  }
}

TEST_F(ConformanceTest, QuantizeFp8AndBackGivesTheSameBits) {
  for (const DType stored : kActs) {
    for (const auto& [rows, columns] :
         {std::pair<int64_t, int64_t>{1, 1}, {130, 257}, {256, 128}}) {
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
        const Twin out = Strided(out_type, rows, columns, 3);
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

// A step of attention: sequences of which some tokens are in the cache and the last ones are asked
// for, in blocks scattered over the cache.
class AttentionConformanceTest : public ConformanceTest {
 protected:
  struct Shape {
    DType act, cache;
    int64_t heads, kv_lora_rank, rope_dim;
    int block_size;
  };
  struct Length {
    int context, tokens;
  };
  struct Step {
    Twin q_latent, q_rope, cache, block_tables, query_start, context_lens, out;
    AttentionBatch cpu, gpu;
  };

  Step Attend(const Shape& shape, const std::vector<Length>& lengths) {
    int tokens = 0, most_blocks = 0, num_blocks = 3;
    std::vector<int32_t> starts = {0}, lens;
    for (const Length& length : lengths) {
      const int blocks = (length.context + shape.block_size - 1) / shape.block_size;
      most_blocks = std::max(most_blocks, blocks);
      num_blocks += blocks;
      starts.push_back(tokens += length.tokens);
      lens.push_back(length.context);
    }
    std::vector<int32_t> ids(num_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    for (int i = num_blocks - 1; i > 0; --i) std::swap(ids[i], ids[random_.Below(i + 1)]);
    const auto sequences = static_cast<int64_t>(lengths.size());
    TestTensor tables(DType::kI32, {sequences, most_blocks});
    for (int64_t s = 0, next = 0; s < sequences; ++s) {
      for (int b = 0; b * shape.block_size < lengths[s].context; ++b) {
        tables->data<int32_t>()[s * most_blocks + b] = ids[next++];
      }
    }

    const int64_t nope = 8;  // the rotated part of a query stands behind another one
    Step step;
    step.q_latent = Floats(shape.act, {tokens, shape.heads, shape.kv_lora_rank});
    step.q_rope = Floats(shape.act, {tokens, shape.heads * (nope + shape.rope_dim)})
                      .SplitLast(shape.heads, nope + shape.rope_dim)
                      .Slice(2, nope, nope + shape.rope_dim);
    step.cache =
        Floats(shape.cache, {num_blocks, shape.block_size, shape.kv_lora_rank + shape.rope_dim});
    step.block_tables = Of(tables);
    step.query_start = Of(IntTensor(starts));
    step.context_lens = Of(IntTensor(lens));
    step.out = Floats(shape.act, {tokens, shape.heads, shape.kv_lora_rank});
    step.cpu = {step.block_tables.cpu, step.query_start.cpu, step.context_lens.cpu,
                shape.block_size};
    step.gpu = {step.block_tables.gpu, step.query_start.gpu, step.context_lens.gpu,
                shape.block_size};
    scale_ = 1.0f / std::sqrt(static_cast<float>(shape.kv_lora_rank + shape.rope_dim));
    cpu().MlaAttention(step.q_latent.cpu, step.q_rope.cpu, step.cache.cpu, step.cpu, scale_,
                       step.out.cpu);
    gpu().MlaAttention(step.q_latent.gpu, step.q_rope.gpu, step.cache.gpu, step.gpu, scale_,
                       step.out.gpu);
    return step;
  }

  // Every few tokens and heads, within twice what ReferenceAttention grants to one side.
  void ExpectAllClose(const Step& step, const std::vector<Length>& lengths) {
    const std::vector<double> found = OnHost(step.out.gpu);
    const int64_t heads = step.out.cpu.dim(1), rank = step.out.cpu.dim(2);
    const double own = OwnRounding(step.out.cpu.dtype());
    int64_t token = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const int32_t* table = step.block_tables.cpu.data<int32_t>() +
                             static_cast<int64_t>(s) * step.block_tables.cpu.dim(1);
      for (int t = 0; t < lengths[s].tokens; ++t, ++token) {
        if (t % 3 != 0 && t != lengths[s].tokens - 1) continue;
        for (int64_t a = token % 2; a < heads; a += 5) {
          const std::vector<Bounded> reference = ReferenceAttention(
              step.q_latent.cpu[token][a], step.q_rope.cpu[token][a], step.cache.cpu, table,
              lengths[s].context - lengths[s].tokens + t + 1, scale_);
          for (int64_t i = 0; i < rank; ++i) {
            const double expected = At(step.out.cpu[token], a, i);
            const double error = 2 * reference[i].error + own * std::abs(expected);
            ASSERT_NEAR(found[(token * heads + a) * rank + i], expected, error)
                << "sequence " << s << " token " << t << " head " << a << " element " << i;
          }
        }
      }
    }
  }

  float scale_ = 0.0f;
};

TEST_F(AttentionConformanceTest, AttentionOfAllTypesAndBlockSizesAgrees) {
  const std::vector<Length> lengths = {{1, 1}, {70, 7}, {133, 1}, {65, 65}, {31, 1}};
  for (const int block_size : {1, 16, 64, 128}) {
    for (const DType act : kActs) {
      for (const DType cache : kActs) {
        SCOPED_TRACE(absl::StrCat(block_size, " ", NameOf(act), " ", NameOf(cache)));
        ExpectAllClose(Attend({act, cache, 11, 36, 10, block_size}, lengths), lengths);
      }
    }
  }
}

TEST_F(AttentionConformanceTest, AttentionOfDeepSeekV3sShapeAgrees) {
  const std::vector<Length> lengths = {{7, 7}, {150, 2}};
  ExpectAllClose(Attend({kBF16, kBF16, 16, 512, 64, 64}, lengths), lengths);
  ExpectAllClose(Attend({kF32, kF32, 16, 512, 64, 16}, lengths), lengths);
}

// On Hopper these are MlaDecodeSm90's, which rounds probabilities to BF16: its own test derives
// 3.2e-3 of the output's norm; the CPU's rounding of the output adds 2^-9 / sqrt(3) = 1.1e-3.
TEST_F(AttentionConformanceTest, DecodingInDeepSeekV3sShapeAgrees) {
  std::vector<Length> lengths;
  for (const int context : {1, 15, 63, 64, 65, 128, 200, 700, 1500})
    lengths.push_back({context, 1});
  const Step step = Attend({kBF16, kBF16, 16, 512, 64, 64}, lengths);
  const std::vector<double> found = OnHost(step.out.gpu);
  for (size_t s = 0; s < lengths.size(); ++s) {
    double difference = 0.0, norm = 0.0;
    const int64_t size = 16 * 512;
    for (int64_t i = 0; i < size; ++i) {
      const auto place = static_cast<int64_t>(s) * size + i;
      const double expected = ElementAt(step.out.cpu, place);
      difference += (found[place] - expected) * (found[place] - expected);
      norm += expected * expected;
    }
    EXPECT_LT(std::sqrt(difference / norm), 4.3e-3) << "context " << lengths[s].context;
  }
}

TEST_F(AttentionConformanceTest, TheSameStepGivesTheSameBits) {
  const std::vector<Length> lengths = {{70, 7}, {133, 1}, {40, 40}};
  const Step step = Attend({kBF16, kBF16, 16, 512, 64, 16}, lengths);
  const std::vector<double> first = OnHost(step.out.gpu);
  gpu().MlaAttention(step.q_latent.gpu, step.q_rope.gpu, step.cache.gpu, step.gpu, scale_,
                     step.out.gpu);
  EXPECT_EQ(OnHost(step.out.gpu), first);
}

}  // namespace
}  // namespace fathom
