// Progress of all workers' loading as one line, e.g.
//   loading weights: 43 % (12.3 GiB of 28.6 GiB, 1.2 GiB/s, 14 s left)
//   connecting: 6 of 8 workers ready
//
// Time is an argument. Not thread-safe.
#pragma once

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/worker.pb.h"

namespace fathom {

class LoadProgress {
 public:
  // `now` is monotonic, from any origin.
  LoadProgress(int num_workers, absl::Duration now) : latest_(num_workers), started_(now) {}

  void Report(int rank, const v1::JoinProgress& progress) { latest_[rank] = progress; }

  // Of the phase that the slowest worker is in; rate and time left once bytes have been read.
  std::string Line(absl::Duration now) const;

 private:
  std::vector<v1::JoinProgress> latest_;  // by rank
  const absl::Duration started_;
};

}  // namespace fathom
