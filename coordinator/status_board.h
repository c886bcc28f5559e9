// What the outside may know of the coordinator: is it serving, which model, how busy.
//
// StepLoop and Engine write; generate_service, the health service and tests read. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

#include "proto/generate.pb.h"

namespace fathom {

// What a request must keep to.
struct ModelLimits {
  v1::ModelInfo model;
  int64_t kv_cache_tokens = 0;  // that one sequence may occupy
};

class StatusBoard {
 public:
  // `on_serving_changed` is called whenever the answer to "can steps be made?" changes, one call at
  // a time, from the thread that changed it.
  StatusBoard(v1::ServerInfo initial, std::function<void(bool serving)> on_serving_changed);

  v1::ServerInfo server_info() const;
  // Absent until the first group has formed; then what the last one had.
  std::optional<ModelLimits> model_limits() const;

  // DRAINING is for good: after it only the details change.
  void SetState(v1::ServerInfo::State state, const std::string& detail);
  void SetGroup(uint64_t epoch, const ModelLimits& limits, int block_size, int num_kv_blocks);

  void CountStep();

  struct Load {
    int num_running = 0;
    int num_waiting = 0;
    int num_free_kv_blocks = 0;
  };
  void SetLoad(const Load& load);

 private:
  const std::function<void(bool serving)> on_serving_changed_;
  mutable std::mutex mutex_;
  v1::ServerInfo info_;                // guarded by mutex_
  std::optional<ModelLimits> limits_;  // guarded by mutex_
};

}  // namespace fathom
