// Linear layers that read the same input, as one, and that input in the form they can read.
//
// Values, free to copy; thread-compatible.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/arena.h"

namespace fathom {

// Which forms of its input a part of the model reads.
struct InputForms {
  bool plain = false;
  bool quantized = false;
  InputForms operator|(const InputForms& other) const {
    return {plain || other.plain, quantized || other.quantized};
  }
};

// The same rows in the two forms that a linear layer may read: in act and, if activations are
// quantised, in 1×128. As scratch both have memory; of a step's input only what is read of it is
// written.
struct LinearInputs {
  static LinearInputs Plan(DType act, bool quantize, int64_t rows, int64_t columns, Arena& arena);

  // The first rows.
  LinearInputs Rows(int64_t rows) const;
  // The first rows and columns.
  LinearInputs Part(int64_t rows, int64_t columns) const;

  // F8_E4M3 weights read quantised rows, if there are any and the blocks of both begin together.
  InputForms FormOf(const Weight& weight) const;
  const LinearInput& For(const Weight& weight) const;

  LinearInput plain;      // [T, K] act
  LinearInput quantized;  // [T, K], absent unless activations are quantised
};

// Layers one below the other, so that one multiplication serves them all: gate_proj above up_proj,
// q_a_proj above kv_a_proj_with_mqa. Where their types differ, or blocks of F8_E4M3 would not line
// up, they stay apart and write to their columns of the same output.
class StackedLinear {
 public:
  StackedLinear() = default;
  // Together [N, K] or, for experts, [E, N, K].
  explicit StackedLinear(std::vector<Weight> weights) : weights_(std::move(weights)) {}

  // Usually one.
  const std::vector<Weight>& weights() const { return weights_; }
  InputForms FormsOf(const LinearInputs& x) const;

  // out = x · weightᵀ   x [T, K]   out [T, N]
  void Multiply(const LinearInputs& x, Ops& ops, const Tensor& out) const;
  // The same for experts, as Ops::GroupedLinear.
  void Multiply(const LinearInputs& x, const ExpertGroups& groups, int num_choices, Ops& ops,
                const Tensor& out) const;

 private:
  std::vector<Weight> weights_;
};

}  // namespace fathom
