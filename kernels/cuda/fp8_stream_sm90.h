// FP8 linear layers for few tokens on Hopper: weights in 128×128 blocks, activations in 1×128, as
// Ops::Linear and Ops::GroupedLinear mean it, dense or by expert.
//
// With up to 16 tokens a weight is worth reading and little else, so the kernel is a stream of
// weights: all SMs take equal, contiguous shares of all matrices' blocks of 128 columns, and a
// share may end in the middle of a row of blocks. What several shares computed of the same outputs
// is added up in the order of the shares: the same bits on every run. Weights are the wide side of
// the matrix products and tokens the narrow one, eight or 16. Where it is known which weights are
// needed, they are copied before the kernels before this one end.
//
// Source of the arithmetic: DeepSeek-V3 report §3.3.2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fathom {

class Fp8StreamSm90 {
 public:
  static constexpr int kMaxTokens = 16;  // of one chunk

  struct Input {
    const void* values = nullptr;   // [rows, k] e4m3, 16-byte aligned, as is row_bytes
    const float* scales = nullptr;  // [rows, k / 128]
    int64_t rows = 0;
    int64_t row_bytes = 0;  // from one row's values to the next one's
  };
  // Gate and up of the sorted rows, [rows, 2 · k] bf16, [gate | up]; 16-byte aligned rows.
  struct GateUp {
    const void* values = nullptr;
    int64_t row_bytes = 0;
  };
  struct Weight {
    const void* values = nullptr;      // [num_matrices, n, k] e4m3, 16-byte aligned
    const float* scale_inv = nullptr;  // [num_matrices, ⌈n / 128⌉, k / 128]
    int64_t num_matrices = 1;
    int n = 0;  // a multiple of 64
    int k = 0;  // a multiple of 128
  };
  enum class OutputType { kBf16, kF32 };
  struct Output {
    void* values = nullptr;  // [rows, n], 16-byte aligned, as is every row
    OutputType type = OutputType::kBf16;
    int64_t row_stride = 0;  // elements
    float kept = 0.0f;       // which share of it the L2 should keep; the rest it may forget first
  };
  // Which rows go to which matrix (expert_chunks.h), in device memory.
  struct Groups {
    const int* notes = nullptr;  // chunks of at most max_count rows
    const int* rows = nullptr;   // sorted row i is row rows[i] / divisor of the input; null: row i
    int divisor = 1;
    int max_count = 0;  // at most kMaxTokens
    // Whether notes and rows were complete before the kernel before this one was launched; then
    // weights are copied before that one ends. GroupedLinear without this lets no kernel launch
    // before its own predecessors are complete: what it was given early is so for all that follow.
    bool complete_early = false;
    int64_t num_rows = 0;    // that `rows` has
    int64_t max_chunks = 0;  // that `notes` has room for
  };

  // Device memory that the calls below share.
  static int64_t WorkspaceBytes(int num_multiprocessors);

  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);
  // Whether it can multiply by this weight.
  static bool Supports(const Weight& weight);

  // REQUIRES: workspace of WorkspaceBytes, 256-byte aligned; written here, complete on return, and
  // left as it was by every call. Does not own it.
  Fp8StreamSm90(void* workspace, int num_multiprocessors);

  // out[i] = x[i] · weightᵀ, one matrix; every 16 rows read it again. No kernel of the stream may
  // write the weight: it is read before they end.
  void Linear(const Input& x, const Weight& weight, const Output& out, cudaStream_t stream) const;

  // out[i] = x[row of i] · weight[expert of i]ᵀ for the sorted rows i.
  void GroupedLinear(const Input& x, const Groups& groups, const Weight& weight, const Output& out,
                     cudaStream_t stream) const;

  // What one token's experts add up to: out[0] = Σ shares[rows[i]] · (silu(gate[i]) * up[i]) ·
  // weight[expert of i]ᵀ over its sorted rows i, 0 if it has none. Activations are rounded to bf16,
  // then 1×128. groups.max_count: 1; divisor does not count.
  void JoinedLinear(const GateUp& gate_up, const Groups& groups, const float* shares,
                    const Weight& weight, const Output& out, cudaStream_t stream) const;

 private:
  void* workspace_;
  int num_multiprocessors_;
};

}  // namespace fathom
