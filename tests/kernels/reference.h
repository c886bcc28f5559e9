// The operations in double precision, written for the eye, each with a bound on the error that
// arithmetic in F32 may make.
//
// A sum of n products rounded to F32 in any order, with or without fused multiply-add, errs by at
// most about n * 2^-24 * Σ |product| (Higham, Accuracy and Stability, §3.1). Bounds add a few units
// for the roundings around the sum, and one rounding to the output's type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tests/kernels/test_tensor.h"

namespace fathom {

struct Bounded {
  double value = 0.0;
  double error = 0.0;  // allowed

  Bounded Rounded(DType dtype) const {
    return {value, error + (std::abs(value) + error) * RoundoffOf(dtype)};
  }
};

#define EXPECT_WITHIN(actual, bounded) EXPECT_NEAR(actual, (bounded).value, (bounded).error)

// Element (n, k) of a weight or of matrix `index` of a stack, its factor applied.
inline double WeightAt(const Weight& weight, int64_t index, int64_t n, int64_t k) {
  const bool is_stack = weight.values.rank() == 3;
  const double value = is_stack ? At(weight.values, index, n, k) : At(weight.values, n, k);
  if (weight.values.dtype() != DType::kF8E4M3) return value;
  const int64_t block_row = (n + weight.row_offset) / kFp8Block;
  const int64_t block_column = (k + weight.column_offset) / kFp8Block;
  return value * (is_stack ? At(weight.scale_inv, index, block_row, block_column)
                           : At(weight.scale_inv, block_row, block_column));
}

// Element (t, k) of what a linear layer reads, its factor applied.
inline double InputAt(const LinearInput& x, int64_t t, int64_t k) {
  const double value = At(x.values, t, k);
  return x.quantized() ? value * At(x.scales, t, k / kFp8Block) : value;
}

// x[row] · weight[n], x of rank 2.
inline Bounded ReferenceDot(const LinearInput& x, int64_t row, const Weight& weight, int64_t index,
                            int64_t n) {
  const int64_t inputs = x.values.dim(1);
  double sum = 0.0;
  double magnitude = 0.0;
  for (int64_t k = 0; k < inputs; ++k) {
    const double product = InputAt(x, row, k) * WeightAt(weight, index, n, k);
    sum += product;
    magnitude += std::abs(product);
  }
  const auto roundings = static_cast<double>(inputs + 3);  // three more: two factors, the last sum
  return {sum, roundings * kFloatRoundoff * magnitude};
}

// A row in 1×128, with the scalar codec.
struct QuantizedRow {
  std::vector<uint8_t> codes;
  std::vector<float> factors;
};
inline QuantizedRow ReferenceQuantize(const Tensor& x, int64_t row) {
  QuantizedRow quantized;
  for (int64_t begin = 0; begin < x.dim(1); begin += kFp8Block) {
    const int64_t end = std::min<int64_t>(x.dim(1), begin + kFp8Block);
    float largest = 1e-4f;
    for (int64_t k = begin; k < end; ++k) {
      largest = std::max(largest, std::abs(static_cast<float>(At(x, row, k))));
    }
    const float factor = largest / 448.0f;
    quantized.factors.push_back(factor);
    for (int64_t k = begin; k < end; ++k) {
      quantized.codes.push_back(ToFloat8E4M3(static_cast<float>(At(x, row, k)) / factor).bits);
    }
  }
  return quantized;
}

// `quantized` holds exactly the rows of x, in 1×128.
inline void ExpectQuantized(const LinearInput& quantized, const Tensor& x) {
  for (int64_t t = 0; t < x.dim(0); ++t) {
    const QuantizedRow expected = ReferenceQuantize(x, t);
    for (int64_t k = 0; k < x.dim(1); ++k) {
      const int64_t place = t * quantized.values.stride(0) + k;
      ASSERT_EQ(quantized.values.data<uint8_t>()[place], expected.codes[k])
          << "row " << t << " element " << k << ", " << At(x, t, k);
      ASSERT_EQ(static_cast<float>(At(quantized.scales, t, k / kFp8Block)),
                expected.factors[k / kFp8Block])
          << "row " << t << " element " << k;
    }
  }
}

// RMS norm of x[row], element i; `factor` is 1 / sqrt(mean(x²) + eps).
inline double ReferenceNormFactor(const Tensor& x, int64_t row, double eps) {
  double squares = 0.0;
  for (int64_t i = 0; i < x.dim(1); ++i) squares += At(x, row, i) * At(x, row, i);
  return 1.0 / std::sqrt(squares / static_cast<double>(x.dim(1)) + eps);
}
inline Bounded ReferenceNorm(const Tensor& x, int64_t row, int64_t i, double factor,
                             double weight) {
  const double value = At(x, row, i) * factor * weight;
  // The sum of squares is halved in relative error by the root; seven roundings around it.
  return {value, std::abs(value) * (static_cast<double>(x.dim(1)) / 2 + 7) * kFloatRoundoff};
}

// A pair of elements, i and i + 1 of their row, turned to `position`.
inline std::pair<Bounded, Bounded> ReferenceRotate(double even, double odd, const Tensor& cos_sin,
                                                   int64_t position, int64_t i) {
  const double cosine = At(cos_sin, position, i / 2, 0);
  const double sine = At(cos_sin, position, i / 2, 1);
  const double error =
      2 * kFloatRoundoff * (std::abs(even) + std::abs(odd)) * (std::abs(cosine) + std::abs(sine));
  return {{even * cosine - odd * sine, error}, {even * sine + odd * cosine, error}};
}

// What the cache holds at `place`: latent and key, factors applied.
inline std::vector<double> CachedAt(const Tensor& cache, int64_t place, int64_t kv_lora_rank,
                                    int64_t rope_dim) {
  std::vector<double> cached;
  const char* row =
      static_cast<const char*>(cache.raw()) + place * cache.dim(2) * SizeOf(cache.dtype());
  if (cache.dtype() != DType::kF8E4M3) {
    for (int64_t i = 0; i < kv_lora_rank + rope_dim; ++i) {
      cached.push_back(ElementAt(cache, place * cache.dim(2) + i));
    }
    return cached;
  }
  for (int64_t i = 0; i < kv_lora_rank; ++i) {
    float factor;
    std::memcpy(&factor, row + kv_lora_rank + i / kFp8Block * 4, 4);
    cached.push_back(double{ToFloat(Float8E4M3{static_cast<uint8_t>(row[i])})} * factor);
  }
  const char* key = row + kv_lora_rank + (kv_lora_rank + kFp8Block - 1) / kFp8Block * 4;
  for (int64_t i = 0; i < rope_dim; ++i) {
    BFloat16 element;
    std::memcpy(&element, key + 2 * i, 2);
    cached.push_back(ToFloat(element));
  }
  return cached;
}

// Attention of one query in the latent space, element by element of the R first ones.
//   query  R + P elements   cached  the positions that it sees, R + P elements each
inline std::vector<Bounded> ReferenceAttention(const std::vector<Bounded>& query,
                                               const std::vector<std::vector<double>>& cached,
                                               int64_t kv_lora_rank, double scale) {
  const auto context = static_cast<double>(cached.size());
  std::vector<double> scores;
  double score_error = 0.0;
  for (const std::vector<double>& kv : cached) {
    double dot = 0.0;
    double error = 0.0;
    // The sum, the product with scale, a factor of the cache, and the difference to the largest.
    const double roundings = (static_cast<double>(query.size()) + 4) * kFloatRoundoff;
    for (size_t i = 0; i < query.size(); ++i) {
      dot += query[i].value * kv[i];
      error += (std::abs(query[i].value) * roundings + query[i].error) * std::abs(kv[i]);
    }
    scores.push_back(dot * scale);
    score_error = std::max(score_error, std::abs(scale) * error);
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  for (double& score : scores) total += score = std::exp(score - largest);

  // A share errs by the error of its exponent, twice for the largest score's own, by exp itself (2
  // roundings), and by one shrinking (3 roundings) per tile of positions; then come the two sums
  // over the positions and the division.
  const double relative =
      std::expm1(2 * score_error) + (2 * context + 3 * context / 64 + 16) * kFloatRoundoff;
  std::vector<Bounded> out;
  for (int64_t i = 0; i < kv_lora_rank; ++i) {
    double sum = 0.0;
    double magnitude = 0.0;
    for (size_t p = 0; p < cached.size(); ++p) {
      sum += scores[p] * cached[p][i];
      magnitude += scores[p] * std::abs(cached[p][i]);
    }
    out.push_back({sum / total, 2 * relative * magnitude / total});
  }
  return out;
}

// One head's linear layer on a vector that is known to within bounds, rounded to act.
inline std::vector<Bounded> ReferenceHead(const Tensor& weight, const std::vector<Bounded>& x,
                                          DType act) {
  std::vector<Bounded> out;
  for (int64_t n = 0; n < weight.dim(0); ++n) {
    Bounded sum;
    const double roundings = (static_cast<double>(x.size()) + 2) * kFloatRoundoff;
    for (size_t k = 0; k < x.size(); ++k) {
      const double w = At(weight, n, static_cast<int64_t>(k));
      sum.value += w * x[k].value;
      sum.error += std::abs(w) * (std::abs(x[k].value) * roundings + x[k].error);
    }
    out.push_back(sum.Rounded(act));
  }
  return out;
}

}  // namespace fathom
