#include "deploy/launcher/process_plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Not;

const Places kPlaces = {.program_dir = "/opt/fathom/bin", .run_dir = "/run/user/7/fathom-ab12cd"};

ServeOptions Workers(int number) {
  ServeOptions options;
  options.model_dir = "/models/v3";
  options.tensor_parallel_size = number;
  return options;
}

// The values that follow a flag.
std::vector<std::string> ValuesOf(const std::vector<std::string>& arguments,
                                  const std::string& flag) {
  std::vector<std::string> values;
  for (size_t i = 0; i + 1 < arguments.size(); ++i) {
    if (arguments[i] == flag) values.push_back(arguments[i + 1]);
  }
  return values;
}

TEST(ProcessPlanTest, StartsWorkersThenCoordinatorThenGateway) {
  const std::vector<ProcessSpec> plan = PlanProcesses(Workers(3), kPlaces);
  std::vector<std::string> names;
  for (const ProcessSpec& process : plan) names.push_back(process.name);
  EXPECT_THAT(names, ElementsAre("worker 0", "worker 1", "worker 2", "coordinator", "gateway"));
}

TEST(ProcessPlanTest, WorkersEndLast) {
  for (const ProcessSpec& process : PlanProcesses(Workers(2), kPlaces)) {
    const bool is_worker = process.name.find("worker") == 0;
    EXPECT_EQ(process.stop_stage, is_worker ? 1 : 0) << process.name;
  }
}

TEST(ProcessPlanTest, TheProcessesFindEachOther) {
  const std::vector<ProcessSpec> plan = PlanProcesses(Workers(2), kPlaces);
  const std::string worker = ValuesOf(plan[0].arguments, "--listen").at(0);
  const std::string other = ValuesOf(plan[1].arguments, "--listen").at(0);
  EXPECT_EQ(worker, "unix:/run/user/7/fathom-ab12cd/worker-0.sock");
  EXPECT_THAT(ValuesOf(plan[2].arguments, "--workers"), ElementsAre(worker + "," + other));
  EXPECT_EQ(ValuesOf(plan[2].arguments, "--listen"), ValuesOf(plan[3].arguments, "--coordinator"));
}

TEST(ProcessPlanTest, EveryWorkerAndItsCheckGetTheProfile) {
  ServeOptions options = Workers(2);
  EXPECT_THAT(PlanProcesses(options, kPlaces)[0].arguments, Not(Contains("--sim-profile")));
  options.device = "sim";
  options.sim_profile = "h200.json";
  const std::vector<ProcessSpec> plan = PlanProcesses(options, kPlaces);
  EXPECT_THAT(ValuesOf(plan[1].arguments, "--sim-profile"), ElementsAre("h200.json"));
  EXPECT_THAT(ValuesOf(PlanWorkerCheck(options, "/opt").arguments, "--sim-profile"),
              ElementsAre("h200.json"));
}

TEST(ProcessPlanTest, LetsGrpcClientsInOnlyWhenAsked) {
  const auto listening = [](const ServeOptions& options) {
    return ValuesOf(PlanProcesses(options, kPlaces)[1].arguments, "--listen");
  };
  ServeOptions options;
  EXPECT_THAT(listening(options), Not(Contains("127.0.0.1:50051")));
  options.grpc_listen = "127.0.0.1:50051";
  EXPECT_THAT(listening(options), Contains("127.0.0.1:50051"));
}

TEST(ProcessPlanTest, TheModelIsServedUnderItsNames) {
  ServeOptions options = Workers(1);
  EXPECT_EQ(ServedModelName(options), "/models/v3");
  options.served_model_names = {"v3", "deepseek"};
  EXPECT_EQ(ServedModelName(options), "v3");
  const std::vector<ProcessSpec> plan = PlanProcesses(options, kPlaces);
  EXPECT_THAT(ValuesOf(plan[1].arguments, "--served-model-name"), ElementsAre("v3"));
  const std::vector<std::string>& gateway = plan[2].arguments;
  EXPECT_THAT(std::vector<std::string>(gateway.end() - 3, gateway.end()),
              ElementsAre("--served-model-name", "v3", "deepseek"));
}

TEST(ProcessPlanTest, TheCheckSeesWhatTheWorkersWillSee) {
  ServeOptions options = Workers(8);
  options.dtype = "bfloat16";
  options.max_model_len = 4096;
  const std::vector<std::string> check = PlanWorkerCheck(options, kPlaces.program_dir).arguments;
  EXPECT_EQ(check[0], "/opt/fathom/bin/fathom-worker");
  EXPECT_THAT(check, Contains("--check"));
  EXPECT_THAT(ValuesOf(check, "--world-size"), ElementsAre("8"));
  EXPECT_THAT(ValuesOf(check, "--max-model-len"), ElementsAre("4096"));
  const std::vector<std::string> worker = PlanProcesses(options, kPlaces)[0].arguments;
  for (const char* flag :
       {"--model", "--dtype", "--quantization", "--activation-quantization", "--load-format",
        "--kv-cache-dtype", "--gpu-memory-utilization", "--threads", "--device"}) {
    EXPECT_EQ(ValuesOf(check, flag), ValuesOf(worker, flag)) << flag;
    EXPECT_EQ(ValuesOf(check, flag).size(), 1) << flag;
  }
}

TEST(ProcessPlanTest, WorkersHaveTheirGpusAndShareTheMemoryOfOne) {
  const auto flags_of = [](const ServeOptions& options, const std::string& flag) {
    std::vector<std::string> values;
    for (int rank = 0; rank < options.tensor_parallel_size; ++rank) {
      const auto found = ValuesOf(PlanProcesses(options, kPlaces)[rank].arguments, flag);
      values.insert(values.end(), found.begin(), found.end());
    }
    return values;
  };
  ServeOptions options = Workers(3);
  EXPECT_THAT(flags_of(options, "--gpu"), ElementsAre());
  options.device = "cuda";
  EXPECT_THAT(flags_of(options, "--gpu"), ElementsAre("0", "1", "2"));
  options.gpus = {5, 2, 5};
  EXPECT_THAT(flags_of(options, "--gpu"), ElementsAre("5", "2", "5"));
  EXPECT_THAT(flags_of(options, "--gpu-memory-utilization"), ElementsAre("0.45", "0.9", "0.45"));
  // The check is made for a worker with the least memory.
  const std::vector<std::string> check = PlanWorkerCheck(options, kPlaces.program_dir).arguments;
  EXPECT_THAT(ValuesOf(check, "--gpu"), ElementsAre("5"));
  EXPECT_THAT(ValuesOf(check, "--gpu-memory-utilization"), ElementsAre("0.45"));
}

TEST(ProcessPlanTest, EveryGroupHasItsWorkersAndTheyShareTheHost) {
  ServeOptions options = Workers(2);
  options.data_parallel_size = 3;
  const std::vector<ProcessSpec> plan = PlanProcesses(options, kPlaces);
  ASSERT_EQ(plan.size(), 8);
  EXPECT_EQ(plan[5].name, "worker 5");
  EXPECT_THAT(ValuesOf(plan[5].arguments, "--gpu-memory-utilization"), ElementsAre("0.3"));
  EXPECT_THAT(ValuesOf(plan[6].arguments, "--data-parallel-size"), ElementsAre("3"));
  const std::vector<std::string> addresses = ValuesOf(plan[6].arguments, "--workers");
  ASSERT_EQ(addresses.size(), 1);
  EXPECT_EQ(std::count(addresses[0].begin(), addresses[0].end(), ','), 5);

  options.device = "cuda";
  options.gpus = {0, 1, 2, 3, 4, 4};
  EXPECT_THAT(ValuesOf(PlanProcesses(options, kPlaces)[3].arguments, "--gpu"), ElementsAre("3"));
  const std::vector<std::string> check = PlanWorkerCheck(options, kPlaces.program_dir).arguments;
  EXPECT_THAT(ValuesOf(check, "--gpu"), ElementsAre("4"));
  EXPECT_THAT(ValuesOf(check, "--rank"), ElementsAre("0")) << "within its group";
  EXPECT_THAT(ValuesOf(check, "--world-size"), ElementsAre("2"));
}

TEST(ProcessPlanTest, EveryWorkerHasAThread) {
  ServeOptions options = Workers(1024);
  const auto threads = [](const ServeOptions& o) {
    return ValuesOf(PlanProcesses(o, kPlaces)[0].arguments, "--threads");
  };
  EXPECT_THAT(threads(options), ElementsAre("1"));
  options.threads = 5;
  EXPECT_THAT(threads(options), ElementsAre("5"));
}

TEST(ProcessPlanTest, KnowsTheLongestSocketPath) {
  EXPECT_EQ(LongestSocketPath({}, "/run"), std::string("/run/coordinator.sock").size());
}

}  // namespace
}  // namespace fathom
