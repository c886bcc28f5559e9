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

// x[row] · weight[n], x of rank 2.
inline Bounded ReferenceDot(const Tensor& x, int64_t row, const Weight& weight, int64_t index,
                            int64_t n) {
  const int64_t inputs = x.dim(1);
  double sum = 0.0;
  double magnitude = 0.0;
  for (int64_t k = 0; k < inputs; ++k) {
    const double product = At(x, row, k) * WeightAt(weight, index, n, k);
    sum += product;
    magnitude += std::abs(product);
  }
  const auto roundings = static_cast<double>(inputs + 2);  // two more: the factor, the last sum
  return {sum, roundings * kFloatRoundoff * magnitude};
}

// Latent attention of one head of one token over positions [0, context), element by element.
inline std::vector<Bounded> ReferenceAttention(const Tensor& q_latent, const Tensor& q_rope,
                                               const Tensor& cache, const int32_t* block_table,
                                               int64_t context, double scale) {
  const int64_t kv_lora_rank = q_latent.dim(0);
  const int64_t rope_dim = q_rope.dim(0);
  const int64_t block_size = cache.dim(1);
  const auto kv = [&](int64_t position, int64_t i) {
    return At(cache, block_table[position / block_size], position % block_size, i);
  };
  std::vector<double> scores;
  double score_error = 0.0;
  for (int64_t p = 0; p < context; ++p) {
    double dot = 0.0;
    double magnitude = 0.0;
    for (int64_t i = 0; i < kv_lora_rank + rope_dim; ++i) {
      const double q = i < kv_lora_rank ? At(q_latent, i) : At(q_rope, i - kv_lora_rank);
      dot += q * kv(p, i);
      magnitude += std::abs(q * kv(p, i));
    }
    scores.push_back(dot * scale);
    // The sum, the product with scale, and the difference to the largest score.
    const auto roundings = static_cast<double>(kv_lora_rank + rope_dim + 3);
    score_error = std::max(score_error, std::abs(scale) * magnitude * roundings * kFloatRoundoff);
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  for (double& score : scores) total += score = std::exp(score - largest);

  // A share errs by the error of its exponent, twice for the largest score's own, by exp itself (2
  // roundings), and by one shrinking (3 roundings) per tile of positions; then come the two sums
  // over the positions and the division.
  const double relative =
      std::expm1(2 * score_error) +
      (2 * static_cast<double>(context) + 3 * context / 64 + 16) * kFloatRoundoff;
  std::vector<Bounded> out;
  for (int64_t i = 0; i < kv_lora_rank; ++i) {
    double sum = 0.0;
    double magnitude = 0.0;
    for (int64_t p = 0; p < context; ++p) {
      sum += scores[p] * kv(p, i);
      magnitude += scores[p] * std::abs(kv(p, i));
    }
    out.push_back({sum / total, 2 * relative * magnitude / total});
  }
  return out;
}

}  // namespace fathom
