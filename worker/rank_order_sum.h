// The sum over ranks that every communicator makes, so that all give the same bits.
//
// Thread-safe (pure functions).
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/tensor.h"

namespace fathom {

// out[i] = (parts[0][i] + parts[1][i]) + parts[2][i] + … in F32, rounded once to `dtype`.
//   parts: one array per rank, out: `count` elements each, of dtype kF32 or kBF16
// `out` may be one of the parts.
void SumInRankOrder(absl::Span<const void* const> parts, DType dtype, int64_t count, void* out);

}  // namespace fathom
