// The host's side of sm90.cuh: tensor maps, and launches that overlap the end of the kernel before.
// Thread-safe.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/dependent_launch.cuh"

namespace fathom::sm90 {

// A matrix, rows one after another, as the copy engine cuts boxes from it.
struct MatrixMap {
  void* data = nullptr;  // 16-byte aligned
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  int element_bytes = 1;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;  // elements; 0: rows stand one after another
  int box_rows = 0;
  int box_columns = 0;  // 128 bytes worth: a box is a swizzled tile
};
CUtensorMap MapMatrix(const MatrixMap& matrix);
// The same matrix for copies of whole rows: a box is box_rows rows, cut into panels of box_columns
// that stand one after another, each a swizzled tile (CopyPanels).
CUtensorMap MapPanels(const MatrixMap& matrix);

// Launches a kernel that calls WaitForPredecessors() before it reads what others wrote.
template <typename... Parameters, typename... Values>
void LaunchDependent(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes,
                     cudaStream_t stream, const Values&... values) {
  cuda::LaunchDependent(kernel, {dim3(blocks), dim3(threads), shared_bytes}, stream, values...);
}

}  // namespace fathom::sm90
