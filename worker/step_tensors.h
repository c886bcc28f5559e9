// A step's vectors where the device can read them: the host's own memory on the CPU, elsewhere a
// copy in memory that grows to the largest step and stays.
//
// Not thread-safe.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/step_batch.h"

namespace fathom {

class StepTensors {
 public:
  // `device` must outlive this.
  explicit StepTensors(Device& device) : device_(device) {}

  // Everything below is of this batch from now on. It must outlive its use where the device shares
  // the host's memory. ResourceExhausted when the device has no room for the copy.
  absl::Status Set(const StepBatch& batch);

  const Tensor& token_ids() const { return token_ids_; }    // [T] i32
  const Tensor& positions() const { return positions_; }    // [T] i32
  const Tensor& places() const { return places_; }          // [T] i32
  const Tensor& logit_rows() const { return logit_rows_; }  // [L] i32
  const AttentionBatch& attention() const { return attention_; }

 private:
  Device& device_;
  Buffer memory_;
  std::vector<int32_t> packed_;  // all vectors, to be copied at once

  Tensor token_ids_, positions_, places_, logit_rows_;
  AttentionBatch attention_;
};

}  // namespace fathom
