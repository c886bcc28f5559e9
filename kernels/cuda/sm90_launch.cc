#include "kernels/cuda/sm90_launch.h"

#include "base/check.h"

namespace fathom::sm90 {
namespace {

// From the driver at run time, so that nothing links against libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled TensorMapEncoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found));
    CHECK(found == cudaDriverEntryPointSuccess) << "the driver has no cuTensorMapEncodeTiled";
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encoder;
}

cuuint64_t RowBytes(const MatrixMap& matrix) {
  const int64_t stride = matrix.row_stride != 0 ? matrix.row_stride : matrix.columns;
  return static_cast<cuuint64_t>(stride * matrix.element_bytes);
}

CUtensorMap Encode(const MatrixMap& matrix, int dimensions, const cuuint64_t* sizes,
                   const cuuint64_t* strides, const cuuint32_t* box) {
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      TensorMapEncoder()(&map, matrix.type, dimensions, matrix.data, sizes, strides, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS) << "cuTensorMapEncodeTiled: " << result << " for " << matrix.rows
                                << " rows of " << matrix.columns;
  return map;
}

}  // namespace

CUtensorMap MapMatrix(const MatrixMap& matrix) {
  CHECK_EQ(matrix.box_columns * matrix.element_bytes, 128);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {RowBytes(matrix)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns),
                            static_cast<cuuint32_t>(matrix.box_rows)};
  return Encode(matrix, 2, sizes, strides, box);
}

CUtensorMap MapPanels(const MatrixMap& matrix) {
  CHECK_EQ(matrix.box_columns * matrix.element_bytes, 128);
  CHECK_EQ(matrix.columns % matrix.box_columns, 0);
  const auto panels = static_cast<cuuint32_t>(matrix.columns / matrix.box_columns);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.box_columns),
                              static_cast<cuuint64_t>(matrix.rows), panels};
  const cuuint64_t strides[] = {RowBytes(matrix), 128};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns),
                            static_cast<cuuint32_t>(matrix.box_rows), panels};
  return Encode(matrix, 3, sizes, strides, box);
}

}  // namespace fathom::sm90
