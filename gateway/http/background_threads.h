// A few threads for work that would hold up the I/O thread, such as encoding a long prompt.
#pragma once

#include <functional>
#include <memory>

#include "gateway/http/io_thread.h"
#include "gateway/http/task.h"

namespace fathom {

class BackgroundThreads {
 public:
  // `io_thread` must outlive this.
  BackgroundThreads(int num_threads, IoThread& io_thread);

  // Finishes what runs; drops what waits.
  ~BackgroundThreads();

  // Runs `work` on one of the threads; returns when it is done. What `work` refers to must live
  // until then. I/O thread.
  Task<> Run(std::function<void()> work);

 private:
  struct Pool;
  IoThread& io_thread_;
  const std::unique_ptr<Pool> pool_;
};

}  // namespace fathom
