#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace fathom {
namespace {

TEST(ThreadPoolTest, RunsEveryIndexOnceWhateverTheCounts) {
  for (int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (int64_t count : {0, 1, 2, 7, 64, 1001}) {
      for (int64_t smallest_range : {1, 5, 2000}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
        std::atomic<int> num_ranges = 0;
        std::set<int> ranges;
        std::mutex mutex;
        pool.ParallelFor(count, smallest_range, [&](int range, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
          ++num_ranges;
          const std::lock_guard<std::mutex> lock(mutex);
          EXPECT_TRUE(ranges.insert(range).second);
          EXPECT_LT(range, num_threads);
        });
        for (const std::atomic<int>& run : runs) EXPECT_EQ(run, 1);
        EXPECT_LE(num_ranges, num_threads);
        if (count > 0 && count < 2 * smallest_range) {
          EXPECT_EQ(num_ranges, 1);
        }
      }
    }
  }
}

TEST(ThreadPoolTest, StaysOnTheCallersThreadWhenItIsAlone) {
  ThreadPool pool(1);
  std::thread::id runner;
  pool.ParallelFor(100, 1, [&](int, int64_t, int64_t) { runner = std::this_thread::get_id(); });
  EXPECT_EQ(runner, std::this_thread::get_id());
}

TEST(ThreadPoolTest, SurvivesManyShortLoops) {
  ThreadPool pool(4);
  int64_t total = 0;
  for (int loop = 0; loop < 2000; ++loop) {
    std::atomic<int64_t> sum = 0;
    pool.ParallelFor(1 + loop % 9, 1, [&](int, int64_t begin, int64_t end) { sum += end - begin; });
    total += sum;
    ASSERT_EQ(sum, 1 + loop % 9);
  }
  EXPECT_GT(total, 0);
}

TEST(ThreadPoolTest, CutsTheSameWayEachTime) {
  ThreadPool pool(3);
  const auto cuts = [&] {
    std::vector<int64_t> begins(3, -1);
    pool.ParallelFor(100, 1, [&](int range, int64_t begin, int64_t) {
      begins[static_cast<size_t>(range)] = begin;
    });
    return begins;
  };
  EXPECT_EQ(cuts(), (std::vector<int64_t>{0, 33, 66}));
  EXPECT_EQ(cuts(), cuts());
}

}  // namespace
}  // namespace fathom
