#include "tests/simulation/simulation.h"

#include <cstdint>
#include <iostream>
#include <random>

#include "gtest/gtest.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

class SimulationTest : public ::testing::Test {
 protected:
  SimulationTest() {
    spdlog::set_level(spdlog::level::off);
    TellSeedOnAbort();
  }

  Metrics metrics_{"simulated"};
};

TEST_F(SimulationTest, NothingIsWrongInAThousandWorlds) {
  // The same ones each time, so that everything is known to happen in them, and some new ones.
  constexpr uint64_t kNumKnown = 700;
  constexpr uint64_t kNumNew = 300;
  Tally tally;
  const uint64_t new_seeds = uint64_t{std::random_device()()} << 20;
  for (uint64_t i = 0; i < kNumKnown + kNumNew; ++i) {
    const uint64_t seed = i < kNumKnown ? 1 + i : new_seeds + i;
    const SimulationResult result = Simulate(seed, metrics_);
    ASSERT_EQ(result.failure, std::nullopt) << "seed " << seed << "\n" << result.last_events;
    if (i < kNumKnown) tally += result.tally;
  }
  std::cout << "seeds from " << new_seeds << " besides; " << tally.Text() << "\n";
  EXPECT_EQ(tally.Missing(), "") << "has not been tried";
}

TEST_F(SimulationTest, ASeedReplaysARunExactly) {
  uint64_t previous = 0;
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    const SimulationResult once = Simulate(seed, metrics_);
    const SimulationResult again = Simulate(seed, metrics_);
    EXPECT_EQ(once.log_hash, again.log_hash) << "seed " << seed;
    EXPECT_EQ(once.last_events, again.last_events) << "seed " << seed;
    EXPECT_NE(once.log_hash, previous) << "another seed is another run";
    previous = once.log_hash;
  }
}

}  // namespace
}  // namespace fathom
