#include "gateway/http/background_threads.h"

#include <utility>

#include "boost/asio/post.hpp"
#include "boost/asio/thread_pool.hpp"
#include "gateway/http/wakeup.h"

namespace fathom {

struct BackgroundThreads::Pool {
  boost::asio::thread_pool threads;
};

BackgroundThreads::BackgroundThreads(int num_threads, IoThread& io_thread)
    : io_thread_(io_thread), pool_(new Pool{boost::asio::thread_pool(num_threads)}) {}

BackgroundThreads::~BackgroundThreads() {
  pool_->threads.stop();
  pool_->threads.join();
}

Task<> BackgroundThreads::Run(std::function<void()> work) {
  struct Done {
    explicit Done(IoThread& io_thread) : wakeup(io_thread) {}
    bool done = false;
    Wakeup wakeup;
  };
  auto done = std::make_shared<Done>(io_thread_);
  boost::asio::post(pool_->threads, [work = std::move(work), done, &io_thread = io_thread_] {
    work();
    io_thread.Post([done] {
      done->done = true;
      done->wakeup.Notify();
    });
  });
  while (!done->done) co_await done->wakeup.Wait();
}

}  // namespace fathom
