#include "coordinator/group_formation.h"

#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/group_plan.h"
#include "coordinator/worker_group_calls.h"
#include "coordinator/worker_streams.h"
#include "spdlog/spdlog.h"

namespace fathom {

absl::StatusOr<std::unique_ptr<WorkerGroup>> FormGroup(
    const GroupOptions& options, uint64_t last_epoch, std::stop_token stop,
    const std::function<void(const std::string& line)>& report_progress,
    std::function<void()> on_event) {
  CHECK(!options.addresses.empty());
  ASSIGN_OR_RETURN(std::vector<WorkerPeer> peers, DialAll(options));
  ASSIGN_OR_RETURN(const std::vector<v1::DescribeResponse> descriptions,
                   DescribeAll(options, peers, stop, report_progress));
  const GroupPlanOptions plan_options{.version = options.version,
                                      .block_size = options.block_size,
                                      .max_tokens_per_step = options.max_tokens_per_step,
                                      .max_sequences = options.max_sequences,
                                      .max_model_len = options.max_model_len,
                                      .collectives = options.collectives};
  ASSIGN_OR_RETURN(GroupPlan plan, PlanGroup(plan_options, descriptions, options.addresses));
  const auto level = options.is_plan_known ? spdlog::level::debug : spdlog::level::info;
  for (const std::string& line : DescribePlan(plan, descriptions)) spdlog::log(level, "{}", line);

  const uint64_t epoch = NextEpoch(last_epoch, descriptions);
  const absl::Status joined = JoinAll(options, peers, epoch, plan, stop, report_progress);
  if (!joined.ok()) {
    AbortAll(peers, epoch, options.abort_timeout);
    return joined;
  }
  std::vector<std::string> names;
  for (const WorkerPeer& peer : peers) names.push_back(peer.name);
  auto group =
      std::make_unique<WorkerGroup>(WorkerGroup::Options{.epoch = epoch,
                                                         .plan = std::move(plan),
                                                         .worker_names = std::move(names),
                                                         .step_timeout = options.step_timeout},
                                    std::move(on_event));
  group->Connect(std::make_unique<WorkerStreams>(*group, std::move(peers), options.abort_timeout));
  return group;
}

}  // namespace fathom
