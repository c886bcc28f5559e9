#include "worker/stacked_linear.h"

namespace fathom {
namespace {

int64_t BlocksOf(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

}  // namespace

LinearInputs LinearInputs::Plan(DType act, bool quantize, int64_t rows, int64_t columns,
                                Arena& arena) {
  LinearInputs inputs;
  inputs.plain = arena.Take(act, {rows, columns});
  if (!quantize) return inputs;
  inputs.quantized.values = arena.Take(DType::kF8E4M3, {rows, columns});
  inputs.quantized.scales = arena.Take(DType::kF32, {rows, BlocksOf(columns)});
  return inputs;
}

LinearInputs LinearInputs::Rows(int64_t rows) const { return Part(rows, plain.values.dim(1)); }

LinearInputs LinearInputs::Part(int64_t rows, int64_t columns) const {
  // Dense however wide: the memory is seen anew as rows of this width.
  const auto part = [rows](const Tensor& tensor, int64_t width) {
    return Tensor(tensor.raw(), tensor.dtype(), {rows, width});
  };
  CHECK(rows <= plain.values.dim(0) && columns <= plain.values.dim(1)) << rows << ", " << columns;
  LinearInputs inputs;
  inputs.plain = part(plain.values, columns);
  if (!quantized.present()) return inputs;
  inputs.quantized = {part(quantized.values, columns), part(quantized.scales, BlocksOf(columns))};
  return inputs;
}

InputForms LinearInputs::FormOf(const Weight& weight) const {
  const bool is_quantized =
      quantized.present() && weight.values.dtype() == DType::kF8E4M3 && weight.column_offset == 0;
  return {.plain = !is_quantized, .quantized = is_quantized};
}

const LinearInput& LinearInputs::For(const Weight& weight) const {
  return FormOf(weight).quantized ? quantized : plain;
}

InputForms StackedLinear::FormsOf(const LinearInputs& x) const {
  InputForms forms;
  for (const Weight& weight : weights_) forms = forms | x.FormOf(weight);
  return forms;
}

void StackedLinear::Multiply(const LinearInputs& x, Ops& ops, const Tensor& out) const {
  int64_t column = 0;
  for (const Weight& weight : weights_) {
    const int64_t outputs = weight.values.dim(0);
    ops.Linear(x.For(weight), weight, out.Slice(1, column, column + outputs));
    column += outputs;
  }
  CHECK_EQ(column, out.dim(1));
}

void StackedLinear::Multiply(const LinearInputs& x, const ExpertGroups& groups, int num_choices,
                             Ops& ops, const Tensor& out) const {
  int64_t column = 0;
  for (const Weight& weight : weights_) {
    const int64_t outputs = weight.values.dim(1);
    ops.GroupedLinear(x.For(weight), groups, weight, num_choices,
                      out.Slice(1, column, column + outputs));
    column += outputs;
  }
  CHECK_EQ(column, out.dim(1));
}

}  // namespace fathom
