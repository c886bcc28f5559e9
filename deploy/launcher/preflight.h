// Asks every program whether it could start with the flags it would be given, before one does.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "deploy/launcher/memory_plan.h"
#include "deploy/launcher/serve_options.h"

namespace fathom {

// Runs `--check` of worker, coordinator and gateway, one after the other; `options.port` is final.
// Their reasons come back as InvalidArgument (a flag), FailedPrecondition (a model or file), or
// Unavailable (a port in use, say); a check that crashes as Internal.
absl::StatusOr<MemoryPlan> CheckPrograms(const ServeOptions& options,
                                         const std::string& program_dir);

}  // namespace fathom
