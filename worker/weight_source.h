// Where weights come from: a checkpoint, or random numbers in its place.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/device.h"
#include "kernels/tensor.h"
#include "worker/safetensors.h"
#include "worker/shard_layout.h"

namespace fathom {

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

// Part of a matrix, and the memory of a device that it is to fill.
struct WeightRead {
  std::string name;
  DType type = DType::kF32;  // as it is stored
  MatrixPart part;
  Tensor target;  // [part.rows, part.columns] of `type`, dense
};

// Told of each piece that has been read: its bytes, as they are stored.
using ReadProgress = std::function<void(int64_t num_bytes)>;

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // Of which of `types` the tensor is, which must have this shape. NotFound or InvalidArgument say
  // what was found and what was expected. Thread-safe.
  virtual absl::StatusOr<DType> TypeOf(const std::string& name, absl::Span<const int64_t> shape,
                                       absl::Span<const DType> types) const = 0;

  // The values of a vector, on the host. DataLoss when reading fails.
  // REQUIRES: `type` is what TypeOf said. Not thread-safe.
  virtual absl::Status ReadVector(const std::string& name, DType type,
                                  std::vector<float>& values) = 0;

  // Fills the targets in this order. After each, on_read is called with its index: what is queued
  // on the device from then on finds it there, and what on_read queues is done before the next
  // target is written, which may therefore be the same memory. The rest is as of ReadVector.
  virtual absl::Status ReadMatrices(absl::Span<const WeightRead> reads, Device& device,
                                    const ReadProgress& progress,
                                    absl::FunctionRef<void(size_t)> on_read) = 0;

  // The checkpoint behind it; null if there is none.
  virtual const Checkpoint* checkpoint() const { return nullptr; }
};

// Slices of a checkpoint. Row slices are one read; column slices are one read per row, or, where
// rows are so short that the disk delivers the gaps anyway, reads that run across. Several threads
// read ahead of the copies to the device, into some MiB of memory each.
class CheckpointWeights final : public WeightSource {
 public:
  // `checkpoint` must outlive this. 0 threads: as many as pay.
  explicit CheckpointWeights(const Checkpoint& checkpoint, int num_threads = 0);

  absl::StatusOr<DType> TypeOf(const std::string& name, absl::Span<const int64_t> shape,
                               absl::Span<const DType> types) const override;
  absl::Status ReadVector(const std::string& name, DType type, std::vector<float>& values) override;
  absl::Status ReadMatrices(absl::Span<const WeightRead> reads, Device& device,
                            const ReadProgress& progress,
                            absl::FunctionRef<void(size_t)> on_read) override;
  const Checkpoint* checkpoint() const override { return &checkpoint_; }

 private:
  const Checkpoint& checkpoint_;
  const int num_threads_;
};

// A model without a checkpoint, to measure speed and to try a machine: linear layers in F8_E4M3 if
// they may be, else all in BF16. Numbers are uniform with a variance of 1 / (width of the matrix),
// so that outputs are as large as inputs; norms are 1 and biases 0. So what a layer adds to the
// hidden state is of order one, whatever the depth, and everything stays finite.
//
// The same tensor has the same numbers on every rank that holds the same part of it.
class RandomWeights final : public WeightSource {
 public:
  absl::StatusOr<DType> TypeOf(const std::string& name, absl::Span<const int64_t> shape,
                               absl::Span<const DType> types) const override;
  absl::Status ReadVector(const std::string& name, DType type, std::vector<float>& values) override;
  absl::Status ReadMatrices(absl::Span<const WeightRead> reads, Device& device,
                            const ReadProgress& progress,
                            absl::FunctionRef<void(size_t)> on_read) override;
};

}  // namespace fathom
