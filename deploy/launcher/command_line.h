// The command line of `fathom`: flags spelled as `vllm serve` spells them, plus our own.
//
// Every value is judged here or by `fathom-worker --check`, before any process starts. Flags of
// vLLM that have no meaning here are accepted with a note where the result is what was asked for
// anyway, and refused with the reason otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "deploy/launcher/serve_options.h"

namespace fathom {

enum class Command { kServe, kCheck, kPrint };

struct CommandLine {
  Command command = Command::kPrint;
  ServeOptions serve;              // of kServe and kCheck
  std::vector<std::string> notes;  // what the operator should know about flags they gave
  std::string text;                // of kPrint: a help page or the version
};

// `arguments` without the program's name. InvalidArgument says which flag is wrong, what was
// expected, and what to do. Pure: touches neither files nor sockets.
absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments,
                                             absl::string_view version);

// "4096", "32k" (32,000), "32K" (32,768), "1.5M", "16G": k m g t count in thousands, K M G T in
// powers of 1024, as in vLLM. InvalidArgument when it is no such number, is negative or too large.
absl::StatusOr<int64_t> ParseCount(absl::string_view text);

}  // namespace fathom
