// The arguments of AddRmsNorm and StoreLatents in one piece, because they are handed to code
// compiled for several instruction sets.
#pragma once

#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom {

struct AddRmsNormTask {
  Tensor x;
  Tensor y;
  Tensor weight;
  float eps = 0.0f;
  Tensor normed;
  LinearInput quantized;
};

struct StoreLatentsTask {
  Tensor q_a;     // [T, Q] before the norm; absent if Q is 0
  Tensor latent;  // [T, R] before the norm
  Tensor key;     // [T, P], not yet rotated
  Tensor q_norm;
  Tensor kv_norm;
  float eps = 0.0f;
  Tensor positions;
  Tensor cos_sin;
  Tensor places;
  LinearInput q_a_out;
  Tensor cache;
};

}  // namespace fathom
