// A bell for one waiting coroutine.
//
// Notify before Wait is not lost; several Notify calls wake once. I/O thread only.
#pragma once

#include <memory>

#include "gateway/http/io_thread.h"
#include "gateway/http/task.h"

namespace fathom {

class Wakeup {
 public:
  explicit Wakeup(IoThread& io_thread);
  ~Wakeup();

  void Notify();
  Task<> Wait();

 private:
  struct Timer;
  const std::unique_ptr<Timer> timer_;  // never expires; Notify cancels it
  bool notified_ = false;
};

}  // namespace fathom
