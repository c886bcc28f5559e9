// A model folder's config.json and a profile, posing as a shard: no weights, no memory for KV, no
// collectives. What the service, its streams and the slot table see is as with a model.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/model_config.h"
#include "worker/shard_host.h"
#include "worker/sim_profile.h"

namespace fathom {

struct SimulatedKeeperOptions {
  std::string model_directory;  // needs no more than config.json
  std::string profile_file;     // sim_profile
};

class SimulatedKeeper final : public ShardHost {
 public:
  // Errors as of ReadModelConfig; NotFound or InvalidArgument in one line that names the profile.
  static absl::StatusOr<std::unique_ptr<SimulatedKeeper>> Open(
      const SimulatedKeeperOptions& options);

  // The fingerprint tells of configuration and profile.
  void Describe(v1::DescribeResponse& response) const override;
  // Everything takes 0 bytes; the capacity is the profile's.
  absl::StatusOr<WorkerMemoryPlan> Plan(const v1::ShardSpec& spec) const override;
  absl::Status PrepareGrammar(const Grammar& grammar) override;
  absl::StatusOr<std::shared_ptr<StepMaker>> Join(const ShardJoin& join) override;

 private:
  SimulatedKeeper(ModelConfig config, SimProfile profile, std::string fingerprint)
      : config_(std::move(config)), profile_(profile), fingerprint_(std::move(fingerprint)) {}

  const ModelConfig config_;
  const SimProfile profile_;
  const std::string fingerprint_;
};

}  // namespace fathom
