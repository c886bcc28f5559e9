// out = x · weightᵀ in BF16 with F32 sums, on tensor cores: the head of the model and the router.
//
// Runs on every GPU that the backend supports. A block streams 128 rows of the weight through
// shared memory past up to 128 rows of x, and may do so for a part of the inputs only: then there
// are several results, which whoever reads them adds up, in their order.
//
// Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace fathom::cuda {

struct Bf16Product {
  Tensor x;       // [T, K] bf16, rows may be strided
  Tensor weight;  // [N, K] bf16
  Tensor out;     // [T, N] f32 or bf16, rows may be strided
};

// Whether types are as above, K is a multiple of 8 and rows begin at multiples of 16 bytes.
bool FitsBf16Product(const Bf16Product& product);

void MultiplyBf16(const Bf16Product& product, cudaStream_t stream);

// In how many parts of the inputs the product keeps this many multiprocessors busy.
int NumParts(const Bf16Product& product, int num_multiprocessors);

//   parts [num_parts, T, N] f32, out; product.out is not written
void MultiplyBf16InParts(const Bf16Product& product, int num_parts, float* parts,
                         cudaStream_t stream);

}  // namespace fathom::cuda
