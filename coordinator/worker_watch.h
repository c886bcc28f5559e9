// Asks every worker of a group, all the time, whether it is there: a process that is frozen is
// found out within a second, also when no step is under way. /health learns of it: WorkerGroup
// tells Engine, which says on the StatusBoard that no steps can be made.
//
// Nothing breaks by it. A worker may be silent because its host is busy for a moment, and the group
// has its own deadlines (WorkerGroup, proto/endpoint); but meanwhile nobody should be told that
// steps can be made.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "coordinator/worker_group_calls.h"

namespace fathom {

class WorkerWatch {
 public:
  // `peers` outlive this. `on_change` is called when a worker falls silent and when it answers
  // again, from threads of gRPC, one call at a time for each worker.
  WorkerWatch(const std::vector<WorkerPeer>& peers,
              std::function<void(int rank, bool is_silent)> on_change);
  // Returns when no call is under way any more.
  ~WorkerWatch();
  WorkerWatch(const WorkerWatch&) = delete;
  WorkerWatch& operator=(const WorkerWatch&) = delete;

 private:
  struct Worker;

  void Run(const std::stop_token& stop);
  void Ask(Worker& worker);

  const std::function<void(int rank, bool is_silent)> on_change_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::vector<std::unique_ptr<Worker>> workers_;
  int num_asked_ ABSL_GUARDED_BY(mutex_) = 0;
  std::jthread thread_;
};

}  // namespace fathom
