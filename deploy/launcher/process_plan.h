// Which processes `fathom serve` runs, and with which command lines.
#pragma once

#include <string>
#include <vector>

#include "deploy/launcher/serve_options.h"

namespace fathom {

struct ProcessSpec {
  std::string name;                    // as in the logs: "worker 3"
  std::vector<std::string> arguments;  // the program's path first
  // Stages end one after the other, 0 first: nobody loses a peer it still needs.
  int stop_stage = 0;
  bool reloads = false;  // reads files again at SIGHUP
};

// Where things are.
struct Places {
  std::string program_dir;  // of fathom-worker, fathom-coordinator and fathom-gateway
  std::string run_dir;      // of the sockets
};

// All of them, in the order of start. `options.port` is final (not 0). Pure.
std::vector<ProcessSpec> PlanProcesses(const ServeOptions& options, const Places& places);

// The programs' own `--check`, with the flags that PlanProcesses gives them. The worker's is for
// rank 0 and plans the memory; the others listen where they would, for a moment.
ProcessSpec PlanWorkerCheck(const ServeOptions& options, const std::string& program_dir);
ProcessSpec PlanCoordinatorCheck(const ServeOptions& options, const std::string& program_dir);
ProcessSpec PlanGatewayCheck(const ServeOptions& options, const std::string& program_dir);

// The longest socket path that PlanProcesses would use, in bytes.
size_t LongestSocketPath(const ServeOptions& options, const std::string& run_dir);

// The model's name in the API and in metrics.
std::string ServedModelName(const ServeOptions& options);

}  // namespace fathom
