// Linear layers: out = x · weightᵀ, for one weight, one per head, or one per expert.
//
// All of them are LinearTasks: some rows of x against the rows of one weight matrix. Every output
// is one dot product made by AddProducts (vector-inl.h), so its bits depend on K alone:
//   one tile of rows   the weight is converted in registers, straight from memory
//   more               a panel of the weight is converted once and used by up to 96 rows; K is
//                      walked in chunks, and sums rest in memory between chunks
// The factors of F8_E4M3 blocks multiply x, once per 128 outputs, and not the weight; those of x
// are applied where x is staged. So each product carries both factors before it is summed, which
// differs from summing first by rounding alone.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/linear_task.h"
#include "kernels/cpu/scratch.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// The staged rows of x: padded with zeros, and shifted so that rows of 2^n bytes do not all fall
// into the same few sets of a cache.
inline size_t StagedStride(const LinearTask& task) {
  return PadToVector(static_cast<size_t>(task.inputs)) + kVectorFloats;
}

template <typename Act>
void StageRows(const LinearTask& task, int64_t first_row, int num_rows, float* staged) {
  const auto inputs = static_cast<size_t>(task.inputs);
  const size_t stride = StagedStride(task);
  for (int m = 0; m < num_rows; ++m) {
    int64_t source = first_row + m;
    if (task.rows_of_x != nullptr) source = task.rows_of_x[source] / task.rows_of_x_divisor;
    const Act* row = static_cast<const Act*>(task.x) + source * task.x_stride;
    float* target = staged + m * stride;
    for (size_t k = 0; k < inputs; k += kLanes) {
      FloatVec value = LoadUpTo(row + k, inputs - k);
      if constexpr (std::is_same_v<Act, Float8E4M3>) {
        const float factor =
            task.x_factors[source * task.x_factors_stride + static_cast<int64_t>(k / kFp8Block)];
        value = hn::Mul(value, hn::Set(FloatTag(), factor * kLoadFactor<Float8E4M3>));
      }
      StoreFloats(value, target + k);
    }
    for (size_t k = (inputs + kLanes - 1) / kLanes * kLanes; k < stride; ++k) target[k] = 0.0f;
  }
}

// scaled = staged, each element times the factor of its block.
void ScaleRows(const LinearTask& task, const float* factors, const float* staged, int num_rows,
               float* scaled) {
  const FloatTag d;
  const auto inputs = static_cast<size_t>(task.inputs);
  const size_t stride = StagedStride(task);
  const auto offset = static_cast<size_t>(task.column_offset);
  for (int m = 0; m < num_rows; ++m) {
    const float* row = staged + m * stride;
    float* target = scaled + m * stride;
    for (size_t begin = 0; begin < inputs;) {
      const size_t block = (begin + offset) / kFp8Block;
      const size_t end = std::min(inputs, (block + 1) * kFp8Block - offset);
      const FloatVec factor = hn::Set(d, factors[block] * kLoadFactor<Float8E4M3>);
      for (size_t k = begin; k < end; k += kLanes) {
        StoreUpTo(hn::Mul(LoadUpTo(row + k, end - k), factor), target + k, end - k);
      }
      begin = end;
    }
    for (size_t k = inputs; k < stride; ++k) target[k] = 0.0f;
  }
}

template <int kRows>
HWY_INLINE void StoreTile(const LinearTask& task, int64_t row, int64_t output, int num_outputs,
                          const FloatVec* sums) {
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < num_outputs; ++n) {
      const float value = SumOf(sums[m * kTileOutputs + n]);
      const int64_t place = (row + m) * task.out_stride + output + n;
      if (task.out_type == DType::kF32) {
        static_cast<float*>(task.out)[place] = value;
      } else {
        static_cast<BFloat16*>(task.out)[place] = ToBFloat16(value);
      }
    }
  }
}

template <typename Element>
HWY_INLINE const Element* WeightRow(const LinearTask& task, int64_t output) {
  return static_cast<const Element*>(task.weight) + output * task.inputs;
}

// kRows rows of x, staged, against the outputs [begin, end).
template <typename Element, int kRows>
void MultiplyFewRows(const LinearTask& task, const float* staged, int64_t first_row, int64_t begin,
                     int64_t end) {
  const size_t stride = StagedStride(task);
  for (int64_t output = begin; output < end; output += kTileOutputs) {
    const Element* w[kTileOutputs];
    for (int n = 0; n < kTileOutputs; ++n) {
      w[n] = WeightRow<Element>(task, std::min<int64_t>(output + n, end - 1));
    }
    FloatVec sums[kRows * kTileOutputs];
    for (FloatVec& sum : sums) sum = hn::Zero(FloatTag());
    AddProducts<kRows>(staged, stride, w, static_cast<size_t>(task.inputs), sums);
    StoreTile<kRows>(task, first_row, output,
                     static_cast<int>(std::min<int64_t>(kTileOutputs, end - output)), sums);
  }
}

template <typename Element, int kRows = kTileRows>
void MultiplyUpToTileRows(const LinearTask& task, const float* staged, int num_rows,
                          int64_t first_row, int64_t begin, int64_t end) {
  if (num_rows == kRows) {
    MultiplyFewRows<Element, kRows>(task, staged, first_row, begin, end);
  } else if constexpr (kRows > 1) {
    MultiplyUpToTileRows<Element, kRows - 1>(task, staged, num_rows, first_row, begin, end);
  }
}

// Bytes of the weight's rows that the next chunk will read, to be fetched while this one computes.
struct NextChunk {
  const char* rows = nullptr;  // null at the end
  int64_t stride_bytes = 0;
  int64_t row_bytes = 0;
  int num_rows = 0;
};

// One chunk of K of one panel: the weight's rows as floats, and where the sums rest.
struct Panel {
  const float* staged;   // x, at the chunk's first column
  const float* weights;  // at the chunk's first column
  int64_t weights_stride;
  float* sums;        // kTileRows × kTileOutputs vectors for each tile, row tiles outermost
  size_t num_inputs;  // of the chunk
  int64_t first_output;
  int num_outputs;
  int num_rows;
  int tile_rows;  // of all tiles but the last
  bool is_first;  // chunk
  bool is_last;
  NextChunk next;
};

// The share of one tile, so that the requests spread over the whole computation of a chunk. Without
// them each row of each chunk begins with a wait for memory.
HWY_INLINE void FetchNextChunk(const Panel& panel, int tile_row, int output) {
  constexpr int64_t kLineBytes = 64;
  if (panel.next.rows == nullptr) return;
  const int64_t row_tiles = (panel.num_rows + panel.tile_rows - 1) / panel.tile_rows;
  const int64_t share = (panel.next.row_bytes / row_tiles / kLineBytes + 1) * kLineBytes;
  const int64_t begin = tile_row / panel.tile_rows * share;
  const int64_t end = std::min(begin + share, panel.next.row_bytes);
  for (int n = output; n < std::min(output + kTileOutputs, panel.next.num_rows); ++n) {
    const char* row = panel.next.rows + n * panel.next.stride_bytes;
    for (int64_t i = begin; i < end; i += kLineBytes) __builtin_prefetch(row + i, 0, 2);
  }
}

template <int kRows>
void MultiplyPanelTile(const LinearTask& task, const Panel& panel, int tile_row, int64_t row) {
  constexpr size_t kTileFloats = kTileRows * kTileOutputs * kLanes;
  const FloatTag d;
  const size_t stride = StagedStride(task);
  const float* staged = panel.staged + tile_row * stride;
  float* rest =
      panel.sums + tile_row / panel.tile_rows * (kPanelOutputs / kTileOutputs) * kTileFloats;
  for (int output = 0; output < panel.num_outputs; output += kTileOutputs, rest += kTileFloats) {
    const float* w[kTileOutputs];
    for (int n = 0; n < kTileOutputs; ++n) {
      w[n] = panel.weights + std::min(output + n, panel.num_outputs - 1) * panel.weights_stride;
    }
    FetchNextChunk(panel, tile_row, output);
    FloatVec sums[kRows * kTileOutputs];
    for (int i = 0; i < kRows * kTileOutputs; ++i) {
      sums[i] = panel.is_first ? hn::Zero(d) : hn::LoadU(d, rest + i * kLanes);
    }
    AddProducts<kRows>(staged, stride, w, panel.num_inputs, sums);
    if (panel.is_last) {
      StoreTile<kRows>(task, row + tile_row, panel.first_output + output,
                       std::min(kTileOutputs, panel.num_outputs - output), sums);
    } else {
      for (int i = 0; i < kRows * kTileOutputs; ++i) hn::StoreU(sums[i], d, rest + i * kLanes);
    }
  }
}

template <int kRows = kTileRows>
void MultiplyPanelUpToTileRows(const LinearTask& task, const Panel& panel, int tile_row,
                               int64_t row) {
  if (std::min(panel.tile_rows, panel.num_rows - tile_row) == kRows) {
    MultiplyPanelTile<kRows>(task, panel, tile_row, row);
  } else if constexpr (kRows > 1) {
    MultiplyPanelUpToTileRows<kRows - 1>(task, panel, tile_row, row);
  }
}

// The panel's weights as floats: where they are, or converted.
template <typename Element>
void LoadPanel(const LinearTask& task, int64_t column, float* converted, Panel& panel) {
  const Element* rows = WeightRow<Element>(task, panel.first_output) + column;
  if constexpr (std::is_same_v<Element, float>) {
    panel.weights = rows;
    panel.weights_stride = task.inputs;
    return;
  }
  panel.weights = converted;
  panel.weights_stride = kPanelInputs;
  for (int n = 0; n < panel.num_outputs; ++n, converted += kPanelInputs) {
    const Element* row = rows + n * task.inputs;
    for (size_t k = 0; k < panel.num_inputs; k += kLanes) {
      StoreFloats(LoadUpTo(row + k, panel.num_inputs - k), converted + k);
    }
  }
}

// What follows the chunk at `column` of the panel at `output`.
template <typename Element>
NextChunk NextOf(const LinearTask& task, int64_t output, int64_t column, int64_t end,
                 int panel_outputs) {
  column += kPanelInputs;
  if (column >= task.inputs) {
    column = 0;
    output += panel_outputs;
  }
  if (output >= end) return {};
  const auto size = static_cast<int64_t>(sizeof(Element));
  return {reinterpret_cast<const char*>(WeightRow<Element>(task, output) + column),
          task.inputs * size, std::min<int64_t>(kPanelInputs, task.inputs - column) * size,
          static_cast<int>(std::min<int64_t>(panel_outputs, end - output))};
}

template <typename Element>
void MultiplyManyRows(const LinearTask& task, const float* staged, int num_rows, int64_t first_row,
                      int64_t begin, int64_t end, float* converted, float* sums) {
  // When x stays in the second-level cache, the panel is a single tile: then the weight is read
  // along its rows, which memory likes best.
  const size_t staged_bytes = num_rows * StagedStride(task) * sizeof(float);
  const int panel_outputs = staged_bytes <= kCachedBytes ? kTileOutputs : kPanelOutputs;
  Panel panel = {};
  panel.sums = sums;
  panel.num_rows = num_rows;
  panel.tile_rows = TileRowsFor(num_rows);
  for (panel.first_output = begin; panel.first_output < end; panel.first_output += panel_outputs) {
    panel.num_outputs =
        static_cast<int>(std::min<int64_t>(panel_outputs, end - panel.first_output));
    for (int64_t column = 0; column < task.inputs; column += kPanelInputs) {
      panel.staged = staged + column;
      panel.is_first = column == 0;
      panel.is_last = column + kPanelInputs >= task.inputs;
      panel.num_inputs = static_cast<size_t>(std::min<int64_t>(kPanelInputs, task.inputs - column));
      panel.next = NextOf<Element>(task, panel.first_output, column, end, panel_outputs);
      LoadPanel<Element>(task, column, converted, panel);
      for (int m = 0; m < num_rows; m += panel.tile_rows) {
        MultiplyPanelUpToTileRows(task, panel, m, first_row);
      }
    }
  }
}

template <typename Element>
void MultiplyRows(const LinearTask& task, int64_t begin, int64_t end, Scratch& scratch) {
  const size_t stride = StagedStride(task);
  const auto most_rows = static_cast<size_t>(std::min<int64_t>(task.num_rows, kMostStagedRows));
  constexpr bool kScaled = std::is_same_v<Element, Float8E4M3>;
  constexpr size_t kConvertedFloats = size_t{kPanelOutputs} * kPanelInputs;
  constexpr size_t kSumsFloats = kMostStagedRows * kPanelOutputs * kLanes;
  const bool has_panels = task.num_rows > kTileRows;
  scratch.Reset(most_rows * stride * (kScaled ? 2 : 1) +
                (has_panels ? kConvertedFloats + kSumsFloats : 0));
  float* staged = scratch.Take(most_rows * stride);
  float* scaled = kScaled ? scratch.Take(most_rows * stride) : staged;
  float* converted = has_panels ? scratch.Take(kConvertedFloats) : nullptr;
  float* sums = has_panels ? scratch.Take(kSumsFloats) : nullptr;

  for (int64_t row = 0; row < task.num_rows; row += kMostStagedRows) {
    const int num_rows = static_cast<int>(std::min<int64_t>(kMostStagedRows, task.num_rows - row));
    switch (task.x_type) {
      case DType::kF32:
        StageRows<float>(task, row, num_rows, staged);
        break;
      case DType::kBF16:
        StageRows<BFloat16>(task, row, num_rows, staged);
        break;
      default:
        StageRows<Float8E4M3>(task, row, num_rows, staged);
    }
    // Outputs that share their factors; all of them when there are none.
    for (int64_t output = begin; output < end;) {
      int64_t stop = end;
      if constexpr (kScaled) {
        const int64_t block_row = (output + task.row_offset) / kFp8Block;
        stop = std::min(end, (block_row + 1) * kFp8Block - task.row_offset);
        ScaleRows(task, task.factors + block_row * task.factors_stride, staged, num_rows, scaled);
      }
      if (num_rows <= kTileRows) {
        MultiplyUpToTileRows<Element>(task, scaled, num_rows, row, output, stop);
      } else {
        MultiplyManyRows<Element>(task, scaled, num_rows, row, output, stop, converted, sums);
      }
      output = stop;
    }
  }
}

void MultiplyTask(const LinearTask& task, int64_t begin, int64_t end, Scratch& scratch) {
  switch (task.weight_type) {
    case DType::kF32:
      return MultiplyRows<float>(task, begin, end, scratch);
    case DType::kBF16:
      return MultiplyRows<BFloat16>(task, begin, end, scratch);
    default:
      return MultiplyRows<Float8E4M3>(task, begin, end, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(MultiplyTask);

// A task without rows for matrix `index` of a weight.
LinearTask TaskOf(const LinearInput& x, const Weight& weight, int64_t index, const Tensor& out) {
  const Tensor& values = weight.values;
  const int rank = values.rank();
  const int64_t outputs = values.dim(rank - 2);
  const int64_t inputs = values.dim(rank - 1);
  LinearTask task;
  task.x = x.values.raw();
  task.x_type = x.values.dtype();
  task.x_stride = x.values.stride(0);
  if (x.quantized()) {
    task.x_factors = x.scales.data<float>();
    task.x_factors_stride = x.scales.stride(0);
  }
  task.weight =
      static_cast<const char*>(values.raw()) + index * outputs * inputs * SizeOf(values.dtype());
  task.weight_type = values.dtype();
  task.inputs = inputs;
  if (values.dtype() == DType::kF8E4M3) {
    task.factors_stride = weight.scale_inv.dim(rank - 1);
    task.factors = weight.scale_inv.data<float>() +
                   index * weight.scale_inv.dim(rank - 2) * task.factors_stride;
    task.row_offset = weight.row_offset;
    task.column_offset = weight.column_offset;
  }
  task.out = out.raw();
  task.out_type = out.dtype();
  task.out_stride = out.stride(0);
  return task;
}

void* Advance(void* data, DType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * SizeOf(dtype);
}

}  // namespace

// Each thread takes the same share of the outputs of every task, so that all have equal work
// however unequal the tasks are.
void CpuOps::MultiplyTasks(int64_t num_outputs) {
  constexpr int64_t kSmallestWork = int64_t{1} << 17;  // multiply-adds worth a thread
  constexpr int64_t kUnit = 4;                         // outputs
  int64_t work = 1;
  for (const LinearTask& task : tasks_) work += task.num_rows * task.inputs * kUnit;
  threads_.ParallelFor((num_outputs + kUnit - 1) / kUnit, kSmallestWork / work + 1,
                       [&](int range, int64_t begin, int64_t end) {
                         for (const LinearTask& task : tasks_) {
                           HWY_DYNAMIC_DISPATCH(MultiplyTask)
                           (task, begin * kUnit, std::min(num_outputs, end * kUnit),
                            scratch_[static_cast<size_t>(range)]);
                         }
                       });
}

void CpuOps::Linear(const LinearInput& x, const Weight& weight, const Tensor& out) {
  const LinearSizes sizes = CheckLinear(x, weight, out);
  tasks_.assign(1, TaskOf(x, weight, 0, out));
  tasks_[0].num_rows = sizes.rows;
  MultiplyTasks(sizes.outputs);
}

void CpuOps::MultiplyHeads(const Tensor& x, const Tensor& weight, const Tensor& out) {
  tasks_.clear();
  for (int64_t a = 0; a < weight.dim(0); ++a) {
    LinearTask task = TaskOf(x, {.values = weight}, a, out);
    task.num_rows = x.dim(0);
    task.x = Advance(x.raw(), x.dtype(), a * x.stride(1));
    task.out = Advance(out.raw(), out.dtype(), a * out.stride(1));
    tasks_.push_back(task);
  }
  MultiplyTasks(weight.dim(1));
}

void CpuOps::GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                           int num_choices, const Tensor& out) {
  const LinearSizes sizes = CheckGroupedLinear(x, groups, weight, num_choices, out);
  const bool by_token = num_choices > 0 && x.values.dim(0) * num_choices == sizes.rows;
  const auto* rows = groups.rows.data<int32_t>();
  const auto* offsets = groups.offsets.data<int32_t>();
  tasks_.clear();
  for (int64_t e = 0; e < sizes.experts; ++e) {
    if (offsets[e] == offsets[e + 1]) continue;
    LinearTask task = TaskOf(x, weight, e, out);
    task.num_rows = offsets[e + 1] - offsets[e];
    if (by_token) {
      task.rows_of_x = rows + offsets[e];
      task.rows_of_x_divisor = num_choices;
    } else {
      task.x = Advance(x.values.raw(), x.values.dtype(), offsets[e] * x.values.stride(0));
      if (x.quantized()) task.x_factors += offsets[e] * x.scales.stride(0);
    }
    task.out = Advance(out.raw(), out.dtype(), offsets[e] * out.stride(0));
    tasks_.push_back(task);
  }
  MultiplyTasks(sizes.outputs);
}

}  // namespace fathom
#endif  // HWY_ONCE
