// Ops::SampleTokens on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ops.h"

namespace fathom {

// token_ids[r] = a token for rows[r]; -1 where a logit is faulty or nothing is left to choose.
//   logits [.., vocab_size] f32, rows `stride` elements apart   rows [num_rows]   token_ids
//   [num_rows], all in device memory. vocab_size below 2^19.
// Weights are right to 2^-22 and summed exactly: the same token as the CPU's, unless the draw or
// top_p falls within a millionth of a border; the same bits always.
void SampleTokens(const float* logits, int64_t stride, int vocab_size, const SamplingRow* rows,
                  int num_rows, int* token_ids, cudaStream_t stream);

}  // namespace fathom
