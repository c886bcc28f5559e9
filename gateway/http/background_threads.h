// A few threads for work that would hold up the I/O thread, such as encoding prompts, and one more
// for what takes long: it waits for its like alone, and nothing waits for it.
#pragma once

#include <cstddef>
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

  // Runs `work`, whose time grows with `num_bytes`, on one of the threads; returns when it is done.
  // What `work` refers to must live until then. I/O thread.
  Task<> Run(size_t num_bytes, std::function<void()> work);

  // The same for what is quick where there is little: that is done at once, on this thread.
  Task<> RunIfMuch(size_t num_bytes, std::function<void()> work);

 private:
  struct Pools;
  IoThread& io_thread_;
  const std::unique_ptr<Pools> pools_;
};

}  // namespace fathom
