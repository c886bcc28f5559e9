// Matrix products of a warp on tensor cores, BF16 with F32 sums, from operands as they lie in
// memory. Every GPU since Ampere has them.
//
// A warp multiplies 32 inputs at a time: lane l holds, of row l / 4 of either operand, the eight
// inputs beginning at 8 * (l % 4): 16 bytes as loaded. Which of the inputs that is for the tensor
// cores does not matter, as long as it is the same for both operands.
// Source: PTX ISA 9.0, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fathom::cuda {

// d[16, 8] += a[16, 16] · b[8, 16]ᵀ. d of lane l: rows l / 4 (d[0], d[1]) and l / 4 + 8 (d[2],
// d[3]), columns 2 * (l % 4) and the next.
__device__ inline void Product16x8x16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      uint32_t b0, uint32_t b1, float (&d)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 32] · b[8, 32]ᵀ; `a_low` are rows 0 to 7, `a_high` the others.
__device__ inline void ProductOf32(const uint4& a_low, const uint4& a_high, const uint4& b,
                                   float (&d)[4]) {
  Product16x8x16(a_low.x, a_high.x, a_low.y, a_high.y, b.x, b.y, d);
  Product16x8x16(a_low.z, a_high.z, a_low.w, a_high.w, b.z, b.w, d);
}

}  // namespace fathom::cuda
