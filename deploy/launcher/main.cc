// The `fathom` command: checks everything it can, then starts a server and keeps it running.

#include <sys/ioctl.h>
#include <sysexits.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "deploy/launcher/command_line.h"
#include "deploy/launcher/health_probe.h"
#include "deploy/launcher/log_output.h"
#include "deploy/launcher/memory_plan.h"
#include "deploy/launcher/preflight.h"
#include "deploy/launcher/process_plan.h"
#include "deploy/launcher/run_directory.h"
#include "deploy/launcher/service_notifier.h"
#include "deploy/launcher/supervisor.h"

namespace fathom {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

LogOutput::Options LogOptions() {
  LogOutput::Options options;
  options.is_terminal = isatty(options.fd) == 1;
  options.use_colours = options.is_terminal && Environment("NO_COLOR").empty();
  winsize size = {};
  if (options.is_terminal && ioctl(options.fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
    options.columns = size.ws_col;
  }
  return options;
}

// The folder of this program and, as it was built, of the others.
absl::StatusOr<std::string> ProgramDir() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string dir = self.parent_path().string();
  for (const char* name : {"fathom-worker", "fathom-coordinator", "fathom-gateway"}) {
    if (access((dir + "/" + name).c_str(), X_OK) != 0) {
      return absl::NotFoundError(absl::StrCat("there is no program ", name, " beside this one in ",
                                              dir, ": build and install all four together"));
    }
  }
  return dir;
}

absl::StatusOr<RunDirectory> MakeRunDirectory(const ServeOptions& options) {
  const size_t longest_name = LongestSocketPath(options, "");
  if (!options.run_directory.empty()) {
    return RunDirectory::Use(options.run_directory, longest_name);
  }
  return RunDirectory::Create(Environment("XDG_RUNTIME_DIR"), longest_name);
}

std::string Url(const ServeOptions& options) {
  const std::string host = ReachableHost(options.host);
  const bool is_ipv6 = absl::StrContains(host, ':');
  return absl::StrCat(options.https ? "https://" : "http://", is_ipv6 ? "[" : "", host,
                      is_ipv6 ? "]" : "", ":", options.port);
}

void AnnounceReady(const ServeOptions& options) {
  const bool has_tokenizer = std::filesystem::exists(options.model_dir + "/tokenizer.json");
  const char* const prompt = has_tokenizer ? "\"Hello\"" : "[1, 2, 3]";
  const bool has_keys = options.has_keys || !Environment("VLLM_API_KEY").empty();
  const char* const key = has_keys ? " -H 'Authorization: Bearer KEY'" : "";
  std::printf(
      "Fathom is ready: %s/v1\n"
      "  curl %s/v1/completions%s -H 'Content-Type: application/json' \\\n"
      "    -d '{\"model\": \"%s\", \"prompt\": %s, \"max_tokens\": 16}'\n",
      Url(options).c_str(), Url(options).c_str(), key, ServedModelName(options).c_str(), prompt);
  std::fflush(stdout);
}

// Written elsewhere and renamed: whoever sees the file sees all of it.
void WriteReadyFile(const std::string& path, const std::string& url) {
  if (path.empty()) return;
  std::error_code ignored;
  const std::string unfinished = path + ".new";
  std::ofstream(unfinished) << url << "\n";
  std::filesystem::rename(unfinished, path, ignored);
}

// The exit code; or why a process could not go on.
absl::StatusOr<int> Supervise(const ServeOptions& options, const Places& places, LogOutput& log) {
  const ServiceNotifier notifier(Environment("NOTIFY_SOCKET"));
  HealthProbe probe(options.https ? HealthProbe::Scheme::kHttps : HealthProbe::Scheme::kHttp,
                    options.host, options.port);
  const Supervisor::Listeners listeners = {
      .on_ready =
          [&] {
            AnnounceReady(options);
            WriteReadyFile(options.ready_file, Url(options));
            notifier.Notify("READY=1\nSTATUS=Serving");
          },
      .on_stopping = [&] { notifier.Notify("STOPPING=1\nSTATUS=Finishing running requests"); },
  };
  notifier.Notify("STATUS=Loading the model");
  Supervisor supervisor({.drain_timeout = std::chrono::seconds(options.drain_timeout_seconds)},
                        PlanProcesses(options, places), probe, log, listeners);
  const int exit_code = supervisor.Run();
  std::error_code ignored;
  if (!options.ready_file.empty()) std::filesystem::remove(options.ready_file, ignored);
  if (supervisor.reason().empty()) return exit_code;
  return exit_code == EX_USAGE ? absl::InvalidArgumentError(supervisor.reason())
                               : absl::FailedPreconditionError(supervisor.reason());
}

// Whoever waits for the file must not wait for ever.
absl::Status CheckReadyFile(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  const std::string unfinished = path + ".new";
  std::error_code ignored;
  const bool can_write = std::ofstream(unfinished).good();
  std::filesystem::remove(unfinished, ignored);
  if (can_write) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--ready-file: cannot write '", path, "'; is its folder there, and ours?"));
}

// Everything that can be known to be wrong is found out before the first process starts.
absl::StatusOr<int> Serve(const CommandLine& command_line, LogOutput& log) {
  ServeOptions options = command_line.serve;
  for (const std::string& note : command_line.notes) log.Own(note);
  ASSIGN_OR_RETURN(const std::string program_dir, ProgramDir());
  RETURN_IF_ERROR(CheckModelFolder(options));
  RETURN_IF_ERROR(CheckReadyFile(options.ready_file));
  if (!options.run_directory.empty()) {
    RETURN_IF_ERROR(RunDirectory::Check(options.run_directory, LongestSocketPath(options, "")));
  }
  ASSIGN_OR_RETURN(const MemoryPlan plan, CheckPrograms(options, program_dir));
  for (const std::string& line : DescribeMemoryPlan(plan, options)) log.Own(line);
  ASSIGN_OR_RETURN(options.port, FindFreePort(options.host, options.port));
  if (command_line.command == Command::kCheck) return 0;
  ASSIGN_OR_RETURN(const RunDirectory run_directory, MakeRunDirectory(options));
  return Supervise(options, {program_dir, run_directory.path()}, log);
}

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return EX_USAGE;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kNotFound:
      return EX_CONFIG;
    default:
      return 1;
  }
}

absl::StatusOr<int> Run(const std::vector<std::string>& arguments) {
  ASSIGN_OR_RETURN(const CommandLine command_line, ParseCommandLine(arguments, FATHOM_VERSION));
  if (command_line.command == Command::kPrint) {
    std::fputs(command_line.text.c_str(), stdout);
    return arguments.empty() ? EX_USAGE : 0;
  }
  LogOutput log(LogOptions());
  return Serve(command_line, log);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // serving goes on when nobody reads the log any more
  const absl::StatusOr<int> exit_code = fathom::Run({argv + 1, argv + argc});
  if (exit_code.ok()) return *exit_code;
  std::fprintf(stderr, "fathom: %s\n", std::string(exit_code.status().message()).c_str());
  return fathom::ExitCodeOf(exit_code.status());
}
