// Checkpoint names to device tensors: reads this rank's slices and nothing else.
//
// Layers first say what they want (Add...), then Plan() checks names, types and shapes against what
// the source has and counts bytes, and Load() reads. Above what it loads it needs one tensor's
// slice where a type is converted.
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
#include "worker/model_config.h"
#include "worker/shard_layout.h"
#include "worker/stacked_linear.h"
#include "worker/weight_source.h"

namespace fathom {

enum class Quantization { kNone, kFp8 };

// Bytes of the checkpoint read so far, of how many. Called from the loading thread, often.
using LoadProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;

struct WeightLoaderOptions {
  DType dtype = DType::kF32;  // of activations, and so of weights that are dequantised at load
  Quantization quantization = Quantization::kNone;  // kFp8: quantise linear layers that are not yet
  bool accept_fp8 = false;                          // config.json announces F8_E4M3 weights
};

// A linear layer of the checkpoint and the part of it that is wanted.
struct LinearPart {
  std::string name;
  MatrixPart part;
};

class WeightLoader {
 public:
  // `source` must outlive the loader.
  WeightLoader(const WeightLoaderOptions& options, WeightSource& source)
      : options_(options), source_(source) {}

  // What is wanted. The outputs must stay in place until Load.

  // A norm's weight or a bias.   checkpoint F32 or BF16 [size]   out [size] f32
  void AddVector(const std::string& name, int64_t size, Tensor& out);
  // A matrix that is never quantised (embedding, head, router).   F32 or BF16, as in the checkpoint
  void AddTable(const std::string& name, const MatrixPart& part, Tensor& out);
  // A linear layer.   F32, BF16 or F8_E4M3 with NAME_scale_inv, as in the checkpoint or quantised
  void AddLinear(const LinearPart& layer, Weight& out);
  // Layers of the same width, one below the other; see StackedLinear for when they stay apart.
  void AddStackedLinear(const std::vector<LinearPart>& layers, StackedLinear& out);
  // The same for experts, each with equally large parts of as many layers, in the same types.
  //   out [E, rows, columns]
  void AddExperts(const std::vector<LinearPart>& experts, Weight& out);
  void AddStackedExperts(const std::vector<std::vector<LinearPart>>& experts, StackedLinear& out);
  // Whether Plan would find them as AddExperts and AddStackedExperts want them.
  bool CanStack(const std::vector<LinearPart>& experts) const;
  bool CanStack(const std::vector<std::vector<LinearPart>>& experts) const;

  // kv_b_proj, split for attention in the latent space and dequantised to the activations' type.
  //   checkpoint [num_attention_heads * (nope + v), R], per head first the keys' rows
  //   w_uk [A, R, nope], transposed   w_uv [A, v, R]
  void AddKvB(const std::string& name, const ModelConfig& config, const Range& heads, Tensor& w_uk,
              Tensor& w_uv);

  struct Footprint {
    int64_t weight_bytes = 0;   // on the device, exactly
    int64_t read_bytes = 0;     // from the checkpoint
    int64_t scratch_bytes = 0;  // on the device while loading: the largest slice to be converted
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
    std::vector<std::vector<LinearPart>> experts;  // one, or one per expert of a stack
    bool is_stack;                                 // whether the result has a dimension of experts
    std::variant<Weight*, StackedLinear*> out;     // the first for single layers
  };
  struct KvB {
    std::string name;
    int num_heads, nope_dim, v_dim, kv_lora_rank;  // of the whole model
    Range heads;
    Tensor* w_uk;
    Tensor* w_uv;
    LinearPart Heads() const;  // whose rows follow each other
  };
  static std::vector<std::vector<LinearPart>> OneLayerEach(const std::vector<LinearPart>& experts);
  using Wish = std::variant<Vector, Table, Linear, KvB>;

  const WeightLoaderOptions options_;
  WeightSource& source_;
  std::vector<Wish> wishes_;
};

}  // namespace fathom
