// Which of Hopper's kernels takes an FP8 linear layer. Shapes decide, never what tensors hold.
//
// Up to 16 tokens of a matrix are a stream of weights; more are tiles of a matrix product. Measured
// on an H200 at DeepSeek-V3's shapes (NOTES.md): the two meet at 16 tokens for dense layers, and
// near 24 rows per expert for experts.

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/expert_chunks.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

constexpr int64_t kFewTokens = 16;

bool IsAligned(const Tensor& tensor) {
  constexpr int64_t kBytes = 16;
  if (reinterpret_cast<uintptr_t>(tensor.raw()) % kBytes != 0) return false;
  return tensor.rank() < 2 || tensor.stride(0) * SizeOf(tensor.dtype()) % kBytes == 0;
}

// Whole blocks that begin where the tensor does, FP8 on both sides.
bool IsFp8(const LinearInput& x, const Weight& weight, const Tensor& out) {
  const Tensor& values = weight.values;
  return x.quantized() && values.dtype() == DType::kF8E4M3 && weight.row_offset == 0 &&
         weight.column_offset == 0 && values.dense() && weight.scale_inv.dense() &&
         x.scales.dense() && IsAligned(x.values) && IsAligned(values) && IsAligned(out) &&
         values.dim(values.rank() - 1) % kFp8Block == 0;
}

Fp8StreamSm90::Weight StreamWeight(const Weight& weight) {
  const Tensor& values = weight.values;
  const int rank = values.rank();
  return {.values = values.raw(),
          .scale_inv = weight.scale_inv.data<float>(),
          .num_matrices = rank == 3 ? values.dim(0) : 1,
          .n = static_cast<int>(values.dim(rank - 2)),
          .k = static_cast<int>(values.dim(rank - 1))};
}

Fp8StreamSm90::Input StreamInput(const LinearInput& x) {
  return {.values = x.values.raw(),
          .scales = x.scales.data<float>(),
          .rows = x.values.dim(0),
          .row_bytes = x.values.stride(0)};
}

Fp8StreamSm90::Output StreamOutput(const Tensor& out) {
  return {.values = out.raw(),
          .type = out.dtype() == DType::kF32 ? Fp8StreamSm90::OutputType::kF32
                                             : Fp8StreamSm90::OutputType::kBf16,
          .row_stride = out.stride(0)};
}

Fp8TileSm90::Weight TileWeight(const Weight& weight) {
  const Fp8StreamSm90::Weight same = StreamWeight(weight);
  return {.values = static_cast<const __nv_fp8_e4m3*>(same.values),
          .factors = same.scale_inv,
          .experts = static_cast<int>(same.num_matrices),
          .outputs = same.n,
          .inputs = same.k};
}

Fp8TileSm90::Input TileInput(const LinearInput& x) {
  return {.values = static_cast<const __nv_fp8_e4m3*>(x.values.raw()),
          .scales = x.scales.data<float>(),
          .rows = static_cast<int>(x.values.dim(0)),
          .values_stride = x.values.stride(0),
          .scales_stride = x.scales.stride(0)};
}

Fp8TileSm90::Output TileOutput(const Tensor& out) {
  return {.values = static_cast<__nv_bfloat16*>(out.raw()), .stride = out.stride(0)};
}

}  // namespace

bool CudaOps::LinearSm90(const LinearInput& x, const Weight& weight, const Tensor& out) {
  if (!fp8_stream_.has_value() || !IsFp8(x, weight, out)) return false;
  if (out.dtype() == DType::kBF16 && out.dim(0) > kFewTokens &&
      Fp8TileSm90::Supports(weight.values.dim(0), weight.values.dim(1))) {
    fp8_tile_->Linear(TileInput(x), TileWeight(weight), TileOutput(out), stream_);
    return true;
  }
  if (!Fp8StreamSm90::Supports(StreamWeight(weight))) return false;
  fp8_stream_->Linear(StreamInput(x), StreamWeight(weight), StreamOutput(out), stream_);
  return true;
}

bool CudaOps::GroupedLinearSm90(const LinearInput& x, const ExpertGroups& groups,
                                const Weight& weight, int num_choices, const Tensor& out) {
  if (!fp8_stream_.has_value() || !IsFp8(x, weight, out) || !groups.notes.present()) return false;
  const int64_t rows = out.dim(0), experts = weight.values.dim(0);
  const int rows_per_chunk = RowsPerChunk(rows, experts);
  const bool is_gathered = num_choices > 0 && x.values.dim(0) * num_choices == rows;
  const int divisor = is_gathered ? num_choices : 0;
  const auto* notes = groups.notes.data<int32_t>();
  const auto* row_ids = groups.rows.data<int32_t>();
  if (out.dtype() == DType::kBF16 && rows_per_chunk > kFewTokens &&
      weight.values.dim(1) % kFp8Block == 0) {
    fp8_tile_->GroupedLinear(TileInput(x), {.notes = notes, .rows = row_ids, .divisor = divisor},
                             TileWeight(weight), TileOutput(out), stream_);
    return true;
  }
  if (rows_per_chunk > Fp8StreamSm90::kMaxTokens ||
      !Fp8StreamSm90::Supports(StreamWeight(weight))) {
    return false;
  }
  fp8_stream_->GroupedLinear(StreamInput(x),
                             {.notes = notes,
                              .rows = is_gathered ? row_ids : nullptr,
                              .divisor = is_gathered ? divisor : 1,
                              .max_count = rows_per_chunk,
                              .num_rows = rows,
                              .max_chunks = MaxChunks(rows, experts)},
                             StreamWeight(weight), StreamOutput(out), stream_);
  return true;
}

}  // namespace fathom
