// The lines that operators read: loading progress and throughput.
#include <optional>
#include <string>

#include "coordinator/load_progress.h"
#include "coordinator/throughput_log.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

v1::JoinProgress Loading(double gibibytes_done, double gibibytes_total) {
  v1::JoinProgress progress;
  progress.set_phase(v1::JoinProgress::PHASE_LOADING_WEIGHTS);
  progress.set_bytes_done(static_cast<uint64_t>(gibibytes_done * (1 << 30)));
  progress.set_bytes_total(static_cast<uint64_t>(gibibytes_total * (1 << 30)));
  return progress;
}

v1::JoinProgress In(v1::JoinProgress::Phase phase) {
  v1::JoinProgress progress;
  progress.set_phase(phase);
  return progress;
}

TEST(LoadProgressTest, AddsUpBytesRateAndTimeLeft) {
  LoadProgress progress(2, absl::Seconds(100));
  EXPECT_EQ(progress.Line(absl::Seconds(101)), "loading weights");
  progress.Report(0, Loading(3, 10));
  progress.Report(1, Loading(1, 10));
  EXPECT_EQ(progress.Line(absl::Seconds(102)),
            "loading weights: 20 % (4.0 GiB of 20.0 GiB, 2.0 GiB/s, 8 s left)");
}

TEST(LoadProgressTest, SpeaksOfSmallModelsInMebibytes) {
  LoadProgress progress(1, absl::ZeroDuration());
  progress.Report(0, Loading(1.0 / 1024, 4.0 / 1024));
  EXPECT_EQ(progress.Line(absl::Seconds(1)),
            "loading weights: 25 % (1.0 MiB of 4.0 MiB, 1.0 MiB/s, 3 s left)");
}

TEST(LoadProgressTest, IsWhereTheSlowestWorkerIs) {
  LoadProgress progress(3, absl::ZeroDuration());
  progress.Report(0, In(v1::JoinProgress::PHASE_READY));
  progress.Report(1, In(v1::JoinProgress::PHASE_CONNECTING));
  progress.Report(2, In(v1::JoinProgress::PHASE_ALLOCATING_KV));
  EXPECT_EQ(progress.Line(absl::Seconds(1)), "allocating the KV cache");
  progress.Report(2, In(v1::JoinProgress::PHASE_CONNECTING));
  EXPECT_EQ(progress.Line(absl::Seconds(1)), "connecting: 1 of 3 workers ready");
  progress.Report(1, In(v1::JoinProgress::PHASE_READY));
  progress.Report(2, In(v1::JoinProgress::PHASE_READY));
  EXPECT_EQ(progress.Line(absl::Seconds(1)), "all workers are ready");
}

TEST(ThroughputLogTest, SaysTheLineOperatorsKnowOncePerInterval) {
  ThroughputLog log(absl::Seconds(10));
  const ThroughputLog::Load load{.num_running = 8, .num_waiting = 2, .kv_cache_usage = 0.031};
  EXPECT_EQ(log.Line(absl::Seconds(50), load), std::nullopt);
  log.Add(1203, 410);
  EXPECT_EQ(log.Line(absl::Seconds(55), load), std::nullopt);
  EXPECT_EQ(log.DueIn(absl::Seconds(55)), absl::Seconds(5));
  EXPECT_EQ(log.Line(absl::Seconds(60), load),
            "Avg prompt throughput: 120.3 tokens/s, Avg generation throughput: 41.0 tokens/s, "
            "Running: 8 reqs, Waiting: 2 reqs, KV cache usage: 3.1%");
  EXPECT_EQ(log.DueIn(absl::Seconds(60)), absl::InfiniteDuration());
}

TEST(ThroughputLogTest, DoesNotAverageOverAPause) {
  ThroughputLog log(absl::Seconds(10));
  EXPECT_EQ(log.Line(absl::Seconds(0), {}), std::nullopt);
  log.Wake(absl::Seconds(1000));
  log.Add(0, 100);
  log.Wake(absl::Seconds(1005));  // short pauses with something to report do not count
  EXPECT_EQ(log.Line(absl::Seconds(1005), {}), std::nullopt);
  EXPECT_NE(log.Line(absl::Seconds(1010), {})->find("generation throughput: 10.0"),
            std::string::npos);
}

}  // namespace
}  // namespace fathom
