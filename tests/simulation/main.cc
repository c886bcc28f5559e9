// simulate: runs the coordinator in made-up worlds, one per seed (simulation.h).
//
//   build/cpu/tests/simulate --seeds 100000            the long sweep
//   build/cpu/tests/simulate --first-seed 4711 --seeds 1 --events    one run, and its last events
//
// Ends at the first run in which something is wrong, with its seed, what is wrong and the last
// events, and exit code 1. A failed CHECK prints the same. Of several processes each takes its own
// range of seeds.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "base/flag_parser.h"
#include "coordinator/metrics.h"
#include "spdlog/spdlog.h"
#include "tests/simulation/simulation.h"

namespace fathom {
namespace {

int Main(int argc, char** argv) {
  uint64_t first_seed = 1;
  uint64_t num_seeds = 1000;
  bool must_show_events = false;
  FlagParser parser("Runs the coordinator in made-up worlds, one per seed.", "simulate");
  parser.ShowDefaults();
  parser.Add("--first-seed", first_seed, "of the sweep");
  parser.Add("--seeds", num_seeds, "how many runs");
  parser.AddSwitch("--events", must_show_events, "show the last events of each run");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  spdlog::set_level(spdlog::level::off);
  TellSeedOnAbort();

  Metrics metrics("simulated");
  Tally tally;
  uint64_t hash = 0;
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t seed = first_seed; seed < first_seed + num_seeds; ++seed) {
    const SimulationResult result = Simulate(seed, metrics);
    if (must_show_events) std::printf("%s", result.last_events.c_str());
    if (result.failure.has_value()) {
      std::printf("seed %llu: %s\n%s", static_cast<unsigned long long>(seed),
                  result.failure->c_str(), must_show_events ? "" : result.last_events.c_str());
      return EXIT_FAILURE;
    }
    tally += result.tally;
    hash = hash * 31 + result.log_hash;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%llu seeds from %llu, %.0f per second, hash %016llx\n%s\n",
              static_cast<unsigned long long>(num_seeds),
              static_cast<unsigned long long>(first_seed), static_cast<double>(num_seeds) / seconds,
              static_cast<unsigned long long>(hash), tally.Text().c_str());
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
