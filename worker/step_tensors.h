// A step's vectors where the device can read them: the host's own memory on the CPU, elsewhere a
// copy, made at once into memory that is planned for the largest step.
//
// Where they are copied, their addresses depend on the shape of the step alone (tokens, rows of
// logits, sequences, width of the block tables), so that a step can be recorded and replayed with
// other numbers; and block tables are padded to a power of two, so that there are few shapes.
//
// Not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/step_batch.h"

namespace fathom {

// The largest step.
struct StepTensorsOptions {
  int64_t max_tokens = 0;
  int64_t max_logit_rows = 0;
  int64_t max_sequences = 0;
  int64_t max_blocks = 0;  // of one sequence
};

class StepTensors {
 public:
  // `device` must outlive this.
  StepTensors(const StepTensorsOptions& options, Device& device)
      : options_(options), device_(device) {}

  // Device memory that Allocate takes: none where the device shares the host's.
  static int64_t MemoryBytes(const StepTensorsOptions& options, const Device& device);
  // ResourceExhausted when the device has no room. Once, before the first Set.
  absl::Status Allocate();

  // Everything below is of this batch from now on. It must outlive its use.
  void Set(const StepBatch& batch);

  const Tensor& token_ids() const { return token_ids_; }    // [T] i32
  const Tensor& positions() const { return positions_; }    // [T] i32
  const Tensor& places() const { return places_; }          // [T] i32
  const Tensor& logit_rows() const { return logit_rows_; }  // [L] i32
  const AttentionBatch& attention() const { return attention_; }

 private:
  const StepTensorsOptions options_;
  Device& device_;
  Buffer memory_;
  std::vector<int32_t> packed_;  // all vectors, to be copied at once

  Tensor token_ids_, positions_, places_, logit_rows_;
  AttentionBatch attention_;
};

}  // namespace fathom
