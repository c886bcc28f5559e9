// Which kernel takes a linear layer. Shapes and types decide, never what tensors hold: a recorded
// step must choose the same.

#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/fp8_stream_sm90.h"
#include "kernels/cuda/fp8_tile_sm90.h"
#include "kernels/cuda/linear_bf16.h"
#include "kernels/cuda/linear_generic.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

using Stream = Fp8StreamSm90;
using Tile = Fp8TileSm90;

// What share of a tensor that is read right after it is written the L2 should hold until then. A
// small one stays there anyway.
float KeptShare(const Tensor& tensor, const cudaDeviceProp& device) {
  const auto bytes = static_cast<float>(tensor.num_bytes());
  const auto room = static_cast<float>(device.l2CacheSize);
  return bytes < room / 4 ? 0.0f : std::min(1.0f, room * 2 / 3 / bytes);
}

// Whether rows begin at multiples of 16 bytes.
bool HasAlignedRows(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.raw()) % 16 == 0 &&
         tensor.stride(0) * SizeOf(tensor.dtype()) % 16 == 0;
}

// Rows in 1×128 and blocks of 128×128 that begin where the weight does, without gaps: what the FP8
// kernels for Hopper take.
bool IsFp8Product(const LinearInput& x, const Weight& weight, const Tensor& out) {
  if (!x.quantized() || weight.values.dtype() != DType::kF8E4M3) return false;
  const int rank = weight.values.rank();
  const int64_t outputs = weight.values.dim(rank - 2), inputs = weight.values.dim(rank - 1);
  return weight.row_offset == 0 && weight.column_offset == 0 &&
         weight.scale_inv.dim(rank - 2) == cuda::DivideUp(outputs, kFp8Block) &&
         weight.scale_inv.dim(rank - 1) == cuda::DivideUp(inputs, kFp8Block) && x.scales.dense() &&
         HasAlignedRows(x.values) && HasAlignedRows(out) &&
         reinterpret_cast<uintptr_t>(weight.values.raw()) % 16 == 0;
}

Stream::Input StreamInput(const LinearInput& x) {
  return {.values = x.values.raw(),
          .scales = x.scales.data<float>(),
          .rows = x.values.dim(0),
          .row_bytes = x.values.stride(0)};
}
Stream::Weight StreamWeight(const Weight& weight) {
  const int rank = weight.values.rank();
  return {.values = weight.values.raw(),
          .scale_inv = weight.scale_inv.data<float>(),
          .num_matrices = rank == 3 ? weight.values.dim(0) : 1,
          .n = static_cast<int>(weight.values.dim(rank - 2)),
          .k = static_cast<int>(weight.values.dim(rank - 1))};
}
Stream::Output StreamOutput(const Tensor& out) {
  const bool is_f32 = out.dtype() == DType::kF32;
  return {.values = out.raw(),
          .type = is_f32 ? Stream::OutputType::kF32 : Stream::OutputType::kBf16,
          .row_stride = out.stride(0)};
}

Tile::Input TileInput(const LinearInput& x) {
  return {.values = static_cast<const __nv_fp8_e4m3*>(x.values.raw()),
          .scales = x.scales.data<float>(),
          .rows = static_cast<int>(x.values.dim(0)),
          .values_stride = x.values.stride(0),
          .scales_stride = x.scales.stride(0)};
}
Tile::Weight TileWeight(const Weight& weight) {
  const int rank = weight.values.rank();
  return {.values = static_cast<const __nv_fp8_e4m3*>(weight.values.raw()),
          .factors = weight.scale_inv.data<float>(),
          .experts = rank == 3 ? static_cast<int>(weight.values.dim(0)) : 1,
          .outputs = static_cast<int>(weight.values.dim(rank - 2)),
          .inputs = static_cast<int>(weight.values.dim(rank - 1))};
}
Tile::Output TileOutput(const Tensor& out) {
  return {.values = static_cast<__nv_bfloat16*>(out.raw()), .stride = out.stride(0)};
}
bool FitsTile(const Weight& weight, const Tensor& out) {
  const Tile::Weight tile = TileWeight(weight);
  return out.dtype() == DType::kBF16 && Tile::Supports(tile.outputs, tile.inputs) &&
         (tile.experts == 1 || tile.outputs % kFp8Block == 0);
}

// Sorted row i comes from row rows[i] / divisor of x, or from row i itself.
bool IsGathered(const LinearInput& x, const ExpertGroups& groups, int num_choices) {
  return num_choices > 0 && x.values.dim(0) * num_choices == groups.rows.dim(0);
}

}  // namespace

bool CudaOps::LinearSm90(const LinearInput& x, const Weight& weight, const Tensor& out) {
  if (!fp8_stream_.has_value() || !IsFp8Product(x, weight, out)) return false;
  if (x.values.dim(0) <= Stream::kMaxTokens && Stream::Supports(StreamWeight(weight))) {
    fp8_stream_->Linear(StreamInput(x), StreamWeight(weight), StreamOutput(out), stream_);
    return true;
  }
  if (!FitsTile(weight, out)) return false;
  fp8_tile_->Linear(TileInput(x), TileWeight(weight), TileOutput(out), stream_);
  return true;
}

bool CudaOps::GroupedLinearSm90(const LinearInput& x, const ExpertGroups& groups,
                                const Weight& weight, int num_choices, int64_t most_rows,
                                const Tensor& out) {
  if (!fp8_stream_.has_value() || !groups.notes.present() || !IsFp8Product(x, weight, out)) {
    return false;
  }
  const int64_t rows = groups.rows.dim(0), experts = weight.values.dim(0);
  const int chunk_rows = RowsPerChunk(rows, experts);
  const bool is_gathered = IsGathered(x, groups, num_choices);
  const int* sorted_rows = is_gathered ? groups.rows.data<int32_t>() : nullptr;
  const int* notes = groups.notes.data<int32_t>();
  if (chunk_rows <= Stream::kMaxTokens && Stream::Supports(StreamWeight(weight))) {
    const int64_t max_count = std::min<int64_t>(chunk_rows, most_rows);
    Stream::Output stream_out = StreamOutput(out);
    stream_out.kept = KeptShare(out, device_);
    fp8_stream_->GroupedLinear(StreamInput(x),
                               {.notes = notes,
                                .rows = sorted_rows,
                                .divisor = is_gathered ? num_choices : 1,
                                .max_count = static_cast<int>(max_count),
                                .complete_early = notes == complete_notes_,
                                .num_rows = rows,
                                .max_chunks = MaxChunks(rows, experts)},
                               StreamWeight(weight), stream_out, stream_);
    complete_notes_ = notes;
    return true;
  }
  if (!FitsTile(weight, out)) return false;
  fp8_tile_->GroupedLinear(
      TileInput(x), {.notes = notes, .rows = sorted_rows, .divisor = is_gathered ? num_choices : 0},
      TileWeight(weight), TileOutput(out), stream_);
  return true;
}

bool CudaOps::JoinedLinearSm90(const Tensor& gate_up, const Routes& routes, const Weight& weight,
                               const LinearInput& activated, const Tensor& out) {
  // Of more tokens it is no faster, of 16 slower (NOTES.md).
  const ExpertGroups& groups = routes.groups;
  const int64_t rows = groups.rows.dim(0), experts = weight.values.dim(0);
  if (!fp8_stream_.has_value() || !groups.notes.present() || out.dim(0) > 1 ||
      gate_up.dtype() != DType::kBF16 || !HasAlignedRows(gate_up) ||
      !IsFp8Product(activated, weight, out) || !Stream::Supports(StreamWeight(weight))) {
    return false;
  }
  const int* notes = groups.notes.data<int32_t>();
  fp8_stream_->JoinedLinear(
      {.values = gate_up.raw(), .row_bytes = gate_up.stride(0) * SizeOf(gate_up.dtype())},
      {.notes = notes,
       .rows = groups.rows.data<int32_t>(),
       .max_count = 1,  // of an expert: no token chooses one twice
       .complete_early = notes == complete_notes_,
       .num_rows = rows,
       .max_chunks = MaxChunks(rows, experts)},
      routes.weights.data<float>(), StreamWeight(weight), StreamOutput(out), stream_);
  complete_notes_ = notes;
  return true;
}

bool CudaOps::LinearBf16(const LinearInput& x, const Weight& weight, const Tensor& out) {
  constexpr int64_t kFewRows = 8, kManyOutputs = 4096;  // below: a warp per output is as good
  const cuda::Bf16Product product = {.x = x.values, .weight = weight.values, .out = out};
  if (!cuda::FitsBf16Product(product)) return false;
  if (x.values.dim(0) <= kFewRows && weight.values.dim(0) < kManyOutputs) return false;
  cuda::MultiplyBf16(product, stream_);
  return true;
}

void CudaOps::Linear(const LinearInput& x, const Weight& weight, const Tensor& out) {
  const LinearSizes sizes = CheckLinear(x, weight, out);
  if (sizes.rows == 0 || sizes.outputs == 0) return;
  if (LinearSm90(x, weight, out) || LinearBf16(x, weight, out)) return;
  cuda::MultiplyGeneric(x, weight, sizes, out, stream_);
}

void CudaOps::MultiplyGrouped(const LinearInput& x, const ExpertGroups& groups,
                              const Weight& weight, int num_choices, int64_t most_rows,
                              const Tensor& out) {
  const LinearSizes sizes = CheckGroupedLinear(x, groups, weight, num_choices, out);
  if (sizes.rows == 0 || sizes.outputs == 0) return;
  if (GroupedLinearSm90(x, groups, weight, num_choices, most_rows, out)) return;
  cuda::MultiplyGroupedGeneric(x, groups, weight, num_choices, sizes, out, stream_);
}

void CudaOps::GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                            int num_choices, const Tensor& out) {
  // No token chooses an expert twice.
  const int64_t most_rows = num_choices > 0 ? x.values.dim(0) : groups.rows.dim(0);
  MultiplyGrouped(x, groups, weight, num_choices, most_rows, out);
}

void CudaOps::DownAndCombine(const Tensor& gate_up, const Routes& routes, const Weight& weight,
                             bool accumulate, const ExpertRoom& room, const Tensor& out) {
  CheckSwiGlu(gate_up, &routes.groups, room.activated);
  CheckGroupedLinear(room.activated, routes.groups, weight, /*num_choices=*/0, room.y);
  CheckCombineExperts(room.y, routes, out);
  if (out.num_elements() == 0) return;
  if (!accumulate && JoinedLinearSm90(gate_up, routes, weight, room.activated, out)) return;
  SwiGlu(gate_up, &routes.groups, room.activated);
  MultiplyGrouped(room.activated, routes.groups, weight, /*num_choices=*/0,
                  /*most_rows=*/out.dim(0), room.y);
  CombineExperts(room.y, routes, accumulate, out);
}

}  // namespace fathom
