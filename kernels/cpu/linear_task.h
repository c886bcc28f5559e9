// Some rows of x against one weight matrix [N, K]: what the linear layers are made of. Plain
// pointers, because it is handed to code compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace fathom {

// Rows of x that share a converted panel of the weight: enough to pay for the conversion and the
// reading, few enough for the second-level cache together with the panel. A multiple of both tiles'
// rows.
inline constexpr int kMostStagedRows = 96;
// The panel: outputs, and the inputs of one chunk of K. A multiple of every vector's length.
inline constexpr int kPanelOutputs = 32;
inline constexpr int kPanelInputs = 512;
// What may stay in the second-level cache while weights stream through it.
inline constexpr size_t kCachedBytes = size_t{512} << 10;

struct LinearTask {
  const void* x = nullptr;
  DType x_type = DType::kF32;
  int64_t x_stride = 0;              // elements
  const float* x_factors = nullptr;  // F8_E4M3 only: of each row and 128 columns
  int64_t x_factors_stride = 0;
  // Row i reads row rows_of_x[i] / rows_of_x_divisor of x; null: row i.
  const int32_t* rows_of_x = nullptr;
  int rows_of_x_divisor = 1;
  int64_t num_rows = 0;

  const void* weight = nullptr;  // dense
  DType weight_type = DType::kF32;
  int64_t inputs = 0;              // K
  const float* factors = nullptr;  // F8_E4M3 only: a row of them for each 128 outputs
  int64_t factors_stride = 0;
  int row_offset = 0;  // as in Weight
  int column_offset = 0;

  void* out = nullptr;
  DType out_type = DType::kF32;
  int64_t out_stride = 0;  // elements
};

}  // namespace fathom
