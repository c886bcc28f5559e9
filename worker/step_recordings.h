// Recordings of steps that come again and again: decoding, where what the host does to queue some
// hundred operations takes longer than the device does to run them.
//
// A shape is recorded when it comes for the second time, so that what comes once costs nothing and
// what an operation does only once is done. Of the recordings the least recently used goes first.
//
// Not thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/device.h"

namespace fathom {

class StepRecordings {
 public:
  static constexpr int kMostRecordings = 64;

  // Steps of equal shape queue the same operations on the same tensors.
  struct Shape {
    int64_t num_sequences = 0;
    int64_t block_table_width = 0;
    bool operator==(const Shape&) const = default;
  };
  // What the tensors belong to besides the model: ids of a KvCache and a Communicator. Recordings
  // of others are forgotten.
  struct Owners {
    int64_t kv_cache_id = 0;
    int64_t communicator_id = 0;
    bool operator==(const Owners&) const = default;
  };

  // `device` must outlive this.
  explicit StepRecordings(Device& device) : device_(device) {}

  // Has the device do what `queue_step` queues, by calling it or by replaying what it queued before
  // for this shape. An error is queue_step's.
  absl::Status Run(const Shape& shape, const Owners& owners,
                   absl::FunctionRef<absl::Status()> queue_step);

  void Clear() { entries_.clear(); }

 private:
  struct Entry {
    Shape shape;
    std::unique_ptr<Recording> recording;  // null when the shape came once
  };

  Device& device_;
  Owners owners_;
  std::list<Entry> entries_;  // the latest first
};

}  // namespace fathom
