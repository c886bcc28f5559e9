// Attention and the cache on the GPU against the CPU's.
//
// Attention rounds to act in between (the query in the latent space, what it gathers, the output;
// on Hopper also the probabilities), so one rounding more or less upstream moves everything behind
// it by a unit. What is compared is the Euclidean norm of each token's difference. Each of up to
// five roundings on either side adds an independent relative error of at most 2^-9 / sqrt(3) =
// 1.1e-3 in BF16, together sqrt(10) times that, 3.6e-3; twice that is allowed. In F32 sums of up to
// 512 products with signs err by far less than 512 * 2^-24 = 3e-5.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
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

int64_t CacheWidth(DType dtype, int64_t kv_lora_rank, int64_t rope_dim) {
  const int64_t groups = (kv_lora_rank + kFp8Block - 1) / kFp8Block;
  return dtype == kFp8 ? kv_lora_rank + 4 * groups + 2 * rope_dim : kv_lora_rank + rope_dim;
}

class StoreLatentsConformanceTest : public TwinTest {
 protected:
  void Check(int64_t q_size, int64_t kv_size, int64_t key_size, int64_t gap, DType act) {
    SCOPED_TRACE(absl::StrCat(q_size, " + ", kv_size, " + ", key_size, " ", NameOf(act)));
    constexpr int64_t kTokens = 7, kPlaces = 40;
    const Twin qkv_a = Strided(act, kTokens, q_size + kv_size + key_size, gap);
    const Twin q_norm = q_size > 0 ? Floats(kF32, {q_size}) : Twin();
    const Twin kv_norm = Floats(kF32, {kv_size});
    const Twin positions = Ints({kTokens}, 50), cos_sin = Floats(kF32, {50, key_size / 2, 2});
    const Twin places = Of(IntTensor({39, 0, 16, 17, 15, 3, 31}));
    const Twin q_a = q_size > 0 ? Strided(act, kTokens, q_size, gap) : Twin();
    const auto store = [&](Ops& ops, bool on_gpu, const LinearInput& out, const Tensor& cache) {
      const auto side = [&](const Twin& twin) { return on_gpu ? twin.gpu : twin.cpu; };
      ops.StoreLatents(side(qkv_a), side(q_norm), side(kv_norm), 1e-6f, side(positions),
                       side(cos_sin), side(places), out, cache);
    };

    const double units = static_cast<double>(std::max(q_size, kv_size)) / 2 + 7;
    for (const DType stored : kActs) {
      const Twin cache = Floats(stored, {5, kPlaces / 5, kv_size + key_size});
      store(cpu(), false, q_a.cpu, cache.cpu);
      store(gpu(), true, q_a.gpu, cache.gpu);
      if (q_size > 0) ExpectWithinUnits(q_a, units);
      const double own = OwnRounding(act) + OwnRounding(stored);
      const double largest = 6.0 * 6.0;  // of a product in the rotation: six standard deviations
      ExpectWithin(cache, [&](int64_t i, double value) {
        const double turned = i % (kv_size + key_size) < kv_size ? 0.0 : 6 * largest;
        return (2 * units * std::abs(value) + turned) * kFloatRoundoff + own * std::abs(value);
      });
    }

    // An FP8 cache holds what one in act holds, quantised; the key in BF16.
    const Twin exact = Of(TestTensor(act, {5, kPlaces / 5, kv_size + key_size}));
    const int64_t bytes = CacheWidth(kFp8, kv_size, key_size);
    const Twin cache = Of(TestTensor(kFp8, {5, kPlaces / 5, bytes}));
    const TwinInput quantized = q_size > 0 ? Quantized(kTokens, q_size) : TwinInput(Twin());
    store(gpu(), true, q_a.gpu, exact.gpu);
    store(gpu(), true, quantized.gpu(), cache.gpu);
    if (q_size > 0) ExpectQuantizedOf(quantized.gpu(), q_a.gpu);
    ExpectCacheOf(cache.gpu.Reshape({kPlaces, bytes}),
                  exact.gpu.Reshape({kPlaces, kv_size + key_size}), kv_size);
  }

 private:
  void ExpectCacheOf(const Tensor& cache, const Tensor& exact, int64_t kv_size) {
    const TestTensor found = HostCopy(cache), rows = HostCopy(exact);
    const int64_t factors = (kv_size + kFp8Block - 1) / kFp8Block;
    for (const int64_t place : {39, 0, 16, 17, 15, 3, 31}) {
      const QuantizedRow expected = ReferenceQuantize(rows->Slice(1, 0, kv_size), place);
      const char* row = found->data<char>() + place * found->dim(1);
      ASSERT_EQ(std::memcmp(row, expected.codes.data(), kv_size), 0) << place;
      ASSERT_EQ(std::memcmp(row + kv_size, expected.factors.data(), factors * 4), 0) << place;
      for (int64_t i = kv_size; i < rows->dim(1); ++i) {
        BFloat16 key;
        std::memcpy(&key, row + kv_size + factors * 4 + (i - kv_size) * 2, 2);
        ASSERT_EQ(key.bits, ToBFloat16(static_cast<float>(At(rows, place, i))).bits)
            << "place " << place << " element " << i;
      }
    }
  }
};

TEST_F(StoreLatentsConformanceTest, StoreLatentsAgrees) {
  for (const DType act : kActs) {
    Check(1536, 512, 64, 0, act);
    Check(0, 512, 64, 16, act);
    Check(1000, 264, 72, 8, act);
    Check(33, 130, 6, 5, act);
    Check(0, 31, 2, 0, act);
  }
}

// A step of attention: sequences of which some tokens are in the cache and the last ones are asked
// for, in blocks scattered over the cache.
class AttentionConformanceTest : public TwinTest {
 protected:
  struct Shape {
    DType act, cache;
    int64_t heads, kv_lora_rank, nope_dim, rope_dim, v_dim;
    int block_size;
  };
  struct Length {
    int context, tokens;
  };
  struct Step {
    Twin q, w_uk, w_uv, positions, cos_sin, cache, block_tables, query_start, context_lens;
    std::vector<int32_t> starts, lens;
    int block_size;
    float scale;

    AttentionBatch Batch(bool on_gpu) const {
      const auto side = [&](const Twin& twin) { return on_gpu ? twin.gpu : twin.cpu; };
      return {side(block_tables), side(query_start), side(context_lens),
              block_size,         starts.data(),     lens.data()};
    }
  };
  static constexpr Shape V3(DType act, DType cache, int block_size = 64) {
    return {act, cache, 16, 512, 128, 64, 128, block_size};
  }

  Step MakeStep(const Shape& shape, const std::vector<Length>& lengths) {
    Step step;
    int most_blocks = 0, num_blocks = 3;
    std::vector<int32_t> positions;
    step.starts = {0};
    for (const Length& length : lengths) {
      const int blocks = (length.context + shape.block_size - 1) / shape.block_size;
      most_blocks = std::max(most_blocks, blocks);
      num_blocks += blocks;
      step.starts.push_back(step.starts.back() + length.tokens);
      step.lens.push_back(length.context);
      for (int t = length.tokens; t > 0; --t) positions.push_back(length.context - t);
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
    const int64_t tokens = step.starts.back();
    const int64_t width = shape.nope_dim + shape.rope_dim;
    step.q = Floats(shape.act, {tokens, shape.heads * width}).SplitLast(shape.heads, width);
    step.w_uk = Floats(shape.act, {shape.heads, shape.kv_lora_rank, shape.nope_dim}, 0.1f);
    step.w_uv = Floats(shape.act, {shape.heads, shape.v_dim, shape.kv_lora_rank}, 0.1f);
    step.positions = Of(IntTensor(positions));
    const int32_t last = *std::max_element(positions.begin(), positions.end());
    step.cos_sin = Floats(kF32, {last + 1, shape.rope_dim / 2, 2}, 0.7f);
    step.cache = Cache(shape, num_blocks);
    step.block_tables = Of(tables);
    step.query_start = Of(IntTensor(step.starts));
    step.context_lens = Of(IntTensor(step.lens));
    step.block_size = shape.block_size;
    step.scale = 1.0f / std::sqrt(static_cast<float>(width));
    return step;
  }

  void Attend(Ops& ops, bool on_gpu, const Step& step, const LinearInput& out) {
    const auto side = [&](const Twin& twin) { return on_gpu ? twin.gpu : twin.cpu; };
    ops.BeginStep(step.Batch(on_gpu));
    ops.MlaAttention(side(step.q), {side(step.w_uk), side(step.w_uv)}, side(step.positions),
                     side(step.cos_sin), side(step.cache), step.Batch(on_gpu), step.scale, out);
  }

  void Check(const Shape& shape, const std::vector<Length>& lengths) {
    SCOPED_TRACE(absl::StrCat(shape.heads, " heads, blocks of ", shape.block_size, " ",
                              NameOf(shape.act), " ", NameOf(shape.cache)));
    const Step step = MakeStep(shape, lengths);
    const int64_t tokens = step.starts.back(), columns = shape.heads * shape.v_dim;
    // The kernels for DeepSeek-V3's shape write rows without gaps.
    const int64_t gap = shape.kv_lora_rank == 512 ? 0 : 16;
    const Twin out = Strided(shape.act, tokens, columns, gap);
    Attend(cpu(), false, step, out.cpu);
    Attend(gpu(), true, step, out.gpu);
    ExpectRowsWithin(out, shape.act == kBF16 ? 7.2e-3 : 3e-5);

    const std::vector<double> first = OnHost(out.gpu);
    const TwinInput quantized = Quantized(tokens, columns);
    Attend(gpu(), true, step, quantized.gpu());
    ExpectQuantizedNear(quantized.gpu(), out.gpu);
    Attend(gpu(), true, step, out.gpu);
    EXPECT_EQ(OnHost(out.gpu), first);  // the same step gives the same bits
  }

 private:
  Twin Cache(const Shape& shape, int64_t num_blocks) {
    if (shape.cache != kFp8) {
      return Floats(shape.cache,
                    {num_blocks, shape.block_size, shape.kv_lora_rank + shape.rope_dim});
    }
    const int64_t rank = shape.kv_lora_rank, factors = (rank + kFp8Block - 1) / kFp8Block;
    const int64_t bytes = CacheWidth(kFp8, rank, shape.rope_dim);
    TestTensor cache(kFp8, {num_blocks, shape.block_size, bytes});
    for (int64_t place = 0; place < num_blocks * shape.block_size; ++place) {
      char* row = cache->data<char>() + place * bytes;
      for (int64_t i = 0; i < rank; ++i) {
        row[i] = static_cast<char>(ToFloat8E4M3(30.0f * random_.Normal()).bits);
      }
      for (int64_t i = 0; i < factors; ++i) {
        const float factor = (1.0f + 0.1f * random_.Normal()) / 30.0f;
        std::memcpy(row + rank + 4 * i, &factor, 4);
      }
      for (int64_t i = 0; i < shape.rope_dim; ++i) {
        const BFloat16 key = ToBFloat16(random_.Normal());
        std::memcpy(row + rank + 4 * factors + 2 * i, &key, 2);
      }
    }
    return Of(cache);
  }
};

TEST_F(AttentionConformanceTest, AttentionOfAllTypesAndBlockSizesAgrees) {
  const std::vector<Length> lengths = {{1, 1}, {70, 7}, {133, 1}, {65, 65}, {31, 1}};
  for (const int block_size : {1, 16, 64, 128}) {
    for (const DType act : kActs) {
      for (const DType cache : {kF32, kBF16, kFp8}) {
        Check({act, cache, 11, 36, 20, 10, 24, block_size}, lengths);
        Check({act, cache, 3, 132, 16, 8, 128, block_size}, lengths);
      }
    }
  }
}

// Small enough for a checker that takes a thousand times as long.
TEST_F(AttentionConformanceTest, EachKernelOfAttentionAgrees) {
  Check({kBF16, kBF16, 3, 36, 20, 10, 24, 16}, {{7, 2}, {33, 1}});
  Check({kBF16, kFp8, 3, 36, 20, 10, 24, 16}, {{7, 2}, {33, 1}});
  Check(V3(kBF16, kBF16), {{7, 7}, {80, 3}, {65, 1}});
  Check(V3(kBF16, kFp8), {{7, 7}, {80, 3}});
  for (const int sequences : {1, 8, 15, 30, 60, 70}) {  // clusters of each size
    Check(V3(kBF16, kBF16), std::vector<Length>(sequences, {50, 1}));
    Check(V3(kBF16, kFp8), std::vector<Length>(sequences, {50, 1}));
  }
  Check(V3(kBF16, kBF16), {{12000, 1}});  // shared by several clusters
}

TEST_F(AttentionConformanceTest, AttentionOfDeepSeekV3sShapeAgrees) {
  const std::vector<Length> lengths = {{7, 7}, {150, 2}, {64, 1}, {65, 1}, {129, 129}};
  Check(V3(kBF16, kBF16), lengths);
  Check(V3(kBF16, kFp8), lengths);
  Check(V3(kF32, kF32, 16), lengths);
  Shape two_heads = V3(kBF16, kBF16);
  two_heads.heads = 2;
  Check(two_heads, lengths);
}

TEST_F(AttentionConformanceTest, DecodingInDeepSeekV3sShapeAgrees) {
  std::vector<Length> lengths;
  for (const int context : {1, 15, 63, 64, 65, 128, 200, 700, 1500}) {
    lengths.push_back({context, 1});
  }
  Check(V3(kBF16, kBF16), lengths);
  Check(V3(kBF16, kFp8), lengths);
  Check(V3(kBF16, kBF16), {{1000, 1}});
  for (const int count : {40, 100, 150}) {
    std::vector<Length> many(count, {77, 1});
    Check(V3(kBF16, kBF16), many);
    many.insert(many.begin() + 20, {90, 30});  // beside a prompt
    Check(V3(kBF16, kBF16), many);
  }
}

TEST_F(AttentionConformanceTest, AStepOfMoreTokensThanAreTakenAtOnceAgrees) {
  Check({kBF16, kBF16, 2, 32, 16, 8, 16, 16}, {{1100, 1050}, {40, 1}});
}

}  // namespace
}  // namespace fathom
