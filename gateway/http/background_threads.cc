#include "gateway/http/background_threads.h"

#include <utility>

#include "boost/asio/post.hpp"
#include "boost/asio/thread_pool.hpp"
#include "gateway/http/wakeup.h"

namespace fathom {

namespace {

constexpr size_t kMuch = 64 << 10;   // JSON of so much takes some milliseconds to read or write
constexpr size_t kLong = 256 << 10;  // text of so much takes some ten milliseconds to encode

}  // namespace

struct BackgroundThreads::Pools {
  boost::asio::thread_pool threads;
  boost::asio::thread_pool for_long_work{1};
};

BackgroundThreads::BackgroundThreads(int num_threads, IoThread& io_thread)
    : io_thread_(io_thread), pools_(new Pools{boost::asio::thread_pool(num_threads)}) {}

BackgroundThreads::~BackgroundThreads() {
  for (boost::asio::thread_pool* pool : {&pools_->threads, &pools_->for_long_work}) pool->stop();
  for (boost::asio::thread_pool* pool : {&pools_->threads, &pools_->for_long_work}) pool->join();
}

Task<> BackgroundThreads::RunIfMuch(size_t num_bytes, std::function<void()> work) {
  if (num_bytes <= kMuch) {
    work();
    co_return;
  }
  co_await Run(num_bytes, std::move(work));
}

Task<> BackgroundThreads::Run(size_t num_bytes, std::function<void()> work) {
  struct Done {
    explicit Done(IoThread& io_thread) : wakeup(io_thread) {}
    bool done = false;
    Wakeup wakeup;
  };
  auto done = std::make_shared<Done>(io_thread_);
  boost::asio::thread_pool& pool = num_bytes > kLong ? pools_->for_long_work : pools_->threads;
  boost::asio::post(pool, [work = std::move(work), done, &io_thread = io_thread_] {
    work();
    io_thread.Post([done] {
      done->done = true;
      done->wakeup.Notify();
    });
  });
  while (!done->done) co_await done->wakeup.Wait();
}

}  // namespace fathom
