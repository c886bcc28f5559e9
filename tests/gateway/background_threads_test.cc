#include "gateway/http/background_threads.h"

#include <future>
#include <thread>

#include "gtest/gtest.h"

namespace fathom {
namespace {

constexpr size_t kLittle = 100;
constexpr size_t kVeryMuch = 8 << 20;

Task<> RunOn(BackgroundThreads& threads, size_t num_bytes, std::function<void()> work) {
  co_await threads.Run(num_bytes, std::move(work));
}

Task<> RunIfMuchOn(BackgroundThreads& threads, size_t num_bytes, std::function<void()> work) {
  co_await threads.RunIfMuch(num_bytes, std::move(work));
}

class BackgroundThreadsTest : public ::testing::Test {
 protected:
  ~BackgroundThreadsTest() override {
    io_thread_.Stop();
    thread_.join();
  }

  void Spawn(Task<> task, std::promise<void>& done) {
    io_thread_.Spawn(std::move(task), [&done] { done.set_value(); });
  }

  IoThread io_thread_;
  BackgroundThreads threads_{1, io_thread_};
  std::thread thread_;  // started by the test, once it has spawned what it wants
};

TEST_F(BackgroundThreadsTest, WhatTakesLongDelaysItsLikeAlone) {
  std::promise<void> may_end;
  std::promise<void> long_done, next_long_done, short_done;
  const auto wait = [until = may_end.get_future().share()] { until.wait(); };
  Spawn(RunOn(threads_, kVeryMuch, wait), long_done);
  Spawn(RunOn(threads_, kVeryMuch, [] {}), next_long_done);
  Spawn(RunOn(threads_, kLittle, [] {}), short_done);
  thread_ = std::thread([this] { io_thread_.Run(); });
  short_done.get_future().wait();  // for ever if it were behind the others
  std::future<void> next_long = next_long_done.get_future();
  EXPECT_EQ(next_long.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  may_end.set_value();
  long_done.get_future().wait();
  next_long.wait();
}

TEST_F(BackgroundThreadsTest, LittleIsDoneOnTheThreadItself) {
  std::promise<void> little_done, much_done;
  std::thread::id of_little, of_much;
  Spawn(RunIfMuchOn(threads_, kLittle, [&] { of_little = std::this_thread::get_id(); }),
        little_done);
  Spawn(RunIfMuchOn(threads_, kVeryMuch, [&] { of_much = std::this_thread::get_id(); }), much_done);
  thread_ = std::thread([this] { io_thread_.Run(); });
  little_done.get_future().wait();
  much_done.get_future().wait();
  EXPECT_EQ(of_little, thread_.get_id());
  EXPECT_NE(of_much, thread_.get_id());
}

}  // namespace
}  // namespace fathom
