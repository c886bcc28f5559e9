#include "coordinator/status_board.h"

#include <utility>

namespace fathom {

StatusBoard::StatusBoard(v1::ServerInfo initial,
                         std::function<void(bool serving)> on_serving_changed)
    : on_serving_changed_(std::move(on_serving_changed)), info_(std::move(initial)) {}

v1::ServerInfo StatusBoard::server_info() const {
  const std::lock_guard lock(mutex_);
  return info_;
}

std::optional<ModelLimits> StatusBoard::model_limits() const {
  const std::lock_guard lock(mutex_);
  return limits_;
}

void StatusBoard::SetState(v1::ServerInfo::State state, const std::string& detail) {
  const std::lock_guard lock(mutex_);
  const bool is_draining = info_.state() == v1::ServerInfo::STATE_DRAINING;
  if (is_draining && state != v1::ServerInfo::STATE_DRAINING) return;
  const bool was_serving = info_.state() == v1::ServerInfo::STATE_SERVING;
  const bool is_serving = state == v1::ServerInfo::STATE_SERVING;
  info_.set_state(state);
  info_.set_state_detail(detail);
  // Under the lock, so that calls come in the order of the changes.
  if (was_serving != is_serving && on_serving_changed_) on_serving_changed_(is_serving);
}

void StatusBoard::SetGroup(uint64_t epoch, const ModelLimits& limits, int block_size,
                           int num_kv_blocks) {
  const std::lock_guard lock(mutex_);
  info_.set_epoch(epoch);
  info_.set_block_size(block_size);
  info_.set_num_kv_blocks(num_kv_blocks);
  info_.set_num_free_kv_blocks(num_kv_blocks);
  limits_ = limits;
}

void StatusBoard::CountStep() {
  const std::lock_guard lock(mutex_);
  info_.set_steps(info_.steps() + 1);
}

void StatusBoard::SetLoad(const Load& load) {
  const std::lock_guard lock(mutex_);
  info_.set_num_running(load.num_running);
  info_.set_num_waiting(load.num_waiting);
  info_.set_num_free_kv_blocks(load.num_free_kv_blocks);
}

}  // namespace fathom
