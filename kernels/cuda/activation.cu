// Element by element: SwiGLU, sums, rows moved about. A thread takes eight neighbouring elements.

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

// Sixteen lanes take 128 columns of a row, so that they can quantise them. A block's rows begin at
// blockIdx.x * rows_per_block, and its columns at blockIdx.y * 128 * groups_per_block.
template <typename Act, bool kAligned>
__global__ __launch_bounds__(kRowThreads) void SwiGluKernel(Rows<const Act> gate_up,
                                                            const int* num_valid, OutputRows out,
                                                            int num_rows, int size,
                                                            int groups_per_block) {
  LetDependentsLaunch();
  const int unit = threadIdx.x / kGroupLanes;
  const int rows_per_block = kRowThreads / kGroupLanes / groups_per_block;
  const int row = static_cast<int>(blockIdx.x) * rows_per_block + unit / groups_per_block;
  const int group = static_cast<int>(blockIdx.y) * groups_per_block + unit % groups_per_block;
  const int column = group * kFp8Block + static_cast<int>(threadIdx.x) % kGroupLanes * kEight;
  int count = row < num_rows ? size - column : 0;
  WaitForPredecessors();
  const int valid = num_valid == nullptr ? num_rows : *num_valid;
  float gate[kEight] = {}, up[kEight] = {};
  if (count > 0) {  // even if not valid: nobody waits for what says so
    LoadEight<kAligned>(gate_up[row] + column, count, gate);
    LoadEight<kAligned>(gate_up[row] + size + column, count, up);
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    gate[i] = RoundedTo<Act>(gate[i] / (1.0f + expf(-gate[i])) * up[i]);
  }
  if (row >= valid) count = 0;
  out.Store<Act, kAligned>(gate, row, column, count);
}

// Where a thread's eight columns stand when every row has the same number of pieces.
struct Piece {
  __device__ Piece(int num_rows, int size) {
    const int pieces = (size + kEight - 1) / kEight;
    const int64_t index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
    row = index / pieces;
    column = static_cast<int>(index % pieces) * kEight;
    count = row < num_rows ? size - column : 0;
  }
  int64_t row;
  int column, count;
};
int64_t NumPieces(const Tensor& tensor) { return tensor.dim(0) * DivideUp(tensor.dim(1), kEight); }

template <typename Act, bool kAligned>
__global__ void AddKernel(Rows<Act> x, Rows<const Act> y, int num_rows, int size) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const Piece piece(num_rows, size);
  if (piece.count <= 0) return;
  float a[kEight], b[kEight];
  Act* target = x[piece.row] + piece.column;
  LoadEight<kAligned>(target, piece.count, a);
  LoadEight<kAligned>(y[piece.row] + piece.column, piece.count, b);
#pragma unroll
  for (int i = 0; i < kEight; ++i) a[i] += b[i];
  StoreEight<kAligned>(a, piece.count, target);
}

// Elements of one size are copied as such, whatever they mean.
template <typename Element, bool kAligned>
__global__ void GatherRowsKernel(Rows<const Element> x, Rows<const int> rows, Rows<Element> out,
                                 int num_rows, int size) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const Piece piece(num_rows, size);
  if (piece.count <= 0) return;
  const Element* from = x[*rows[piece.row]] + piece.column;
  Element* to = out[piece.row] + piece.column;
  if constexpr (kAligned) {
    struct alignas(sizeof(Element) == 1 ? 8 : 16) Eight {
      Element elements[kEight];
    };
    *reinterpret_cast<Eight*>(to) = *reinterpret_cast<const Eight*>(from);
  } else {
    for (int i = 0; i < min(piece.count, kEight); ++i) to[i] = from[i];
  }
}

template <typename From, typename To, bool kAligned>
__global__ void EmbedKernel(Rows<const int> token_ids, Rows<const From> table, int64_t table_rows,
                            int first_row, Rows<To> out, int num_rows, int size) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const Piece piece(num_rows, size);
  if (piece.count <= 0) return;
  const int64_t row = int64_t{*token_ids[piece.row]} - first_row;
  float values[kEight] = {};
  if (row >= 0 && row < table_rows) {
    LoadEight<kAligned>(table[row] + piece.column, piece.count, values);
  }
  StoreEight<kAligned>(values, piece.count, out[piece.row] + piece.column);
}

}  // namespace
}  // namespace cuda

void CudaOps::SwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out) {
  CheckSwiGlu(gate_up, groups, out);
  const int* num_valid = nullptr;
  if (groups != nullptr) {
    num_valid = groups->offsets.data<int32_t>() + groups->offsets.dim(0) - 1;
  }
  const int64_t rows = out.values.dim(0), size = out.values.dim(1);
  // The second half of a row must be aligned too: its size is a multiple of eight.
  const bool aligned = cuda::AreAlignedForEight(gate_up, out.values) && size % cuda::kEight == 0;
  if (rows == 0) return;
  constexpr int64_t kUnits = cuda::kRowThreads / cuda::kGroupLanes;
  const int64_t row_groups = cuda::DivideUp(size, kFp8Block);
  int groups_per_block = 1;
  while (groups_per_block < kUnits && groups_per_block < row_groups) groups_per_block *= 2;
  const dim3 blocks(static_cast<unsigned>(cuda::DivideUp(rows, kUnits / groups_per_block)),
                    static_cast<unsigned>(cuda::DivideUp(row_groups, groups_per_block)));
  cuda::VisitAct(gate_up.dtype(), [&](auto act) {
    cuda::VisitBool(aligned, [&](auto is_aligned) {
      using Act = decltype(act);
      cuda::LaunchDependent(cuda::SwiGluKernel<Act, decltype(is_aligned)::value>,
                            {blocks, dim3(cuda::kRowThreads)}, stream_,
                            cuda::Rows<const Act>(gate_up), num_valid, cuda::OutputRows(out),
                            static_cast<int>(rows), static_cast<int>(size), groups_per_block);
    });
  });
}

void CudaOps::Add(const Tensor& x, const Tensor& y) {
  CheckAdd(x, y);
  cuda::VisitAct(x.dtype(), [&](auto act) {
    cuda::VisitBool(cuda::AreAlignedForEight(x, y), [&](auto is_aligned) {
      using Act = decltype(act);
      cuda::LaunchThreads(cuda::AddKernel<Act, decltype(is_aligned)::value>, cuda::NumPieces(x),
                          stream_, cuda::Rows<Act>(x), cuda::Rows<const Act>(y),
                          static_cast<int>(x.dim(0)), static_cast<int>(x.dim(1)));
    });
  });
}

void CudaOps::GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) {
  CheckGatherRows(x, rows, out);
  const auto launch = [&](auto element) {
    cuda::VisitBool(cuda::AreAlignedForEight(x, out), [&](auto is_aligned) {
      using Element = decltype(element);
      cuda::LaunchThreads(cuda::GatherRowsKernel<Element, decltype(is_aligned)::value>,
                          cuda::NumPieces(out), stream_, cuda::Rows<const Element>(x),
                          cuda::Rows<const int>(rows), cuda::Rows<Element>(out),
                          static_cast<int>(out.dim(0)), static_cast<int>(out.dim(1)));
    });
  };
  switch (SizeOf(x.dtype())) {
    case 1:
      return launch(uint8_t{});
    case 2:
      return launch(uint16_t{});
    default:
      return launch(uint32_t{});
  }
}

void CudaOps::Embed(const Tensor& token_ids, const Tensor& table, int first_row,
                    const Tensor& out) {
  CheckEmbed(token_ids, table, out);
  cuda::VisitAct(table.dtype(), [&](auto from) {
    cuda::VisitAct(out.dtype(), [&](auto to) {
      cuda::VisitBool(cuda::AreAlignedForEight(table, out), [&](auto is_aligned) {
        using From = decltype(from);
        using To = decltype(to);
        cuda::LaunchThreads(cuda::EmbedKernel<From, To, decltype(is_aligned)::value>,
                            cuda::NumPieces(out), stream_, cuda::Rows<const int>(token_ids),
                            cuda::Rows<const From>(table), table.dim(0), first_row,
                            cuda::Rows<To>(out), static_cast<int>(out.dim(0)),
                            static_cast<int>(out.dim(1)));
      });
    });
  });
}

}  // namespace fathom
