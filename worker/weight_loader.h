// Checkpoint names to device tensors: reads this rank's slices and nothing else.
//
// Layers first say what they want (Add...), then Plan() checks names, types and shapes against the
// checkpoint's headers and counts bytes, and Load() reads. Row slices are one read; column slices
// are one read per row, or, where rows are so short that the disk delivers the gaps anyway, reads
// that run across. Above what it loads it needs a few MiB and, where a type is converted, one
// tensor's slice.
//
// Errors: NotFound for a missing tensor, InvalidArgument for a wrong type or shape, with file,
// name, what was found and what was expected; DataLoss when reading fails; ResourceExhausted when
// the device is full. Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/safetensors.h"
#include "worker/shard_layout.h"

namespace fathom {

enum class Quantization { kNone, kFp8 };

// Bytes of the checkpoint read so far, of how many. Called from the loading thread, often.
using LoadProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;

struct WeightLoaderOptions {
  DType dtype = DType::kF32;  // of activations, and so of weights that are dequantised at load
  Quantization quantization = Quantization::kNone;  // kFp8: quantise linear layers that are not yet
  bool accept_fp8 = false;                          // config.json announces F8_E4M3 weights
};

// A rectangle of a checkpoint's matrix.
struct MatrixPart {
  int64_t num_rows = 0;  // of the whole matrix
  int64_t num_columns = 0;
  Range rows;  // the part
  Range columns;

  static MatrixPart Whole(int64_t num_rows, int64_t num_columns) {
    return {num_rows, num_columns, {0, num_rows}, {0, num_columns}};
  }
  static MatrixPart Rows(int64_t num_rows, int64_t num_columns, const Range& rows) {
    return {num_rows, num_columns, rows, {0, num_columns}};
  }
  static MatrixPart Columns(int64_t num_rows, int64_t num_columns, const Range& columns) {
    return {num_rows, num_columns, {0, num_rows}, columns};
  }
};

class WeightLoader {
 public:
  // `checkpoint` must outlive the loader.
  WeightLoader(const WeightLoaderOptions& options, const Checkpoint& checkpoint)
      : options_(options), checkpoint_(checkpoint) {}

  // What is wanted. The outputs must stay in place until Load.

  // A norm's weight or a bias.   checkpoint F32 or BF16 [size]   out [size] f32
  void AddVector(const std::string& name, int64_t size, Tensor& out);
  // A matrix that is never quantised (embedding, head, router).   F32 or BF16, as in the checkpoint
  void AddTable(const std::string& name, const MatrixPart& part, Tensor& out);
  // A linear layer.   F32, BF16 or F8_E4M3 with NAME_scale_inv, as in the checkpoint or quantised
  void AddLinear(const std::string& name, const MatrixPart& part, Weight& out);
  // The same part of one linear layer per expert.   out [E, rows, columns]
  void AddLinearStack(const std::vector<std::string>& names, const MatrixPart& part, Weight& out);
  // kv_b_proj, split for attention in the latent space and dequantised to the activations' type.
  //   checkpoint [num_attention_heads * (nope + v), R], per head first the keys' rows
  //   w_uk [A, R, nope], transposed   w_uv [A, v, R]
  void AddKvB(const std::string& name, const ModelConfig& config, const Range& heads, Tensor& w_uk,
              Tensor& w_uv);

  struct Footprint {
    int64_t weight_bytes = 0;  // on the device, exactly
    int64_t read_bytes = 0;    // from the checkpoint
  };
  absl::StatusOr<Footprint> Plan() const;

  // Fills every output; the tensors view the returned buffers.
  absl::StatusOr<std::vector<Buffer>> Load(Device& device, const LoadProgress& progress);

  // Checkpoint names that were asked for, factors included whether or not there are any.
  std::vector<std::string> Names() const;

 private:
  friend class WeightPlanner;
  friend class WeightReader;

  struct Vector {
    std::string name;
    int64_t size;
    Tensor* out;
  };
  struct Table {
    std::string name;
    MatrixPart part;
    Tensor* out;
  };
  struct Linear {
    std::vector<std::string> names;  // one, or one per expert of a stack
    MatrixPart part;
    bool is_stack;
    Weight* out;
  };
  struct KvB {
    std::string name;
    int num_heads, nope_dim, v_dim, kv_lora_rank;  // of the whole model
    Range heads;
    Tensor* w_uk;
    Tensor* w_uv;
    MatrixPart PartOfHead(int64_t head) const;
  };
  using Wish = std::variant<Vector, Table, Linear, KvB>;

  const WeightLoaderOptions options_;
  const Checkpoint& checkpoint_;
  std::vector<Wish> wishes_;
};

}  // namespace fathom
