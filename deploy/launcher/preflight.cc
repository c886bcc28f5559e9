#include "deploy/launcher/preflight.h"

#include <sys/wait.h>
#include <sysexits.h>

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "deploy/launcher/child_process.h"
#include "deploy/launcher/log_output.h"
#include "deploy/launcher/process_plan.h"

namespace fathom {
namespace {

// What a program logged, without prefixes and without what its libraries print between.
std::string ReasonIn(absl::string_view log) {
  std::vector<absl::string_view> all;
  std::vector<absl::string_view> logged;
  for (const absl::string_view line : absl::StrSplit(absl::StripAsciiWhitespace(log), '\n')) {
    all.push_back(line);
    const absl::string_view text = WithoutLogPrefix(line);
    if (text.size() < line.size()) logged.push_back(text);
  }
  return absl::StrJoin(logged.empty() ? all : logged, "\n");
}

// Its standard output.
absl::StatusOr<std::string> RunCheck(const ProcessSpec& check) {
  ASSIGN_OR_RETURN(FinishedProcess finished, RunToEnd(check.arguments));
  if (finished.wait_status == 0) return std::move(finished.output);
  const std::string reason = ReasonIn(finished.errors);
  if (!WIFEXITED(finished.wait_status) || reason.empty()) {
    return absl::InternalError(absl::StrCat("the check of ", check.name, " ",
                                            DescribeExit(finished.wait_status), "\n", reason));
  }
  switch (WEXITSTATUS(finished.wait_status)) {
    case EX_USAGE:
      return absl::InvalidArgumentError(reason);
    case EX_CONFIG:
      return absl::FailedPreconditionError(reason);
    default:
      return absl::UnavailableError(reason);
  }
}

}  // namespace

absl::StatusOr<MemoryPlan> CheckPrograms(const ServeOptions& options,
                                         const std::string& program_dir) {
  ASSIGN_OR_RETURN(const std::string plan, RunCheck(PlanWorkerCheck(options, program_dir)));
  const absl::Status coordinator = RunCheck(PlanCoordinatorCheck(options, program_dir)).status();
  if (!coordinator.ok()) {  // the only address of its that an operator gives
    const char* const flag = options.grpc_listen.empty() ? "" : "--grpc-listen: ";
    return absl::Status(coordinator.code(), absl::StrCat(flag, coordinator.message()));
  }
  RETURN_IF_ERROR(RunCheck(PlanGatewayCheck(options, program_dir)).status());
  return ParseMemoryPlan(plan);
}

}  // namespace fathom
