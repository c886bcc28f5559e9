// The router's product on Hopper for many tokens: logits = x · gateᵀ for 256 experts, BF16 with F32
// sums.
//
// A block takes 64 tokens and all experts for a part of the inputs, so that x is read once; the two
// blocks of a cluster have other tokens and the same inputs, and each brings half of the gate for
// both. The parts are added up by whoever reads them, in their order.
//
// Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/linear_bf16.h"

namespace fathom {

class RouterSm90 {
 public:
  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);
  // Whether this product is one: 256 outputs, inputs a multiple of 64.
  static bool Supports(const cuda::Bf16Product& product);

  // In how many parts of the inputs it keeps this many multiprocessors busy; more than one only if
  // parts times tokens are at most 64 for each of these.
  static int NumParts(const cuda::Bf16Product& product, int num_multiprocessors);
  //   parts [num_parts, T, 256] f32, out; product.out is not written
  static void Multiply(const cuda::Bf16Product& product, int num_parts, float* parts,
                       cudaStream_t stream);
};

}  // namespace fathom
